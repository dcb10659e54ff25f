"""The kernels of `triton_update`: gradients summed by row, then the optimizer's step.

The formulas, the layout of the state and the order of an update's constants are those of the
optimizer classes in `bagpipe.optimizers`.
"""

from __future__ import annotations

import triton.language as tl

from bagpipe.cache.triton_launch import Kernel, device_function, sum_rows
from bagpipe.cache.triton_round import round_by_chance
from bagpipe.optimizers import SGD, Adagrad, Adam, PartialRowWiseAdam, RowWiseAdagrad
from bagpipe.plan import MAX_PIECE_LENGTH

_SGD = tl.constexpr(SGD.kind)
_ADAGRAD = tl.constexpr(Adagrad.kind)
_ROW_WISE_ADAGRAD = tl.constexpr(RowWiseAdagrad.kind)
_ADAM = tl.constexpr(Adam.kind)
_PARTIAL_ROW_WISE_ADAM = tl.constexpr(PartialRowWiseAdam.kind)
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
    DIM: tl.constexpr,
    STRIDE: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNROLL: tl.constexpr,
) -> None:
    num_further = num_pieces - num_uniques
    further_tiles = tl.cdiv(num_further, ROWS)
    tile = tl.program_id(0)
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
    weight, first, second = _load_record(
        weights, state, slot, is_unique, DIM, STRIDE, KIND, COLUMNS
    )
    total = sum_rows(
        grads, bags, bag_scales, bag_weights, begin, end, DIM, DIM, ROWS, COLUMNS, UNROLL
    )
    long = tl.full((ROWS,), -1, tl.int32)
    if num_long > 0:
        if (tile >= further_tiles) & (tl.max(end - begin, axis=0) == _MAX_PIECE):
            long = _find(long_uniques, num_long, search_step, piece, is_unique)
        sum_row = tl.where(is_further, piece - num_uniques, num_further + long).to(tl.int64)
        columns = tl.arange(0, COLUMNS)
        is_kept = is_piece & ((piece >= num_uniques) | (long >= 0))
        inside = is_kept[:, None] & (columns < DIM)[None, :]
        tl.store(sums + sum_row[:, None] * DIM + columns[None, :], total, mask=inside)
    is_done = is_unique & (long < 0)
    inside = is_done[:, None] & (tl.arange(0, COLUMNS) < DIM)[None, :]
    weight = _apply(
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
    _store_weights(
        weights, slot, inside, weight, piece, step, seed_low, seed_high, STRIDE, ROWS, COLUMNS
    )


@device_function
def _find(
    long_uniques: tl.tensor,
    num_long: tl.tensor,
    search_step: tl.tensor,
    unique: tl.tensor,
    is_unique: tl.tensor,
) -> tl.tensor:
    """The index of each `unique` in the ascending `long_uniques`, or -1 if it is not there.

    `search_step` is the top bit of `num_long`.
    """
    below = tl.zeros_like(unique)  # how many are smaller, bit by bit from the top
    step = search_step
    while step > 0:
        probe = below + step
        value = tl.load(long_uniques + probe - 1, mask=probe <= num_long, other=2147483647)
        below = tl.where(value < unique, probe, below)
        step = step // 2
    value = tl.load(long_uniques + below, mask=is_unique & (below < num_long), other=-1)
    return tl.where(is_unique & (value == unique), below, -1)


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
    DIM: tl.constexpr,
    STRIDE: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNROLL: tl.constexpr,
) -> None:
    long = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_long = long < num_long
    begin = tl.load(long_offsets + long, mask=is_long, other=0)
    end = tl.load(long_offsets + long + 1, mask=is_long, other=0)
    unique = tl.load(long_uniques + long, mask=is_long, other=0)
    slot = tl.load(unique_slots + unique, mask=is_long, other=0).to(tl.int64)
    weight, first, second = _load_record(weights, state, slot, is_long, DIM, STRIDE, KIND, COLUMNS)
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
                sums + piece.to(tl.int64)[:, None] * DIM + columns[None, :], mask=inside, other=0.0
            )
    total += further
    inside = is_long[:, None] & (tl.arange(0, COLUMNS) < DIM)[None, :]
    weight = _apply(
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
    _store_weights(
        weights, slot, inside, weight, unique, step, seed_low, seed_high, STRIDE, ROWS, COLUMNS
    )


@device_function
def _load_record(
    weights: tl.tensor,
    state: tl.tensor,
    slot: tl.tensor,
    is_row: tl.tensor,
    DIM: tl.constexpr,
    STRIDE: tl.constexpr,
    KIND: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """Weights (ROWS, COLUMNS) and the optimizer's state in one or two tiles.

    In place of state that the optimizer does not have come the weights again.
    """
    columns = tl.arange(0, COLUMNS)
    inside = is_row[:, None] & (columns < DIM)[None, :]
    weight = tl.load(
        weights + slot[:, None] * STRIDE + columns[None, :], mask=inside, other=0.0
    ).to(tl.float32)
    first = weight
    second = weight
    if KIND == _ADAGRAD:
        first = tl.load(state + slot[:, None] * DIM + columns[None, :], mask=inside, other=0.0)
    elif KIND == _ROW_WISE_ADAGRAD:
        first = tl.load(state + slot, mask=is_row, other=0.0)
    elif KIND == _ADAM:
        first = tl.load(
            state + slot[:, None] * (2 * DIM) + columns[None, :], mask=inside, other=0.0
        )
        second = tl.load(
            state + slot[:, None] * (2 * DIM) + DIM + columns[None, :], mask=inside, other=0.0
        )
    elif KIND == _PARTIAL_ROW_WISE_ADAM:
        first = tl.load(
            state + slot[:, None] * (DIM + 1) + columns[None, :], mask=inside, other=0.0
        )
        second = tl.load(state + slot * (DIM + 1) + DIM, mask=is_row, other=0.0)
    return weight, first, second


@device_function
def _apply(
    state: tl.tensor,
    slot: tl.tensor,
    is_row: tl.tensor,
    inside: tl.tensor,
    weight: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    grad: tl.tensor,
    lr: tl.tensor,
    eps: tl.tensor,
    first_rate: tl.tensor,
    second_rate: tl.tensor,
    max_grad_norm: tl.tensor,
    l2: tl.tensor,
    shrinkage: tl.tensor,
    DIM: tl.constexpr,
    KIND: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """The optimizer's step on a tile of records: stores their state, returns their new weights.

    The formulas are those of the optimizers' classes in `bagpipe.optimizers`. What is not asked for
    of `max_grad_norm`, `l2` and `shrinkage` is None.
    """
    columns = tl.arange(0, COLUMNS)
    if max_grad_norm is not None:
        norm = tl.sqrt_rn(tl.sum(grad * grad, axis=1))
        limit = tl.zeros_like(norm) + max_grad_norm
        grad *= tl.div_rn(limit, tl.maximum(norm, limit))[:, None]  # 1 where it is within
    if l2 is not None:
        grad += weight * l2
    if shrinkage is not None:
        weight -= weight * shrinkage
    if KIND == _SGD:
        weight -= grad * lr
    elif KIND == _ADAGRAD:
        first += grad * grad
        tl.store(state + slot[:, None] * DIM + columns[None, :], first, mask=inside)
        weight -= tl.div_rn(grad, tl.sqrt_rn(first) + eps) * lr
    elif KIND == _ROW_WISE_ADAGRAD:
        squares = tl.sum(grad * grad, axis=1)
        first += tl.div_rn(squares, tl.full(squares.shape, DIM, tl.float32))
        tl.store(state + slot, first, mask=is_row)
        divisor = (tl.sqrt_rn(first) + eps)[:, None]
        weight -= tl.div_rn(grad, tl.broadcast_to(divisor, grad.shape)) * lr
    elif KIND == _ADAM:
        first += (grad - first) * first_rate
        second += (grad * grad - second) * second_rate
        tl.store(state + slot[:, None] * (2 * DIM) + columns[None, :], first, mask=inside)
        tl.store(state + slot[:, None] * (2 * DIM) + DIM + columns[None, :], second, mask=inside)
        weight -= tl.div_rn(first, tl.sqrt_rn(second) + eps) * lr
    else:
        squares = tl.sum(grad * grad, axis=1)
        first += (grad - first) * first_rate
        second += (
            tl.div_rn(squares, tl.full(squares.shape, DIM, tl.float32)) - second
        ) * second_rate
        tl.store(state + slot[:, None] * (DIM + 1) + columns[None, :], first, mask=inside)
        tl.store(state + slot * (DIM + 1) + DIM, second, mask=is_row)
        divisor = (tl.sqrt_rn(second) + eps)[:, None]
        weight -= tl.div_rn(first, tl.broadcast_to(divisor, first.shape)) * lr
    return weight


@device_function
def _store_weights(
    weights: tl.tensor,
    slot: tl.tensor,
    inside: tl.tensor,
    weight: tl.tensor,
    unique: tl.tensor,
    step: tl.tensor,
    seed_low: tl.tensor,
    seed_high: tl.tensor,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Puts a tile's weights into their slots, rounded by chance if slots have 16 bits."""
    columns = tl.arange(0, COLUMNS)
    if seed_low is not None:
        is_bf16: tl.constexpr = weights.dtype.element_ty == tl.bfloat16
        halves = round_by_chance(weight, unique, step, seed_low, seed_high, is_bf16, ROWS, COLUMNS)
        weight = halves.to(weights.dtype.element_ty, bitcast=True)
    tl.store(weights + slot[:, None] * STRIDE + columns[None, :], weight, mask=inside)
