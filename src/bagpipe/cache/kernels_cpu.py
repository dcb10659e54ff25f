"""The data plane's operations on a CPU, compiled by numba: the same functions as `kernels_torch`, fused.

Torch alone would write each intermediate (summed gradients, squares, quotients) to memory and read it back; on two cores that
made backward and optimizer about twice as slow as the loops here, which keep one row's sum in the CPU's cache (docs/results.md).
The arithmetic is that of `kernels_torch`, operation for operation, without fused multiply-adds.

A call splits its rows or samples into chunks that torch's number of threads work off. A row's or sample's result does not depend
on the chunk that it falls into, so it does not depend on the number of threads either.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bagpipe._jit import jit
from bagpipe._prefetch import LINE_FLOATS, prefetch
from bagpipe.cache.device_plan import DevicePlan
from bagpipe.cache.kernels_torch import adam_step_size
from bagpipe.types import SGD, Adagrad, Adam, Float32Array, Int32Array, Optimizer, RowWiseAdagrad

_SGD, _ADAGRAD, _ROW_WISE_ADAGRAD, _ADAM = range(4)
_CHUNKS_A_THREAD = 4
_ROWS_AHEAD, _GRADS_AHEAD = 4, 6
"""How far ahead rows of the cache and of the gradient are asked for."""
_MIN_CHUNK = 256
"""Rows or samples below which a chunk is not worth handing to another thread."""


@cache
def _pool(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, thread_name_prefix="bagpipe-kernel")


def _in_chunks(num_items: int, work: Callable[[int, int], None]) -> None:
    """Runs `work(begin, end)` over all items, on as many threads as torch uses."""
    num_threads = torch.get_num_threads()
    num_chunks = min(_CHUNKS_A_THREAD * num_threads, num_items // _MIN_CHUNK)
    if num_threads == 1 or num_chunks < 2:
        work(0, num_items)
        return
    bounds = np.linspace(0, num_items, num_chunks + 1).astype(np.int64).tolist()
    chunks = iter(pairwise(bounds))  # all threads take from it, so that a slow one takes fewer

    def work_off() -> None:
        for begin, end in chunks:
            work(begin, end)

    others = [_pool(num_threads - 1).submit(work_off) for _ in range(num_threads - 1)]
    work_off()
    for other in others:
        other.result()


def lookup(weights: Tensor, plan: DevicePlan, out: Tensor) -> None:
    """Fills `out` (B * F, D), float32 or, through a float32 buffer, bfloat16, with the pooled embeddings by output row."""
    if out.dtype != torch.float32:
        buffer = torch.empty(out.shape)
        lookup(weights, plan, buffer)
        out.copy_(buffer)
        return
    table, slots, pooled = weights.numpy(), plan.lookup_slots.numpy(), out.numpy()
    batch_size, num_features = plan.batch_size, plan.num_features
    if plan.bag_offsets is None:
        _in_chunks(batch_size, lambda begin, end: _lookup_one_hot(begin, end, table, slots, batch_size, num_features, pooled))
        return
    offsets, scales = plan.bag_offsets.numpy(), _optional(plan.bag_scales, np.float32)
    _in_chunks(
        batch_size,
        lambda begin, end: _lookup_jagged(begin, end, table, slots, offsets, scales, batch_size, num_features, pooled),
    )


def update(weights: Tensor, state: Tensor, plan: DevicePlan, grads: Tensor, optimizer: Optimizer, lr: float) -> None:
    """Applies one optimizer step with `grads` (B * F, D), float32 or bfloat16, the gradient of `lookup`'s result."""
    kind, scalars = _constants(optimizer, lr, plan.step)
    arguments = (
        weights.numpy(),
        state.numpy(),
        grads.float().numpy(),
        plan.unique_slots.numpy(),
        plan.bags.numpy(),
        plan.piece_offsets.numpy(),
        plan.long_uniques.numpy(),
        plan.long_offsets.numpy(),
        _optional(plan.bag_scales, np.float32),
        kind,
        scalars,
    )
    _in_chunks(len(plan.unique_slots), lambda begin, end: _update(begin, end, *arguments))


