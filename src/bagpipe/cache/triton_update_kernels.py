"""The kernels of `triton_update`: gradients summed by row, then the optimizer's step.

A program takes one tile after another. There may be more tiles than programs where the plan lies in
rings, since the size of a captured launch is what a step before needed.
"""

from __future__ import annotations

import triton.language as tl

from bagpipe.cache.triton_apply import apply, find, load_record, store_weights
from bagpipe.cache.triton_launch import Kernel, sum_rows
from bagpipe.plan import MAX_PIECE_LENGTH

_MAX_PIECE = tl.constexpr(MAX_PIECE_LENGTH)


@Kernel
def update_pieces(
    weights: tl.tensor,
    state: tl.tensor,
    grads: tl.tensor,
    unique_slots: tl.tensor,
    bags: tl.tensor,
    bag_weights: tl.tensor,
    piece_offsets: tl.tensor,
    bag_scales: tl.tensor,
    long_uniques: tl.tensor,
    sums: tl.tensor,
    num_uniques: tl.tensor,
    num_pieces: tl.tensor,
    num_long: tl.tensor,
    search_step: tl.tensor,
    lr: tl.tensor,
    eps: tl.tensor,
    first_rate: tl.tensor,
    second_rate: tl.tensor,
    max_grad_norm: tl.tensor,
    l2: tl.tensor,
    shrinkage: tl.tensor,
    step: tl.tensor,
    seed_low: tl.tensor,
    seed_high: tl.tensor,
    clock: tl.tensor,
    rates: tl.tensor,
    headers: tl.tensor,
    num_plans: tl.tensor,
    num_batches: tl.tensor,
    max_uniques: tl.tensor,
    max_lookups: tl.tensor,
    max_pieces: tl.tensor,
    max_long: tl.tensor,
    max_offsets: tl.tensor,
    max_bags: tl.tensor,
    DIM: tl.constexpr,
    STRIDE: tl.constexpr,
    KIND: tl.constexpr,
    HEADER: tl.constexpr,
    UNIQUES: tl.constexpr,
    PIECES: tl.constexpr,
    LONG: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNROLL: tl.constexpr,
) -> None:
    if clock is not None:
        now = tl.load(clock)
        header = headers + now % num_plans * HEADER
        num_uniques = tl.load(header + UNIQUES).to(tl.int32)
        num_pieces = tl.load(header + PIECES).to(tl.int32)
        num_long = tl.load(header + LONG).to(tl.int32)
        lr = tl.load(rates)
        if shrinkage is not None:
            shrinkage = tl.load(rates + 1)
        if step is not None:
            step = now.to(tl.int32)
        unique_slots += now % num_plans * max_uniques
        batch = now % num_batches
        bags += batch * max_lookups
        piece_offsets += batch * max_pieces
        long_uniques += batch * max_long
        if bag_weights is not None:
            bag_weights += batch * max_lookups
        if bag_scales is not None:
            bag_scales += batch * max_bags
    num_further = num_pieces - num_uniques
    further_tiles = tl.cdiv(num_further, ROWS)
    tile = tl.program_id(0)
    num_tiles = further_tiles + tl.cdiv(num_uniques, ROWS)
    while tile < num_tiles:
        is_further = tile < further_tiles
        piece = tl.where(
            is_further, num_uniques + tile * ROWS, (tile - further_tiles) * ROWS
        ) + tl.arange(0, ROWS)
        is_piece = piece < tl.where(is_further, num_pieces, num_uniques)
        begin = tl.load(piece_offsets + piece, mask=is_piece, other=0)
        end = tl.load(piece_offsets + piece + 1, mask=is_piece, other=0)
        is_unique = piece < num_uniques
        slot = tl.load(unique_slots + piece, mask=is_unique, other=0).to(tl.int64)
        # Before the sums, so that these loads are under way meanwhile.
        weight, first, second = load_record(
            weights, state, slot, is_unique, DIM, STRIDE, KIND, COLUMNS
        )
        total = sum_rows(
            grads, bags, bag_scales, bag_weights, begin, end, DIM, DIM, ROWS, COLUMNS, UNROLL
        )
        long = tl.full((ROWS,), -1, tl.int32)
        if num_long > 0:
            if (tile >= further_tiles) & (tl.max(end - begin, axis=0) == _MAX_PIECE):
                long = find(long_uniques, num_long, search_step, piece, is_unique)
            sum_row = tl.where(is_further, piece - num_uniques, num_further + long).to(tl.int64)
            columns = tl.arange(0, COLUMNS)
            is_kept = is_piece & ((piece >= num_uniques) | (long >= 0))
            inside = is_kept[:, None] & (columns < DIM)[None, :]
            tl.store(sums + sum_row[:, None] * DIM + columns[None, :], total, mask=inside)
        is_done = is_unique & (long < 0)
        inside = is_done[:, None] & (tl.arange(0, COLUMNS) < DIM)[None, :]
        weight = apply(
            state,
            slot,
            is_done,
            inside,
            weight,
            first,
            second,
            total,
            lr,
            eps,
            first_rate,
            second_rate,
            max_grad_norm,
            l2,
            shrinkage,
            DIM,
            KIND,
            COLUMNS,
        )
        store_weights(
            weights, slot, inside, weight, piece, step, seed_low, seed_high, STRIDE, ROWS, COLUMNS
        )
        tile += tl.num_programs(0)


