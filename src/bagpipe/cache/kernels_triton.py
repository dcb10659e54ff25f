"""The data plane's operations on CUDA, in Triton: the same functions as `kernels_torch`, which tests compare them with.

All kernels are bound by memory traffic and by the latency of dependent loads (an offset, then an index, then a row). A program
works on a tile of (rows, D) with 16 bytes a load where D is a multiple of 4, and asks for several rows before it adds the first.

    lookup   one program a tile of bags, taken feature-major, since slots lie so and rows of one table are asked for again while
             they are in the L2 cache. A bag is summed in lookup order by one program.
    update   1. one program a tile of pieces, the further pieces of long rows first, as they take longest. A piece's sum is
             a row's gradient, with which the optimizer is applied at once, unless the row is long: then it goes to a buffer.
             2. long rows only: their pieces' sums are added in order, then the optimizer is applied.
             So no program adds more than MAX_PIECE_LENGTH rows in stage 1, whatever the skew. No atomics.
    fill     staged records into slots.
    read     slots into packed records.

Arithmetic: the order of sums is the schedule's, multiply-adds are not fused, quotients and square roots are rounded correctly, so
results equal those of `kernels_cpu` to the bit, except with row-wise Adagrad, whose mean of squares is added up in a tree.
A row's result depends on its own values and pieces alone: not on its slot, its neighbours in a tile or the size of the cache.

What varies from step to step (sizes, learning rate) is never compiled in; dimension, types and optimizer are. Nothing waits for the
device, and grids come from the shapes of the plan's tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bagpipe.cache.device_plan import DevicePlan
from bagpipe.cache.kernels_torch import adam_step_size
from bagpipe.types import MAX_PIECE_LENGTH, SGD, Adagrad, Adam, Optimizer, RowWiseAdagrad

_SGD = tl.constexpr(0)
_ADAGRAD = tl.constexpr(1)
_ROW_WISE_ADAGRAD = tl.constexpr(2)
_ADAM = tl.constexpr(3)
_MAX_PIECE = tl.constexpr(MAX_PIECE_LENGTH)

_VARYING = (
    "num_bags num_features batch_size num_uniques num_pieces num_long search_step num_records "
    "slots bag_offsets bag_scales unique_slots bags piece_offsets long_uniques long_offsets"
).split()
"""Arguments whose value, or for a plan's arrays whose alignment, must not start a compilation."""


