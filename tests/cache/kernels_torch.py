"""The data plane's operations in plain torch: what `bagpipe.cache`'s kernels are compared with.

Four operations on one group's cache, `weights` (num_slots, D), of the data type, and `state`
(num_slots, S) float32:

    lookup   gather + pool                    -> (B * F, D), float32 or bfloat16
    update   sum gradients of either type along the plan's schedule, in float32, and apply the
             optimizer to the records in place
    fill     records (n, D + S) into slots
    read     slots into records (n, D + S)

All sums run in the order that the schedule names and no atomics are used, so results do not depend
on timing. The optimizers' formulas, with their sources, stand at the classes in `bagpipe.types`.
"""

from __future__ import annotations

import torch
from tests.cache.rounding_torch import round_by_chance
from torch import Tensor
from torch.nn import functional

from bagpipe.cache.device_plan import DevicePlan
from bagpipe.cache.weights import words_of
from bagpipe.optimizers import SGD, Adagrad, Adam, Optimizer, PartialRowWiseAdam, RowWiseAdagrad


def lookup(weights: Tensor, plan: DevicePlan, out: Tensor) -> None:
    """Fills `out` (B * F, D), float32 or bfloat16, with the pooled embeddings by output row.

    They are summed and scaled in float32.
    """
    dim = out.shape[1]
    weights = weights[:, :dim].float()
    if plan.bag_offsets is None:
        pooled = _weighted(weights.index_select(0, plan.lookup_slots), plan.lookup_weights)
    elif len(plan.lookup_slots) == 0:
        pooled = weights.new_zeros(plan.num_bags, dim)
    else:
        pooled = _sums(weights, plan.lookup_slots, plan.lookup_weights, plan.bag_offsets)
    by_feature = pooled.view(plan.num_features, plan.batch_size, dim)  # from (F * B, D)
    by_sample = by_feature.transpose(0, 1)  # (B, F, D)
    if plan.bag_scales is not None:
        by_sample = by_sample * plan.bag_scales.view(plan.batch_size, plan.num_features, 1)
    out.view(by_sample.shape).copy_(by_sample)


def update(
    weights: Tensor,
    state: Tensor,
    plan: DevicePlan,
    grads: Tensor,
    optimizer: Optimizer,
    rate: float,
    seed: int = 0,
) -> None:
    """Applies one optimizer step in place.

    `grads` (B * F, D), float32 or bfloat16, is the gradient of `lookup`'s result. `rate` is the
    learning rate, with Adam's bias corrections in it. New weights of 16 bits are rounded by chance,
    which `seed` decides.
    """
    if len(plan.unique_slots) == 0:
        return
    sums = sum_gradients(plan, grads.float())
    slots = plan.unique_slots.long()
    dim = grads.shape[1]
    new_weights, state[slots] = _apply(
        weights[slots, :dim].float(), state[slots], sums, optimizer, rate
    )
    if weights.dtype != torch.float32:
        new_weights = round_by_chance(new_weights, weights.dtype, seed=seed, step=plan.step)
    weights[slots, :dim] = new_weights


def sum_gradients(plan: DevicePlan, grads: Tensor) -> Tensor:
    """The gradient of each unique row along the schedule: (U, D)."""
    if plan.bag_scales is not None:
        grads = grads * plan.bag_scales[:, None]
    pieces = _sums(grads, plan.bags, plan.bag_weights, plan.piece_offsets)
    num_uniques = len(plan.unique_slots)
    sums, further = pieces[:num_uniques], pieces[num_uniques:]
    if len(further):
        order = torch.arange(len(further), dtype=torch.int32, device=grads.device)
        totals = functional.embedding_bag(
            order, further, plan.long_offsets, mode="sum", include_last_offset=True
        )
        long_uniques = plan.long_uniques.long()
        sums[long_uniques] = sums[long_uniques] + totals
    return sums


def _sums(rows: Tensor, indices: Tensor, weights: Tensor | None, offsets: Tensor) -> Tensor:
    """Sums of `rows[indices]`, times `weights` each, from one offset to the next."""
    if weights is not None:  # embedding_bag's own weights are not for this: it fuses multiply-adds
        rows = _weighted(rows.index_select(0, indices), weights)
        indices = torch.arange(len(indices), dtype=torch.int32, device=rows.device)
    return functional.embedding_bag(indices, rows, offsets, mode="sum", include_last_offset=True)


def _weighted(rows: Tensor, weights: Tensor | None) -> Tensor:
    return rows if weights is None else rows * weights[:, None]


def fill(weights: Tensor, state: Tensor, slots: Tensor, records: Tensor) -> None:
    """Puts `records` (n, record_width) into `slots` (n,)."""
    index, words = slots.long(), words_of(weights)
    words[index] = records[:, : words.shape[1]]
    state[index] = records[:, words.shape[1] :]


def read(weights: Tensor, state: Tensor, slots: Tensor) -> Tensor:
    """The records in `slots` (n,): (n, record_width)."""
    index = slots.long()
    return torch.cat([words_of(weights)[index], state[index]], dim=1)


def sum_of_squares(sums: Tensor) -> Tensor:
    """Sum of squares of each row, (U, D) to (U, 1), added up in eight lanes as on CPUs."""
    squares = functional.pad(sums * sums, (0, -sums.shape[1] % 8)).view(len(sums), -1, 8)
    lanes = torch.zeros_like(squares[:, 0])
    for part in squares.unbind(1):
        lanes = lanes + part
    lanes = lanes[:, 0::2] + lanes[:, 1::2]
    lanes = lanes[:, 0::2] + lanes[:, 1::2]
    return lanes[:, 0:1] + lanes[:, 1:2]


def _apply(
    weights: Tensor, state: Tensor, grads: Tensor, optimizer: Optimizer, rate: float
) -> tuple[Tensor, Tensor]:
    """New weights and state of the unique rows; every operand is rounded to float32 as written."""
    if optimizer.max_grad_norm is not None:
        norms = sum_of_squares(grads).sqrt()
        scales = optimizer.max_grad_norm / norms
        grads = torch.where(norms > optimizer.max_grad_norm, grads * scales, grads)
    if optimizer.decays_apart:
        weights = weights - weights * (optimizer.lr * optimizer.weight_decay)
    elif optimizer.weight_decay:
        grads = grads + weights * optimizer.weight_decay
    dim = grads.shape[1]
    match optimizer:
        case SGD():
            return weights - grads * rate, state
        case Adagrad():
            state = state + grads * grads
            return weights - (grads / (state.sqrt() + optimizer.eps)) * rate, state
        case RowWiseAdagrad():
            state = state + sum_of_squares(grads) / dim
            return weights - (grads / (state.sqrt() + optimizer.eps)) * rate, state
        case Adam():
            beta1, beta2 = optimizer.betas
            first, second = state[:, :dim], state[:, dim:]
            squares = (
                sum_of_squares(grads) / dim
                if isinstance(optimizer, PartialRowWiseAdam)
                else grads * grads
            )
            first = first + (grads - first) * (1.0 - beta1)
            second = second + (squares - second) * (1.0 - beta2)
            update = (first / (second.sqrt() + optimizer.eps)) * rate
            return weights - update, torch.cat([first, second], dim=1)
