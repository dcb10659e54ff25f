"""Backward with the optimizer fused, on CUDA; see `kernels_triton`.

    1. One program takes a tile of pieces. The further pieces of long rows come first, as they take
       longest. Unless the row is long, a piece's sum is its row's gradient, with which the
       optimizer is applied at once. The sums of a long row's pieces go to a buffer.
    2. For long rows only, the sums of the pieces are added in order, then the optimizer is applied.

So no program of stage 1 adds more than MAX_PIECE_LENGTH rows, whatever the skew. There are no
atomics. The kernels are in `triton_update_kernels`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bagpipe.cache.device_plan import DevicePlan
from bagpipe.cache.triton_apply import SUM_KIND
from bagpipe.cache.triton_launch import Argument, Tiling, aligned, on_device_of
from bagpipe.cache.triton_update_kernels import update_long_rows, update_pieces
from bagpipe.cache.weights import COLUMNS_A_BLOCK
from bagpipe.optimizers import SGD, Optimizer

_PIECES = Tiling(elements=256, per_thread=8)
_LONG_ROWS = Tiling(elements=64, per_thread=8)
_UNROLL = 4
"""How many rows a program asks for before it adds them up."""


def update(
    weights: Tensor,
    state: Tensor,
    plan: DevicePlan,
    grads: Tensor,
    optimizer: Optimizer,
    rate: float,
    seed: int = 0,
) -> None:
    """Applies one optimizer step in place, as its class in `bagpipe.optimizers` states it.

    Args:
        weights: The cache's weights, (num_slots, D) of the data type.
        state: The cache's optimizer state, (num_slots, S) float32.
        plan: The step's plan; its schedule says in which order gradients are summed.
        grads: The gradient of `lookup`'s result, (B * F, D) float32 or bfloat16.
        optimizer: Whose formula is applied.
        rate: The learning rate, with Adam's bias corrections in it.
        seed: Decides how new weights of 16 bits are rounded by chance.
    """
    _update(weights, state, plan, grads, optimizer, rate, seed, optimizer.kind)


def sum_by_row(sums: Tensor, plan: DevicePlan, grads: Tensor, scale: float) -> None:
    """Puts sums of gradients by unique row, times `scale`, into the rows `plan.unique_slots`.

    Args:
        sums: (n, D) float32.
        plan: The step's plan but for `unique_slots`.
        grads: As for `update`.
        scale: A factor; of plans in rings the negative of their rate is taken.
    """
    _update(sums, sums[:, :0], plan, grads, SGD(lr=1.0), -scale, 0, SUM_KIND)


def _update(
    weights: Tensor,
    state: Tensor,
    plan: DevicePlan,
    grads: Tensor,
    optimizer: Optimizer,
    rate: float,
    seed: int,
    kind: int,
) -> None:
    # of plans in rings the most that there can be
    num_uniques, num_pieces, num_long = (
        plan.unique_slots.shape[-1],
        plan.piece_offsets.shape[-1] - 1,
        plan.long_uniques.shape[-1],
    )
    if num_uniques == 0:
        return
    dim, num_further = grads.shape[1], num_pieces - num_uniques
    numbers = optimizer.update_constants(rate)
    # what is not asked for is not compiled in; a rate of zero may be another one later
    shrinkage = numbers.shrinkage if optimizer.decays_apart and optimizer.weight_decay else None
    update_constants = (
        *(*numbers[:4], numbers.max_grad_norm or None, numbers.l2 or None),
        shrinkage,
    )
    rounding = _rounding(weights, plan.step, seed)
    width = dim if weights.dtype == torch.float32 else max(dim, COLUMNS_A_BLOCK)
    tile, long_tile = _PIECES.of(width), _LONG_ROWS.of(width)
    constants = {"DIM": dim, "STRIDE": weights.shape[1], "KIND": kind}
    constants |= _header_constants(plan)
    ring = _ring_arguments(plan)
    expected = (num_uniques, num_pieces, num_long) if plan.ring is None else plan.ring.typical
    expected_uniques, expected_pieces, expected_long = expected
    with on_device_of(weights):
        # First the sums of further pieces, then those of the first pieces of long rows.
        sums = torch.empty(num_further + num_long, dim, device=weights.device)
        update_pieces.launch(
            max(1, tile.count(expected_pieces - expected_uniques) + tile.count(expected_uniques)),
            (
                weights,
                state,
                aligned(grads),
                plan.unique_slots,
                plan.bags,
                plan.bag_weights,
                plan.piece_offsets,
                plan.bag_scales,
                plan.long_uniques,
                sums,
                num_uniques,
                num_pieces,
                num_long,
                1 << num_long.bit_length() >> 1,
                *update_constants,
                *rounding,
                *ring,
            ),
            constants | {"ROWS": tile.rows, "COLUMNS": tile.columns, "UNROLL": _UNROLL},
            tile.num_warps,
        )
        if num_long > 0:
            update_long_rows.launch(
                max(1, long_tile.count(expected_long)),
                (
                    weights,
                    state,
                    plan.unique_slots,
                    plan.long_uniques,
                    plan.long_offsets,
                    sums,
                    num_uniques,
                    num_pieces,
                    num_long,
                    *update_constants,
                    *rounding,
                    *ring,
                ),
                constants
                | {"ROWS": long_tile.rows, "COLUMNS": long_tile.columns, "UNROLL": _UNROLL},
                long_tile.num_warps,
            )


def _ring_arguments(plan: DevicePlan) -> tuple[Argument, ...]:
    """What a kernel needs to find its plan in rings."""
    if plan.ring is None:
        return (None,) * 11
    ring, num_plans = plan.ring, len(plan.unique_slots)
    arrays = (plan.unique_slots, plan.bags, plan.piece_offsets, plan.long_uniques)
    return (
        *(ring.clock, ring.rates, ring.layout.headers, num_plans, ring.layout.num_batches),
        *(array.stride(0) for array in arrays),
        plan.long_offsets.stride(0),
        0 if plan.bag_scales is None else plan.bag_scales.stride(0),
    )


def _header_constants(plan: DevicePlan) -> dict[str, int]:
    if plan.ring is None:
        return {"HEADER": 0, "UNIQUES": 0, "PIECES": 0, "LONG": 0}
    layout, names = plan.ring.layout, ("HEADER", "UNIQUES", "PIECES", "LONG")
    return dict(zip(names, (layout.headers.shape[1], *layout.columns), strict=True))


def _rounding(
    weights: Tensor, step: int, seed: int
) -> tuple[int, int, int] | tuple[None, None, None]:
    """What decides how weights of 16 bits are rounded: the step and the seed's halves, as int32."""
    if weights.dtype == torch.float32:
        return None, None, None
    step, low, high = (
        (word & 0xFFFFFFFF ^ 1 << 31) - (1 << 31) for word in (step, seed, seed >> 32)
    )
    return step, low, high