def fill(weights: Tensor, state: Tensor, slots: Tensor, records: Tensor) -> None:
    """Puts `records` (n, D + S) into `slots` (n,)."""
    _fill(weights.numpy(), state.numpy(), slots.numpy(), records.numpy())


def read(weights: Tensor, state: Tensor, slots: Tensor) -> Tensor:
    """The records in `slots` (n,): (n, D + S)."""
    records = torch.empty(len(slots), weights.shape[1] + state.shape[1])
    _read(weights.numpy(), state.numpy(), slots.numpy(), records.numpy())
    return records


def _optional(tensor: Tensor | None, dtype: type[np.generic]) -> npt.NDArray[Any]:
    return np.empty(0, dtype) if tensor is None else tensor.numpy()


def _constants(optimizer: Optimizer, lr: float, step: int) -> tuple[int, Float32Array]:
    """What `_apply` needs to know: which optimizer, and its numbers rounded as torch rounds a Python scalar."""
    match optimizer:
        case SGD():
            return _SGD, np.array([lr], np.float32)
        case Adagrad():
            return _ADAGRAD, np.array([lr, optimizer.eps], np.float32)
        case RowWiseAdagrad():
            return _ROW_WISE_ADAGRAD, np.array([lr, optimizer.eps], np.float32)
        case Adam():
            beta1, beta2 = optimizer.betas
            step_size = adam_step_size(optimizer, lr, step)
            return _ADAM, np.array([step_size, optimizer.eps, 1.0 - beta1, 1.0 - beta2], np.float32)


@jit
def _lookup_one_hot(
    begin: int, end: int, weights: Float32Array, slots: Int32Array, batch_size: int, num_features: int, pooled: Float32Array
) -> None:
    dim = weights.shape[1]
    for sample in range(begin, end):
        ahead = min(sample + 1, batch_size - 1)
        for feature in range(num_features):
            next_slot = slots[feature * batch_size + ahead]
            for column in range(0, dim, LINE_FLOATS):
                prefetch(weights, next_slot, column)
            slot = np.uint32(slots[feature * batch_size + sample])
            out = sample * num_features + feature
            for index in range(dim):
                pooled[out, index] = weights[slot, index]


@jit
def _lookup_jagged(
    begin: int,
    end: int,
    weights: Float32Array,
    slots: Int32Array,
    bag_offsets: Int32Array,
    bag_scales: Float32Array,
    batch_size: int,
    num_features: int,
    pooled: Float32Array,
) -> None:
    dim = weights.shape[1]
    for sample in range(begin, end):
        for feature in range(num_features):
            out = sample * num_features + feature
            bag = feature * batch_size + sample
            for index in range(dim):
                pooled[out, index] = np.float32(0.0)
            for position in range(bag_offsets[bag], bag_offsets[bag + 1]):
                slot = np.uint32(slots[position])
                for index in range(dim):
                    pooled[out, index] += weights[slot, index]
            if len(bag_scales) > 0:
                for index in range(dim):
                    pooled[out, index] *= bag_scales[out]


@jit
def _update(
    begin: int,
    end: int,
    weights: Float32Array,
    state: Float32Array,
    grads: Float32Array,
    unique_slots: Int32Array,
    bags: Int32Array,
    piece_offsets: Int32Array,
    long_uniques: Int32Array,
    long_offsets: Int32Array,
    bag_scales: Float32Array,
    kind: int,
    scalars: Float32Array,
) -> None:
    dim = weights.shape[1]
    num_uniques = len(unique_slots)
    total = np.empty(dim, np.float32)
    further = np.empty(dim, np.float32)
    piece_sum = np.empty(dim, np.float32)
    long = np.searchsorted(long_uniques, begin)
    for unique in range(begin, end):
        next_slot = unique_slots[min(unique + _ROWS_AHEAD, num_uniques - 1)]
        for column in range(0, dim, LINE_FLOATS):
            prefetch(weights, next_slot, column)
        for column in range(0, state.shape[1], LINE_FLOATS):
            prefetch(state, next_slot, column)
        _sum_piece(unique, grads, bags, piece_offsets, bag_scales, total)
        if long < len(long_uniques) and long_uniques[long] == unique:
            further[:] = np.float32(0.0)
            for piece in range(long_offsets[long], long_offsets[long + 1]):
                _sum_piece(num_uniques + piece, grads, bags, piece_offsets, bag_scales, piece_sum)
                for index in range(dim):
                    further[index] += piece_sum[index]
            for index in range(dim):
                total[index] += further[index]
            long += 1
        _apply(weights, state, unique_slots[unique], total, kind, scalars)


