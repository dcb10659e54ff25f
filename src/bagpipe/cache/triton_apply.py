"""The optimizer's step on a tile of records, for Triton kernels.

The formulas, the layout of the state and the order of an update's constants are those of the
optimizer classes in `bagpipe.optimizers`.
"""

from __future__ import annotations

import triton.language as tl

from bagpipe.cache.triton_launch import device_function
from bagpipe.cache.triton_round import round_by_chance
from bagpipe.optimizers import SGD, Adagrad, Adam, PartialRowWiseAdam, RowWiseAdagrad

_SGD = tl.constexpr(SGD.kind)
_ADAGRAD = tl.constexpr(Adagrad.kind)
_ROW_WISE_ADAGRAD = tl.constexpr(RowWiseAdagrad.kind)
_ADAM = tl.constexpr(Adam.kind)
_PARTIAL_ROW_WISE_ADAM = tl.constexpr(PartialRowWiseAdam.kind)
SUM_KIND = -1
"""Descent from zero, whatever the weights are: at the rate -1 a sum."""
_SUM = tl.constexpr(SUM_KIND)


@device_function
def find(
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


@device_function
def load_record(
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
    if KIND == _SUM:
        weight = tl.zeros(inside.shape, tl.float32)
    else:
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
def apply(
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
    if shrinkage is not None:  # at a rate of zero -0.0 and infinity stay as they are
        weight = tl.where(shrinkage > 0, weight - weight * shrinkage, weight)
    if (KIND == _SGD) or (KIND == _SUM):
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
def store_weights(
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