@Kernel
def update_long_rows(
    weights: tl.tensor,
    state: tl.tensor,
    unique_slots: tl.tensor,
    long_uniques: tl.tensor,
    long_offsets: tl.tensor,
    sums: tl.tensor,
    num_uniques: tl.tensor,
    num_pieces: tl.tensor,
    num_long: tl.tensor,
    lr: tl.tensor,
    eps: tl.tensor,
    first_rate: tl.tensor,
    second_rate: tl.tensor,
    max_grad_norm: tl.tensor,
    l2: tl.tensor,
    shrinkage: tl.tensor,
    step: tl.tensor,
    seed_low: tl.tensor,
    seed_high: tl.tensor,
    clock: tl.tensor,
    rates: tl.tensor,
    headers: tl.tensor,
    num_plans: tl.tensor,
    num_batches: tl.tensor,
    max_uniques: tl.tensor,
    max_lookups: tl.tensor,
    max_pieces: tl.tensor,
    max_long: tl.tensor,
    max_offsets: tl.tensor,
    max_bags: tl.tensor,
    DIM: tl.constexpr,
    STRIDE: tl.constexpr,
    KIND: tl.constexpr,
    HEADER: tl.constexpr,
    UNIQUES: tl.constexpr,
    PIECES: tl.constexpr,
    LONG: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNROLL: tl.constexpr,
) -> None:
    if clock is not None:
        now = tl.load(clock)
        header = headers + now % num_plans * HEADER
        num_uniques = tl.load(header + UNIQUES).to(tl.int32)
        num_pieces = tl.load(header + PIECES).to(tl.int32)
        num_long = tl.load(header + LONG).to(tl.int32)
        lr = tl.load(rates)
        if shrinkage is not None:
            shrinkage = tl.load(rates + 1)
        if step is not None:
            step = now.to(tl.int32)
        unique_slots += now % num_plans * max_uniques
        batch = now % num_batches
        long_uniques += batch * max_long
        long_offsets += batch * max_offsets
    tile = tl.program_id(0)
    while tile < tl.cdiv(num_long, ROWS):
        long = tile * ROWS + tl.arange(0, ROWS)
        is_long = long < num_long
        begin = tl.load(long_offsets + long, mask=is_long, other=0)
        end = tl.load(long_offsets + long + 1, mask=is_long, other=0)
        unique = tl.load(long_uniques + long, mask=is_long, other=0)
        slot = tl.load(unique_slots + unique, mask=is_long, other=0).to(tl.int64)
        weight, first, second = load_record(
            weights, state, slot, is_long, DIM, STRIDE, KIND, COLUMNS
        )
        columns = tl.arange(0, COLUMNS)
        inside = is_long[:, None] & (columns < DIM)[None, :]
        sum_row = (num_pieces - num_uniques + long).to(tl.int64)
        total = tl.load(sums + sum_row[:, None] * DIM + columns[None, :], mask=inside, other=0.0)
        further = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, tl.max(end - begin, axis=0), UNROLL):
            for ahead in tl.static_range(UNROLL):
                piece = begin + start + ahead
                inside = (piece < end)[:, None] & (columns < DIM)[None, :]
                further += tl.load(
                    sums + piece.to(tl.int64)[:, None] * DIM + columns[None, :],
                    mask=inside,
                    other=0.0,
                )
        total += further
        inside = is_long[:, None] & (tl.arange(0, COLUMNS) < DIM)[None, :]
        weight = apply(
            state,
            slot,
            is_long,
            inside,
            weight,
            first,
            second,
            total,
            lr,
            eps,
            first_rate,
            second_rate,
            max_grad_norm,
            l2,
            shrinkage,
            DIM,
            KIND,
            COLUMNS,
        )
        store_weights(
            weights, slot, inside, weight, unique, step, seed_low, seed_high, STRIDE, ROWS, COLUMNS
        )
        tile += tl.num_programs(0)
