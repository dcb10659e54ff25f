"""The loops of `kernels_cpu` over weights of 16 bits, compiled by numba.

Weights are widened to float32 as they are read, and rounded by chance as they are written. On CPUs
16 bits save memory, not time: a weight costs some ten instructions more, and its random bits about
ten again. `update` repeats the sums of `cpu_loops.update`: in a function of their own, which takes
a dozen arrays, they would make a step a fifth slower.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from bagpipe.cache.cpu_loops import ROWS_AHEAD, apply, sum_piece
from bagpipe.cache.weights import COLUMNS_A_BLOCK, ROUNDING
from bagpipe.native.jit import jit
from bagpipe.native.prefetch import LINE_FLOATS, prefetch
from bagpipe.native.search import first_at_least
from bagpipe.store.half import by_chance, widen
from bagpipe.store.init import philox
from bagpipe.types import Float32Array, Int32Array

UInt16Array: TypeAlias = npt.NDArray[np.uint16]

_LINE_HALVES = 2 * LINE_FLOATS


@jit
def lookup(
    begin: int,
    end: int,
    weights: UInt16Array,
    code: int,
    slots: Int32Array,
    bag_offsets: Int32Array,
    bag_scales: Float32Array,
    lookup_weights: Float32Array,
    batch_size: int,
    num_features: int,
    pooled: Float32Array,
) -> None:
    """Fills the rows of samples [begin, end) of `pooled` (B * F, D).

    `bag_offsets` is empty if each bag has one id, `bag_scales` if all features are summed, and
    `lookup_weights` if all of them are 1.
    """
    dim = pooled.shape[1]
    for sample in range(begin, end):
        for feature in range(num_features):
            out, bag = sample * num_features + feature, feature * batch_size + sample
            first, last = (
                (bag, bag + 1)
                if len(bag_offsets) == 0
                else (bag_offsets[bag], bag_offsets[bag + 1])
            )
            pooled[out, :] = np.float32(0.0)
            for position in range(first, last):
                slot = np.uint32(slots[position])
                weight = np.float32(1.0) if len(lookup_weights) == 0 else lookup_weights[position]
                for column in range(dim):
                    pooled[out, column] += widen(np.uint32(weights[slot, column]), code) * weight
            if len(bag_scales) > 0:
                for column in range(dim):
                    pooled[out, column] *= bag_scales[out]


@jit
def update(
    begin: int,
    end: int,
    weights: UInt16Array,
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
    code: int,
    seed: np.uint64,
    step: np.uint64,
) -> None:
    """One optimizer step of the unique rows [begin, end); see `cpu_loops.update`."""
    dim = grads.shape[1]
    num_uniques = len(unique_slots)
    total = np.empty(dim, np.float32)
    further, piece_sum = np.empty_like(total), np.empty_like(total)
    row = np.empty((1, dim), np.float32)
    long = first_at_least(long_uniques, begin)
    for unique in range(begin, end):
        next_slot = unique_slots[min(unique + ROWS_AHEAD, num_uniques - 1)]
        for column in range(0, dim, _LINE_HALVES):
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
        slot = unique_slots[unique]
        for column in range(dim):
            row[0, column] = widen(np.uint32(weights[np.uint32(slot), column]), code)
        apply(row, 0, state, slot, total, kind, constants)
        _write_back(weights, slot, row, code, seed, np.uint64(unique) | step << np.uint64(32))


@jit
def _write_back(
    weights: UInt16Array,
    slot: int,
    row: Float32Array,
    code: int,
    seed: np.uint64,
    counter: np.uint64,
) -> None:
    """Rounds `row` (1, D) into a slot; `counter` is the lower half of its blocks' counters."""
    dim = row.shape[1]
    for begin in range(0, dim, COLUMNS_A_BLOCK):
        words = philox(
            seed, counter, np.uint64(begin // COLUMNS_A_BLOCK) | np.uint64(ROUNDING << 32)
        )
        for lane in range(min(COLUMNS_A_BLOCK, dim - begin)):
            chance = np.int64(words[lane // 2] >> np.uint64(16 * (lane % 2))) & 0xFFFF
            weights[np.uint32(slot), begin + lane] = np.uint16(
                by_chance(row[0, begin + lane], chance, code)
            )
