"""The data plane's operations on a CPU, compiled by numba.

Five operations on one group's cache, `weights` (num_slots, D), of the data type, and `state`
(num_slots, S) float32:

    lookup       gather + pool                -> (B * F, D), float32 or bfloat16
    update       sum gradients of either type along the plan's schedule, in float32, and apply the
                 optimizer to the records in place
    sum_by_row   the sums alone
    fill         records (n, D + S) into slots
    read         slots into records (n, D + S)

Torch alone would write each intermediate (summed gradients, squares, quotients) to memory and read
it back. On two cores that made backward and optimizer about twice as slow as the loops here, which
keep one row's sum in the CPU's cache (docs/results.md). The arithmetic is that of the optimizers'
formulas in `bagpipe.optimizers`, operation for operation, without fused multiply-adds.

A call splits its rows or samples into chunks, and as many threads as torch uses work them off. The
result of a row or sample does not depend on its chunk, and so not on the number of threads either.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bagpipe.cache import cpu_half, cpu_loops
from bagpipe.cache.device_plan import DevicePlan
from bagpipe.cache.weights import words_of
from bagpipe.native.workers import Workers
from bagpipe.optimizers import SGD, Optimizer
from bagpipe.store.half import CODES

_CHUNKS_A_THREAD = 4
_MIN_CHUNK = 256
"""Rows or samples; a smaller chunk is not worth handing to another thread."""


@cache
def _workers(num_threads: int) -> Workers:
    return Workers("bagpipe-kernel", num_threads)


# A forked child has none of their threads.
os.register_at_fork(after_in_child=_workers.cache_clear)


def _in_chunks(num_items: int, work: Callable[[int, int], None]) -> None:
    """Runs `work(begin, end)` over all items, on as many threads as torch uses."""
    num_threads = torch.get_num_threads()
    num_chunks = min(_CHUNKS_A_THREAD * num_threads, num_items // _MIN_CHUNK)
    if num_threads == 1 or num_chunks < 2:
        work(0, num_items)
        return
    bounds = np.linspace(0, num_items, num_chunks + 1).astype(np.int64).tolist()
    chunks = iter(pairwise(bounds))  # all threads take from it: a slow one takes fewer

    def work_off() -> None:
        for begin, end in chunks:
            work(begin, end)

    others = [_workers(num_threads - 1).submit(work_off) for _ in range(num_threads - 1)]
    work_off()
    for other in others:
        other.result()


def lookup(weights: Tensor, plan: DevicePlan, out: Tensor) -> None:
    """Pools the embeddings of a batch.

    Args:
        weights: The cache's weights, (num_slots, D) of the data type.
        plan: Which slots each bag sums.
        out: Filled by output row, (B * F, D): float32, or bfloat16 through a buffer of float32.
    """
    if out.dtype != torch.float32:
        buffer = torch.empty(out.shape)
        lookup(weights, plan, buffer)
        out.copy_(buffer)
        return
    table, code = _table(weights)
    slots, pooled = plan.lookup_slots.numpy(), out.numpy()
    sizes = plan.batch_size, plan.num_features
    offsets = _optional(plan.bag_offsets, np.int32)
    factors = _optional(plan.bag_scales, np.float32), _optional(plan.lookup_weights, np.float32)
    if weights.dtype != torch.float32:
        work = lambda begin, end: cpu_half.lookup(  # noqa: E731
            begin, end, table, code, slots, offsets, *factors, *sizes, pooled
        )
    elif plan.bag_offsets is None and plan.lookup_weights is None:
        work = lambda begin, end: cpu_loops.lookup_one_hot(  # noqa: E731
            begin, end, table, slots, *sizes, pooled
        )
    else:
        if plan.bag_offsets is None:
            offsets = np.arange(plan.num_bags + 1, dtype=np.int32)
        work = lambda begin, end: cpu_loops.lookup_jagged(  # noqa: E731
            begin, end, table, slots, offsets, *factors, *sizes, pooled
        )
    _in_chunks(plan.batch_size, work)


def sum_by_row(sums: Tensor, plan: DevicePlan, grads: Tensor, scale: float) -> None:
    """Puts sums of gradients by unique row, times `scale`, into the rows `plan.unique_slots`.

    Args:
        sums: (n, D) float32; its other rows become zeros.
        plan: The step's plan but for `unique_slots`.
        grads: As for `update`.
        scale: A factor.
    """
    sums.zero_()  # descent from zero at the rate -1 is a sum
    update(sums, sums[:, :0], plan, grads, SGD(lr=1.0), -scale)


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
    table, code = _table(weights)
    arguments = (
        table,
        state.numpy(),
        grads.float().numpy(),
        plan.unique_slots.numpy(),
        plan.bags.numpy(),
        plan.piece_offsets.numpy(),
        plan.long_uniques.numpy(),
        plan.long_offsets.numpy(),
        _optional(plan.bag_scales, np.float32),
        _optional(plan.bag_weights, np.float32),
        optimizer.kind,
        np.array(optimizer.update_constants(rate), np.float32),
    )
    if weights.dtype == torch.float32:
        _in_chunks(
            len(plan.unique_slots), lambda begin, end: cpu_loops.update(begin, end, *arguments)
        )
    else:
        rounding = code, np.uint64(seed), np.uint64(plan.step)
        _in_chunks(
            len(plan.unique_slots),
            lambda begin, end: cpu_half.update(begin, end, *arguments, *rounding),
        )


def fill(weights: Tensor, state: Tensor, slots: Tensor, records: Tensor) -> None:
    """Puts `records` (n, record_width) into `slots` (n,)."""
    cpu_loops.fill(words_of(weights).numpy(), state.numpy(), slots.numpy(), records.numpy())


def read(weights: Tensor, state: Tensor, slots: Tensor, out: Tensor | None = None) -> Tensor:
    """The records in `slots` (n,): (n, record_width), `out`, if that is given."""
    words = words_of(weights)
    records = torch.empty(len(slots), words.shape[1] + state.shape[1]) if out is None else out
    cpu_loops.read(words.numpy(), state.numpy(), slots.numpy(), records.numpy())
    return records


def _table(weights: Tensor) -> tuple[npt.NDArray[Any], int]:
    """The weights for compiled loops, 16 bits as unsigned integers, and the code of their type."""
    if weights.dtype == torch.float32:
        return weights.numpy(), CODES["fp32"]
    return weights.view(torch.int16).numpy().view(np.uint16), CODES[
        "bf16" if weights.dtype == torch.bfloat16 else "fp16"
    ]


def _optional(tensor: Tensor | None, dtype: type[np.generic]) -> npt.NDArray[Any]:
    """The tensor's array, or an empty one for None: compiled loops want one type."""
    return np.empty(0, dtype) if tensor is None else tensor.numpy()