@jit
def _sum_piece(
    piece: int,
    grads: Float32Array,
    bags: Int32Array,
    piece_offsets: Int32Array,
    bag_scales: Float32Array,
    total: Float32Array,
) -> None:
    dim = len(total)
    for index in range(dim):
        total[index] = np.float32(0.0)
    for position in range(piece_offsets[piece], piece_offsets[piece + 1]):
        next_bag = bags[min(position + _GRADS_AHEAD, len(bags) - 1)]
        for column in range(0, dim, LINE_FLOATS):
            prefetch(grads, next_bag, column)
        bag = np.uint32(bags[position])
        if len(bag_scales) == 0:
            for index in range(dim):
                total[index] += grads[bag, index]
        else:
            scale = bag_scales[bag]
            for index in range(dim):
                total[index] += grads[bag, index] * scale


@jit
def _mean_of_squares(grad: Float32Array) -> np.float32:
    lanes = np.zeros(8, np.float32)
    whole = len(grad) // 8 * 8
    for begin in range(0, whole, 8):
        for lane in range(8):
            lanes[lane] += grad[begin + lane] * grad[begin + lane]
    for index in range(whole, len(grad)):
        lanes[index - whole] += grad[index] * grad[index]
    total = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]))
    return np.float32(total / np.float32(len(grad)))


@jit
def _apply(weights: Float32Array, state: Float32Array, slot: int, grad: Float32Array, kind: int, scalars: Float32Array) -> None:
    """One row's optimizer step in place: `kernels_torch._apply`, element by element."""
    row = np.uint32(slot)
    dim = len(grad)
    lr = scalars[0]
    if kind == _SGD:
        for index in range(dim):
            weights[row, index] -= grad[index] * lr
    elif kind == _ADAGRAD:
        for index in range(dim):
            state[row, index] += grad[index] * grad[index]
            weights[row, index] -= grad[index] / (np.sqrt(state[row, index]) + scalars[1]) * lr
    elif kind == _ROW_WISE_ADAGRAD:
        total = state[row, 0] + _mean_of_squares(grad)
        state[row, 0] = total
        divisor = np.sqrt(total) + scalars[1]
        for index in range(dim):
            weights[row, index] -= grad[index] / divisor * lr
    else:
        for index in range(dim):
            first = state[row, index] + (grad[index] - state[row, index]) * scalars[2]
            second = state[row, dim + index] + (grad[index] * grad[index] - state[row, dim + index]) * scalars[3]
            state[row, index] = first
            state[row, dim + index] = second
            weights[row, index] -= first / (np.sqrt(second) + scalars[1]) * lr


@jit
def _fill(weights: Float32Array, state: Float32Array, slots: Int32Array, records: Float32Array) -> None:
    dim = weights.shape[1]
    for index in range(len(slots)):
        next_slot = slots[min(index + _ROWS_AHEAD, len(slots) - 1)]
        for column in range(0, dim, LINE_FLOATS):
            prefetch(weights, next_slot, column)
        slot = np.uint32(slots[index])
        for column in range(dim):
            weights[slot, column] = records[index, column]
        for column in range(state.shape[1]):
            state[slot, column] = records[index, dim + column]


@jit
def _read(weights: Float32Array, state: Float32Array, slots: Int32Array, records: Float32Array) -> None:
    dim = weights.shape[1]
    for index in range(len(slots)):
        next_slot = slots[min(index + _ROWS_AHEAD, len(slots) - 1)]
        for column in range(0, dim, LINE_FLOATS):
            prefetch(weights, next_slot, column)
        slot = np.uint32(slots[index])
        for column in range(dim):
            records[index, column] = weights[slot, column]
        for column in range(state.shape[1]):
            records[index, dim + column] = state[slot, column]
