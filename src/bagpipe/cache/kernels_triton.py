"""The data plane's operations on CUDA, in Triton: the same functions as `kernels_cpu`.

All kernels are bound by memory traffic and by the latency of dependent loads (an offset, then an
index, then a row). A program works on a tile of (rows, D) with 16 bytes a load where D is a
multiple of 4, and asks for several rows before it adds the first.

    lookup   One program takes a tile of bags, feature-major: slots lie in that order, and rows of
             one table are asked for again while they are in the L2 cache. One program sums a bag,
             in lookup order.
    update   is in `triton_update`, as is sum_by_row.
    fill     copies staged records into slots.
    read     copies slots into packed records.

Results equal those of `kernels_cpu` to the bit: the order of sums is the schedule's, multiply-adds
are not fused, and quotients and square roots are rounded correctly. The one exception is row-wise
Adagrad, whose mean of squares is added up in a tree. Weights of 16 bits are widened as they are
read, and `triton_round` rounds them. A row's result depends only on its own values and pieces: not
on its slot, its neighbours in a tile or the size of the cache.

Dimension, types and optimizer are compiled in. Nothing waits for the device, and grids come from
the shapes of the plan's tensors.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from bagpipe.cache.device_plan import DevicePlan
from bagpipe.cache.triton_launch import (
    Argument,
    Kernel,
    Tiling,
    aligned,
    device_function,
    on_device_of,
    sum_rows,
)
from bagpipe.cache.triton_update import sum_by_row, update
from bagpipe.cache.weights import words_of

__all__ = ["fill", "lookup", "read", "sum_by_row", "update"]

_ONE_HOT = Tiling(elements=2048, per_thread=16)
_BAGS = Tiling(elements=256, per_thread=4)
_RECORDS = Tiling(elements=2048, per_thread=16)
_UNROLL = 8
"""How many rows a program asks for before it adds them up."""


def lookup(weights: Tensor, plan: DevicePlan, out: Tensor) -> None:
    """Pools the embeddings of a batch; sums and scales in float32.

    Args:
        weights: The cache's weights, (num_slots, D) of the data type.
        plan: Which slots each bag sums.
        out: Filled by output row, (B * F, D) float32 or bfloat16.
    """
    if plan.num_bags == 0:
        return
    dim, stride = out.shape[1], weights.shape[1]
    into = aligned(out)
    sizes = (plan.num_bags, plan.num_features, plan.batch_size)
    ring = _ring_arguments(plan)
    with on_device_of(weights):
        if plan.bag_offsets is None:
            tile = _ONE_HOT.of(dim)
            constants = {"DIM": dim, "STRIDE": stride, "ROWS": tile.rows, "COLUMNS": tile.columns}
            arguments = (weights, plan.lookup_slots, plan.lookup_weights, into, *sizes, *ring)
            _lookup_one_hot.launch(tile.count(plan.num_bags), arguments, constants, tile.num_warps)
        else:
            tile = _BAGS.of(dim)
            _lookup_jagged.launch(
                tile.count(plan.num_bags),
                (
                    weights,
                    plan.lookup_slots,
                    plan.lookup_weights,
                    plan.bag_offsets,
                    plan.bag_scales,
                    into,
                    *sizes,
                    *ring,
                ),
                {
                    "DIM": dim,
                    "STRIDE": stride,
                    "ROWS": tile.rows,
                    "COLUMNS": tile.columns,
                    "UNROLL": _UNROLL,
                },
                tile.num_warps,
            )
        if into is not out:
            out.copy_(into)


def _ring_arguments(plan: DevicePlan) -> tuple[Argument, ...]:
    if plan.ring is None:
        return (None,) * 6
    offsets, scales = (
        0 if array is None else array.stride(0) for array in (plan.bag_offsets, plan.bag_scales)
    )
    num_plans, max_lookups = len(plan.lookup_slots), plan.lookup_slots.stride(0)
    ring = plan.ring
    return ring.clock, num_plans, ring.layout.num_batches, max_lookups, offsets, scales


def fill(weights: Tensor, state: Tensor, slots: Tensor, records: Tensor) -> None:
    """Puts `records` (n, record_width) into `slots` (n,)."""
    _move_records(words_of(weights), state, slots, aligned(records), is_fill=True)


def read(weights: Tensor, state: Tensor, slots: Tensor, out: Tensor | None = None) -> Tensor:
    """The records in `slots` (n,): (n, record_width), `out`, if that is given."""
    words = words_of(weights)
    if out is None:
        width = words.shape[1] + state.shape[1]
        out = torch.empty(slots.shape[0], width, device=weights.device)
    _move_records(words, state, slots, out, is_fill=False)
    return out


def _move_records(
    words: Tensor, state: Tensor, slots: Tensor, records: Tensor, *, is_fill: bool
) -> None:
    num_records = slots.shape[0]  # which takes a fifth of the time of `len`
    if num_records == 0:
        return
    dim, state_width = words.shape[1], state.shape[1]
    tile = _RECORDS.of(max(dim, state_width))
    with on_device_of(words):
        _move.launch(
            tile.count(num_records),
            (words, state, slots, records, num_records),
            {
                "DIM": dim,
                "STATE_WIDTH": state_width,
                "IS_FILL": is_fill,
                "ROWS": tile.rows,
                "COLUMNS": tile.columns,
            },
            tile.num_warps,
        )


@device_function
def _output_rows(bag: tl.tensor, batch_size: tl.tensor, num_features: tl.tensor) -> tl.tensor:
    """Turns bags f * B + b into output rows b * F + f."""
    feature = bag // batch_size
    return (bag - feature * batch_size) * num_features + feature


@Kernel
def _lookup_one_hot(
    weights: tl.tensor,
    slots: tl.tensor,
    lookup_weights: tl.tensor,
    out: tl.tensor,
    num_bags: tl.tensor,
    num_features: tl.tensor,
    batch_size: tl.tensor,
    clock: tl.tensor,
    num_plans: tl.tensor,
    num_batches: tl.tensor,
    max_lookups: tl.tensor,
    max_offsets: tl.tensor,
    max_bags: tl.tensor,
    DIM: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    if clock is not None:
        step = tl.load(clock)
        slots += step % num_plans * max_lookups
        if lookup_weights is not None:
            lookup_weights += step % num_batches * max_lookups
    bag = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    # This and all that follow are (ROWS, COLUMNS).
    inside = (bag < num_bags)[:, None] & (columns < DIM)[None, :]
    slot = tl.load(slots + bag, mask=bag < num_bags, other=0).to(tl.int64)
    values = tl.load(weights + slot[:, None] * STRIDE + columns[None, :], mask=inside).to(
        tl.float32
    )
    if lookup_weights is not None:
        values *= tl.load(lookup_weights + bag, mask=bag < num_bags, other=0.0)[:, None]
    row = _output_rows(bag, batch_size, num_features).to(tl.int64)
    tl.store(
        out + row[:, None] * DIM + columns[None, :], values.to(out.dtype.element_ty), mask=inside
    )


@Kernel
def _lookup_jagged(
    weights: tl.tensor,
    slots: tl.tensor,
    lookup_weights: tl.tensor,
    bag_offsets: tl.tensor,
    bag_scales: tl.tensor,
    out: tl.tensor,
    num_bags: tl.tensor,
    num_features: tl.tensor,
    batch_size: tl.tensor,
    clock: tl.tensor,
    num_plans: tl.tensor,
    num_batches: tl.tensor,
    max_lookups: tl.tensor,
    max_offsets: tl.tensor,
    max_bags: tl.tensor,
    DIM: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNROLL: tl.constexpr,
) -> None:
    if clock is not None:
        step = tl.load(clock)
        slots += step % num_plans * max_lookups
        bag_offsets += step % num_batches * max_offsets
        if lookup_weights is not None:
            lookup_weights += step % num_batches * max_lookups
        if bag_scales is not None:
            bag_scales += step % num_batches * max_bags
    bag = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_bag = bag < num_bags
    begin = tl.load(bag_offsets + bag, mask=is_bag, other=0)
    end = tl.load(bag_offsets + bag + 1, mask=is_bag, other=0)
    total = sum_rows(
        weights, slots, None, lookup_weights, begin, end, DIM, STRIDE, ROWS, COLUMNS, UNROLL
    )
    row = _output_rows(bag, batch_size, num_features).to(tl.int64)
    if bag_scales is not None:
        total *= tl.load(bag_scales + row, mask=is_bag, other=0.0)[:, None]
    columns = tl.arange(0, COLUMNS)
    inside = is_bag[:, None] & (columns < DIM)[None, :]
    tl.store(
        out + row[:, None] * DIM + columns[None, :], total.to(out.dtype.element_ty), mask=inside
    )


@Kernel
def _move(
    words: tl.tensor,
    state: tl.tensor,
    slots: tl.tensor,
    records: tl.tensor,
    num_records: tl.tensor,
    DIM: tl.constexpr,
    STATE_WIDTH: tl.constexpr,
    IS_FILL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Copies between slots and packed records: the weights' words, then the state."""
    record = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_record = record < num_records
    slot = tl.load(slots + record, mask=is_record, other=0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    packed = records + record.to(tl.int64)[:, None] * (DIM + STATE_WIDTH) + columns[None, :]
    inside = is_record[:, None] & (columns < DIM)[None, :]
    _copy(words + slot[:, None] * DIM + columns[None, :], packed, inside, IS_FILL)
    if STATE_WIDTH > 0:
        inside = is_record[:, None] & (columns < STATE_WIDTH)[None, :]
        _copy(state + slot[:, None] * STATE_WIDTH + columns[None, :], packed + DIM, inside, IS_FILL)


@device_function
def _copy(cached: tl.tensor, packed: tl.tensor, inside: tl.tensor, IS_FILL: tl.constexpr) -> None:
    if IS_FILL:
        tl.store(cached, tl.load(packed, mask=inside), mask=inside)
    else:
        tl.store(packed, tl.load(cached, mask=inside), mask=inside)
