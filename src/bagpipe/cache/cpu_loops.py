"""The loops of `kernels_cpu` over float32 weights, compiled by numba."""

from __future__ import annotations

import numpy as np

from bagpipe.native.jit import jit
from bagpipe.native.prefetch import LINE_FLOATS, prefetch
from bagpipe.native.search import first_at_least
from bagpipe.optimizers import SGD, Adagrad, Adam, RowWiseAdagrad
from bagpipe.types import Float32Array, Int32Array

_SGD, _ADAGRAD, _ROW_WISE_ADAGRAD = SGD.kind, Adagrad.kind, RowWiseAdagrad.kind
_ADAM = Adam.kind
ROWS_AHEAD, _GRADS_AHEAD = 4, 6
"""How many rows ahead of their use memory is asked for: rows of the cache, and of the gradient."""


@jit
def lookup_one_hot(
    begin: int,
    end: int,
    weights: Float32Array,
    slots: Int32Array,
    batch_size: int,
    num_features: int,
    pooled: Float32Array,
) -> None:
    """Fills the rows of samples [begin, end) of `pooled` (B * F, D)."""
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
def lookup_jagged(
    begin: int,
    end: int,
    weights: Float32Array,
    slots: Int32Array,
    bag_offsets: Int32Array,
    bag_scales: Float32Array,
    lookup_weights: Float32Array,
    batch_size: int,
    num_features: int,
    pooled: Float32Array,
) -> None:
    """As `lookup_one_hot`, for bags of any length.

    `bag_scales` is empty if all features are summed, and `lookup_weights` if all of them are 1.
    """
    dim = weights.shape[1]
    for sample in range(begin, end):
        for feature in range(num_features):
            out = sample * num_features + feature
            bag = feature * batch_size + sample
            for index in range(dim):
                pooled[out, index] = np.float32(0.0)
            for position in range(bag_offsets[bag], bag_offsets[bag + 1]):
                slot = np.uint32(slots[position])
                if len(lookup_weights) == 0:
                    for index in range(dim):
                        pooled[out, index] += weights[slot, index]
                else:
                    for index in range(dim):
                        pooled[out, index] += weights[slot, index] * lookup_weights[position]
            if len(bag_scales) > 0:
                for index in range(dim):
                    pooled[out, index] *= bag_scales[out]


@jit
def update(
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
    bag_weights: Float32Array,
    kind: int,
    constants: Float32Array,
) -> None:
    """One optimizer step of the unique rows [begin, end).

    A row's gradient is the sum of its first piece plus the sum of its further pieces, if it is
    long. `constants` are the optimizer's `UpdateConstants` as float32.
    """
    dim = weights.shape[1]
    num_uniques = len(unique_slots)
    total = np.empty(dim, np.float32)
    further, piece_sum = np.empty_like(total), np.empty_like(total)
    long = first_at_least(long_uniques, begin)
    for unique in range(begin, end):
        next_slot = unique_slots[min(unique + ROWS_AHEAD, num_uniques - 1)]
        for column in range(0, dim, LINE_FLOATS):
            prefetch(weights, next_slot, column)
        for column in range(0, state.shape[1], LINE_FLOATS):
            prefetch(state, next_slot, column)
        sum_piece(unique, grads, bags, piece_offsets, bag_scales, bag_weights, total)
        if long < len(long_uniques) and long_uniques[long] == unique:
            further[:] = np.float32(0.0)
            for piece in range(long_offsets[long], long_offsets[long + 1]):
                sum_piece(
                    num_uniques + piece,
                    grads,
                    bags,
                    piece_offsets,
                    bag_scales,
                    bag_weights,
                    piece_sum,
                )
                for index in range(dim):
                    further[index] += piece_sum[index]
            for index in range(dim):
                total[index] += further[index]
            long += 1
        apply(weights, unique_slots[unique], state, unique_slots[unique], total, kind, constants)


@jit
def sum_piece(
    piece: int,
    grads: Float32Array,
    bags: Int32Array,
    piece_offsets: Int32Array,
    bag_scales: Float32Array,
    bag_weights: Float32Array,
    total: Float32Array,
) -> None:
    """Puts the sum of a piece's gradients, added in order, into `total` (D,).

    At least one of `bag_scales` and `bag_weights` is empty.
    """
    dim = len(total)
    for index in range(dim):
        total[index] = np.float32(0.0)
    for position in range(piece_offsets[piece], piece_offsets[piece + 1]):
        next_bag = bags[min(position + _GRADS_AHEAD, len(bags) - 1)]
        for column in range(0, dim, LINE_FLOATS):
            prefetch(grads, next_bag, column)
        bag = np.uint32(bags[position])
        if len(bag_scales) == 0 and len(bag_weights) == 0:
            for index in range(dim):
                total[index] += grads[bag, index]
        else:
            scale = bag_scales[bag] if len(bag_weights) == 0 else bag_weights[position]
            for index in range(dim):
                total[index] += grads[bag, index] * scale