@dataclass(frozen=True, kw_only=True)
class _Tiling:
    """How much one program works on: `elements` of a tile, at least one row, `per_thread` of them a thread."""

    elements: int
    per_thread: int

    def of(self, width: int) -> dict[str, int]:
        """Rows and columns of a tile for rows of `width` elements, and warps; columns are a power of two, as Triton wants."""
        columns = triton.next_power_of_2(width)
        rows = max(1, self.elements // columns)
        return {"ROWS": rows, "COLUMNS": columns, "num_warps": min(max(rows * columns // (32 * self.per_thread), 1), 16)}


_ONE_HOT = _Tiling(elements=2048, per_thread=16)
_BAGS = _Tiling(elements=256, per_thread=4)
_PIECES = _Tiling(elements=256, per_thread=4)
_LONG_ROWS = _Tiling(elements=128, per_thread=4)
_RECORDS = _Tiling(elements=2048, per_thread=16)
_UNROLL = 8
"""Rows that a program asks for before it adds them up."""


def lookup(weights: Tensor, plan: DevicePlan, out: Tensor) -> None:
    """Fills `out` (B * F, D), float32 or bfloat16, with the pooled embeddings by output row; summed and scaled in float32."""
    if plan.num_bags == 0:
        return
    dim = weights.shape[1]
    sizes = (plan.num_bags, plan.num_features, plan.batch_size, dim)
    with torch.cuda.device_of(weights):  # type: ignore[no-untyped-call]
        if plan.bag_offsets is None:
            tiling = _ONE_HOT.of(dim)
            _lookup_one_hot[_grid(plan.num_bags, tiling)](weights, plan.lookup_slots, out, *sizes, **tiling)
            return
        tiling = _BAGS.of(dim)
        _lookup_jagged[_grid(plan.num_bags, tiling)](
            weights,
            plan.lookup_slots,
            plan.bag_offsets,
            plan.bag_scales,
            out,
            *sizes,
            UNROLL=_UNROLL,
            enable_fp_fusion=False,
            **tiling,
        )


def update(weights: Tensor, state: Tensor, plan: DevicePlan, grads: Tensor, optimizer: Optimizer, lr: float) -> None:
    """Applies one optimizer step with `grads` (B * F, D), float32 or bfloat16, the gradient of `lookup`'s result."""
    num_uniques, num_pieces, num_long = len(plan.unique_slots), len(plan.piece_offsets) - 1, len(plan.long_uniques)
    if num_uniques == 0:
        return
    dim = weights.shape[1]
    num_further = num_pieces - num_uniques
    kind, scalars = _constants(optimizer, lr, plan.step)
    tiling, long_tiling = _PIECES.of(dim), _LONG_ROWS.of(dim)
    with torch.cuda.device_of(weights):  # type: ignore[no-untyped-call]
        # First the sums of further pieces, then those of the first pieces of long rows.
        sums = torch.empty(num_further + num_long, dim, device=weights.device)
        num_tiles = triton.cdiv(num_further, tiling["ROWS"]) + triton.cdiv(num_uniques, tiling["ROWS"])
        _update[(num_tiles,)](
            weights,
            state,
            _aligned(grads),
            plan.unique_slots,
            plan.bags,
            plan.piece_offsets,
            plan.bag_scales,
            plan.long_uniques,
            sums,
            num_uniques,
            num_pieces,
            num_long,
            1 << num_long.bit_length() >> 1,
            *scalars,
            dim,
            kind,
            UNROLL=_UNROLL,
            enable_fp_fusion=False,
            **tiling,
        )
        if num_long > 0:
            _update_long[_grid(num_long, long_tiling)](
                weights,
                state,
                plan.unique_slots,
                plan.long_uniques,
                plan.long_offsets,
                sums,
                num_uniques,
                num_pieces,
                num_long,
                *scalars,
                dim,
                kind,
                UNROLL=_UNROLL,
                enable_fp_fusion=False,
                **long_tiling,
            )


def fill(weights: Tensor, state: Tensor, slots: Tensor, records: Tensor) -> None:
    """Puts `records` (n, D + S) into `slots` (n,)."""
    _move_records(weights, state, slots, records, is_fill=True)


def read(weights: Tensor, state: Tensor, slots: Tensor) -> Tensor:
    """The records in `slots` (n,): (n, D + S)."""
    records = torch.empty(len(slots), weights.shape[1] + state.shape[1], device=weights.device)
    _move_records(weights, state, slots, records, is_fill=False)
    return records


def _move_records(weights: Tensor, state: Tensor, slots: Tensor, records: Tensor, *, is_fill: bool) -> None:
    if len(slots) == 0:
        return
    dim, state_width = weights.shape[1], state.shape[1]
    tiling = _RECORDS.of(max(dim, state_width))
    with torch.cuda.device_of(weights):  # type: ignore[no-untyped-call]
        _move[_grid(len(slots), tiling)](weights, state, slots, records, len(slots), dim, state_width, is_fill, **tiling)


def _grid(num_rows: int, tiling: dict[str, int]) -> tuple[int]:
    return (triton.cdiv(num_rows, tiling["ROWS"]),)


def _aligned(tensor: Tensor) -> Tensor:
    """`tensor`, copied if it starts at an odd place: the layout of a tile, and so the order of a tree sum, may depend on that."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _constants(optimizer: Optimizer, lr: float, step: int) -> tuple[int, tuple[float, float, float, float]]:
    """What `_apply` needs to know: which optimizer, and its numbers."""
    match optimizer:
        case SGD():
            return _SGD.value, (lr, 0.0, 0.0, 0.0)
        case Adagrad():
            return _ADAGRAD.value, (lr, optimizer.eps, 0.0, 0.0)
        case RowWiseAdagrad():
            return _ROW_WISE_ADAGRAD.value, (lr, optimizer.eps, 0.0, 0.0)
        case Adam():
            beta1, beta2 = optimizer.betas
            return _ADAM.value, (adam_step_size(optimizer, lr, step), optimizer.eps, 1.0 - beta1, 1.0 - beta2)


def _kernel(function: Callable[..., Any]) -> Any:
    """A typed door to Triton."""
    return triton.jit(do_not_specialize=_VARYING)(function)


@_kernel
def _output_rows(bag: tl.tensor, batch_size: tl.tensor, num_features: tl.tensor) -> tl.tensor:
    """From bags f * B + b to output rows b * F + f."""
    feature = bag // batch_size
    return (bag - feature * batch_size) * num_features + feature


@_kernel
def _lookup_one_hot(
    weights: tl.tensor,
    slots: tl.tensor,
    out: tl.tensor,
    num_bags: tl.tensor,
    num_features: tl.tensor,
    batch_size: tl.tensor,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    bag = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (bag < num_bags)[:, None] & (columns < DIM)[None, :]  # (ROWS, COLUMNS), as all that follow
    slot = tl.load(slots + bag, mask=bag < num_bags, other=0).to(tl.int64)
    values = tl.load(weights + slot[:, None] * DIM + columns[None, :], mask=inside)
    row = _output_rows(bag, batch_size, num_features).to(tl.int64)
    tl.store(out + row[:, None] * DIM + columns[None, :], values.to(out.dtype.element_ty), mask=inside)


@_kernel
def _lookup_jagged(
    weights: tl.tensor,
    slots: tl.tensor,
    bag_offsets: tl.tensor,
    bag_scales: tl.tensor,
    out: tl.tensor,
    num_bags: tl.tensor,
    num_features: tl.tensor,
    batch_size: tl.tensor,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNROLL: tl.constexpr,
) -> None:
    bag = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_bag = bag < num_bags
    begin = tl.load(bag_offsets + bag, mask=is_bag, other=0)
    end = tl.load(bag_offsets + bag + 1, mask=is_bag, other=0)
    total = _sum_rows(weights, slots, None, begin, end, DIM, ROWS, COLUMNS, UNROLL)
    row = _output_rows(bag, batch_size, num_features).to(tl.int64)
    if bag_scales is not None:
        total *= tl.load(bag_scales + row, mask=is_bag, other=0.0)[:, None]
    columns = tl.arange(0, COLUMNS)
    inside = is_bag[:, None] & (columns < DIM)[None, :]
    tl.store(out + row[:, None] * DIM + columns[None, :], total.to(out.dtype.element_ty), mask=inside)


@_kernel
def _sum_rows(
    source: tl.tensor,
    indices: tl.tensor,
    scales: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNROLL: tl.constexpr,
) -> tl.tensor:
    """For each row of the tile the sum of `source[indices[begin:end]]`, in that order, times `scales[index]` each."""
    columns = tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, tl.max(end - begin, axis=0), UNROLL):
        for ahead in tl.static_range(UNROLL):
            position = begin + start + ahead
            is_row = position < end
            index = tl.load(indices + position, mask=is_row, other=0).to(tl.int64)
            inside = is_row[:, None] & (columns < DIM)[None, :]
            values = tl.load(source + index[:, None] * DIM + columns[None, :], mask=inside, other=0.0).to(tl.float32)
            if scales is not None:
                values *= tl.load(scales + index, mask=is_row, other=0.0)[:, None]
            total += values
    return total


@_kernel
def _update(
    weights: tl.tensor,
    state: tl.tensor,
    grads: tl.tensor,
    unique_slots: tl.tensor,
    bags: tl.tensor,
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
    DIM: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNROLL: tl.constexpr,
) -> None:
    num_further = num_pieces - num_uniques
    further_tiles = tl.cdiv(num_further, ROWS)
    tile = tl.program_id(0)
    is_further = tile < further_tiles
    piece = tl.where(is_further, num_uniques + tile * ROWS, (tile - further_tiles) * ROWS) + tl.arange(0, ROWS)
    is_piece = piece < tl.where(is_further, num_pieces, num_uniques)
    begin = tl.load(piece_offsets + piece, mask=is_piece, other=0)
    end = tl.load(piece_offsets + piece + 1, mask=is_piece, other=0)
    is_unique = piece < num_uniques
    slot = tl.load(unique_slots + piece, mask=is_unique, other=0).to(tl.int64)
    # Before the sums, so that these loads are under way meanwhile.
    weight, first, second = _load_record(weights, state, slot, is_unique, DIM, KIND, COLUMNS)
    total = _sum_rows(grads, bags, bag_scales, begin, end, DIM, ROWS, COLUMNS, UNROLL)
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
    _apply(weights, state, slot, is_done, weight, first, second, total, lr, eps, first_rate, second_rate, DIM, KIND, COLUMNS)


@_kernel
def _find(
    long_uniques: tl.tensor, num_long: tl.tensor, search_step: tl.tensor, unique: tl.tensor, is_unique: tl.tensor
) -> tl.tensor:
    """Index of each `unique` in the ascending `long_uniques`, -1 if it is none; `search_step` is the top bit of `num_long`."""
    below = tl.zeros_like(unique)  # how many are smaller, bit by bit from the top
    step = search_step
    while step > 0:
        probe = below + step
        value = tl.load(long_uniques + probe - 1, mask=probe <= num_long, other=2147483647)
        below = tl.where(value < unique, probe, below)
        step = step // 2
    value = tl.load(long_uniques + below, mask=is_unique & (below < num_long), other=-1)
    return tl.where(is_unique & (value == unique), below, -1)


@_kernel
def _update_long(
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
    DIM: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNROLL: tl.constexpr,
) -> None:
    long = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_long = long < num_long
    begin = tl.load(long_offsets + long, mask=is_long, other=0)
    end = tl.load(long_offsets + long + 1, mask=is_long, other=0)
    slot = tl.load(unique_slots + tl.load(long_uniques + long, mask=is_long, other=0), mask=is_long, other=0).to(tl.int64)
    weight, first, second = _load_record(weights, state, slot, is_long, DIM, KIND, COLUMNS)
    columns = tl.arange(0, COLUMNS)
    inside = is_long[:, None] & (columns < DIM)[None, :]
    sum_row = (num_pieces - num_uniques + long).to(tl.int64)
    total = tl.load(sums + sum_row[:, None] * DIM + columns[None, :], mask=inside, other=0.0)
    further = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, tl.max(end - begin, axis=0), UNROLL):
        for ahead in tl.static_range(UNROLL):
            piece = begin + start + ahead
            inside = (piece < end)[:, None] & (columns < DIM)[None, :]
            further += tl.load(sums + piece.to(tl.int64)[:, None] * DIM + columns[None, :], mask=inside, other=0.0)
    total += further
    _apply(weights, state, slot, is_long, weight, first, second, total, lr, eps, first_rate, second_rate, DIM, KIND, COLUMNS)


@_kernel
def _load_record(
    weights: tl.tensor,
    state: tl.tensor,
    slot: tl.tensor,
    is_row: tl.tensor,
    DIM: tl.constexpr,
    KIND: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """Weights (ROWS, COLUMNS) and the optimizer's state in one or two tiles; what an optimizer has not is the weights again."""
    columns = tl.arange(0, COLUMNS)
    inside = is_row[:, None] & (columns < DIM)[None, :]
    weight = tl.load(weights + slot[:, None] * DIM + columns[None, :], mask=inside, other=0.0)
    first = weight
    second = weight
    if KIND == _ADAGRAD:
        first = tl.load(state + slot[:, None] * DIM + columns[None, :], mask=inside, other=0.0)
    elif KIND == _ROW_WISE_ADAGRAD:
        first = tl.load(state + slot, mask=is_row, other=0.0)
    elif KIND == _ADAM:
        first = tl.load(state + slot[:, None] * (2 * DIM) + columns[None, :], mask=inside, other=0.0)
        second = tl.load(state + slot[:, None] * (2 * DIM) + DIM + columns[None, :], mask=inside, other=0.0)
    return weight, first, second


@_kernel
def _apply(
    weights: tl.tensor,
    state: tl.tensor,
    slot: tl.tensor,
    is_row: tl.tensor,
    weight: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    grad: tl.tensor,
    lr: tl.tensor,
    eps: tl.tensor,
    first_rate: tl.tensor,
    second_rate: tl.tensor,
    DIM: tl.constexpr,
    KIND: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """The optimizer's step on the records of a tile: `kernels_torch._apply`, operation for operation."""
    columns = tl.arange(0, COLUMNS)
    inside = is_row[:, None] & (columns < DIM)[None, :]
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
    else:
        first += (grad - first) * first_rate
        second += (grad * grad - second) * second_rate
        tl.store(state + slot[:, None] * (2 * DIM) + columns[None, :], first, mask=inside)
        tl.store(state + slot[:, None] * (2 * DIM) + DIM + columns[None, :], second, mask=inside)
        weight -= tl.div_rn(first, tl.sqrt_rn(second) + eps) * lr
    tl.store(weights + slot[:, None] * DIM + columns[None, :], weight, mask=inside)


@_kernel
def _move(
    weights: tl.tensor,
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
    """Between slots and packed records: the weights, then the state."""
    record = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_record = record < num_records
    slot = tl.load(slots + record, mask=is_record, other=0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    packed = records + record.to(tl.int64)[:, None] * (DIM + STATE_WIDTH) + columns[None, :]
    inside = is_record[:, None] & (columns < DIM)[None, :]
    _copy(weights + slot[:, None] * DIM + columns[None, :], packed, inside, IS_FILL)
    if STATE_WIDTH > 0:
        inside = is_record[:, None] & (columns < STATE_WIDTH)[None, :]
        _copy(state + slot[:, None] * STATE_WIDTH + columns[None, :], packed + DIM, inside, IS_FILL)


@_kernel
def _copy(cached: tl.tensor, packed: tl.tensor, inside: tl.tensor, IS_FILL: tl.constexpr) -> None:
    if IS_FILL:
        tl.store(cached, tl.load(packed, mask=inside), mask=inside)
    else:
        tl.store(packed, tl.load(cached, mask=inside), mask=inside)