@jit
def _sum_of_squares(grad: Float32Array) -> np.float32:
    """The sum of a row's squares, added up in eight lanes, which the compiler can vectorize."""
    lanes = np.zeros(8, np.float32)
    whole = len(grad) // 8 * 8
    for begin in range(0, whole, 8):
        for lane in range(8):
            lanes[lane] += grad[begin + lane] * grad[begin + lane]
    for index in range(whole, len(grad)):
        lanes[index - whole] += grad[index] * grad[index]
    return np.float32(
        ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3]))
        + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]))
    )


@jit
def _mean_of_squares(grad: Float32Array) -> np.float32:
    return np.float32(_sum_of_squares(grad) / np.float32(len(grad)))


@jit
def apply(
    weights: Float32Array,
    weight_row: int,
    state: Float32Array,
    state_row: int,
    grad: Float32Array,
    kind: int,
    constants: Float32Array,
) -> None:
    """One row's optimizer step in place: the formula of its class in `bagpipe.optimizers`.

    `grad` (D,) is scratch space afterwards.
    """
    row, slot = np.uint32(weight_row), np.uint32(state_row)
    dim = len(grad)
    rate, eps, first_rate, second_rate = constants[0], constants[1], constants[2], constants[3]
    _prepare(weights, row, grad, constants[4], constants[5], constants[6])
    if kind == _SGD:
        for index in range(dim):
            weights[row, index] -= grad[index] * rate
    elif kind == _ADAGRAD:
        for index in range(dim):
            state[slot, index] += grad[index] * grad[index]
            weights[row, index] -= grad[index] / (np.sqrt(state[slot, index]) + eps) * rate
    elif kind == _ROW_WISE_ADAGRAD:
        total = state[slot, 0] + _mean_of_squares(grad)
        state[slot, 0] = total
        divisor = np.sqrt(total) + eps
        for index in range(dim):
            weights[row, index] -= grad[index] / divisor * rate
    elif kind == _ADAM:
        for index in range(dim):
            first = state[slot, index] + (grad[index] - state[slot, index]) * first_rate
            second = (
                state[slot, dim + index]
                + (grad[index] * grad[index] - state[slot, dim + index]) * second_rate
            )
            state[slot, index] = first
            state[slot, dim + index] = second
            weights[row, index] -= first / (np.sqrt(second) + eps) * rate
    else:
        total = state[slot, dim] + (_mean_of_squares(grad) - state[slot, dim]) * second_rate
        state[slot, dim] = total
        divisor = np.sqrt(total) + eps
        for index in range(dim):
            first = state[slot, index] + (grad[index] - state[slot, index]) * first_rate
            state[slot, index] = first
            weights[row, index] -= first / divisor * rate


@jit
def _prepare(
    weights: Float32Array,
    row: np.uint32,
    grad: Float32Array,
    max_grad_norm: np.float32,
    l2: np.float32,
    shrinkage: np.float32,
) -> None:
    """Clips a row's gradient and decays its weights, where that is asked for."""
    if max_grad_norm > 0:
        norm = np.sqrt(_sum_of_squares(grad))
        if norm > max_grad_norm:
            scale = max_grad_norm / norm
            for index in range(len(grad)):
                grad[index] *= scale
    if l2 > 0:
        for index in range(len(grad)):
            grad[index] += weights[row, index] * l2
    if shrinkage > 0:
        for index in range(len(grad)):
            weights[row, index] -= weights[row, index] * shrinkage


@jit
def fill(
    weights: Float32Array, state: Float32Array, slots: Int32Array, records: Float32Array
) -> None:
    """Copies packed records into slots."""
    dim = weights.shape[1]
    for index in range(len(slots)):
        next_slot = slots[min(index + ROWS_AHEAD, len(slots) - 1)]
        for column in range(0, dim, LINE_FLOATS):
            prefetch(weights, next_slot, column)
        slot = np.uint32(slots[index])
        for column in range(dim):
            weights[slot, column] = records[index, column]
        for column in range(state.shape[1]):
            state[slot, column] = records[index, dim + column]


@jit
def read(
    weights: Float32Array, state: Float32Array, slots: Int32Array, records: Float32Array
) -> None:
    """Copies slots into packed records."""
    dim = weights.shape[1]
    for index in range(len(slots)):
        next_slot = slots[min(index + ROWS_AHEAD, len(slots) - 1)]
        for column in range(0, dim, LINE_FLOATS):
            prefetch(weights, next_slot, column)
        slot = np.uint32(slots[index])
        for column in range(dim):
            records[index, column] = weights[slot, column]
        for column in range(state.shape[1]):
            records[index, dim + column] = state[slot, column]
