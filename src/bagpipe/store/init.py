"""Initial records from a counter-based generator: (seed, group, row) alone decides them.

The order of events does not matter. Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random
numbers: as easy as 1, 2, 3", SC 2011), with the seed as its key and (row, group, block) as its
counter, gives four 32-bit numbers a block, one for each weight. The group's index is part of the
counter because all groups of a model get the same seed, and row 7 of two groups must not start
alike. Nothing is stored: an untouched row is computed when it is read, so creating a table of any
size costs nothing.

Cost, on one core: 1.4 ns for a Uniform float32 weight, 19 ns for a Normal one. Uniform weights are
the same on every machine. Normal ones go through the C library's log, sin and cos in float64, whose
last bit may differ between machines and, rarely, change the float32. A weight of 16 bits is the
float32 one rounded to the nearest, so a Uniform's may lie half a place outside of [low, high).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bagpipe.native.jit import inline_jit, jit
from bagpipe.native.search import first_at_least
from bagpipe.optimizers import Adagrad, RowWiseAdagrad
from bagpipe.store.half import CODES, FP32, nearest
from bagpipe.types import (
    BoolArray,
    Float32Array,
    Group,
    Initializer,
    Int64Array,
    Normal,
    UInt64Array,
)

Float64Array = npt.NDArray[np.float64]
UInt32Array = npt.NDArray[np.uint32]

_TILE_BLOCKS = 64
"""Blocks drawn at a time: enough for vector instructions, few enough for the first-level cache."""


class Parameters(NamedTuple):
    """What the compiled loop needs to know of a group."""

    row_offsets: Int64Array  # (num_tables + 1,)
    is_normal: BoolArray  # (num_tables,)
    affine: Float64Array  # (num_tables, 2) shift and scale
    limits: Float32Array  # (num_tables, 2) least and greatest
    dim: int
    weight_words: int
    data_type: int
    seed: np.uint64
    stream: np.uint64
    state: np.float32


class RowInitializer:
    """Computes the initial records of one group's rows.

    A record is weights drawn from its table's distribution and the optimizer's initial state.

    Args:
        group: the group whose records these are.
        seed: any integer; its lower 64 bits are the generator's key.
    """

    def __init__(self, group: Group, seed: int) -> None:
        initializers = [table.initializer for table in group.tables]
        optimizer = group.optimizer
        state = (
            optimizer.initial_accumulator_value
            if isinstance(optimizer, Adagrad | RowWiseAdagrad)
            else 0.0
        )
        self.parameters = Parameters(
            group.row_offsets,
            np.array([isinstance(initializer, Normal) for initializer in initializers], np.bool_),
            np.array([_affine(initializer) for initializer in initializers], np.float64),
            np.array([_limits(initializer) for initializer in initializers], np.float32),
            group.embedding_dim,
            group.weight_words,
            CODES[group.data_type],
            np.uint64(seed % 2**64),
            np.uint64(group.index << 32),
            np.float32(state),
        )

    def fill(self, rows: Int64Array, out: Float32Array) -> None:
        """Writes the initial records of `rows` to `out`.

        Args:
            rows: (n,) int64, in range: this is not checked.
            out: (n, record_width) float32.
        """
        fill_part(rows, np.ones(len(rows), np.bool_), self.parameters, out)


def _affine(initializer: Initializer) -> tuple[float, float]:
    """(shift, scale) from a draw of [0, 1) or of the standard normal distribution to a weight."""
    if isinstance(initializer, Normal):
        return initializer.mean, initializer.std
    return initializer.low, initializer.high - initializer.low


def _limits(initializer: Initializer) -> tuple[np.float32, np.float32]:
    """Least and greatest float32 that the distribution may give.

    Rounding must not leave [low, high). Where that holds no float32, both are the one nearest to
    low.
    """
    if isinstance(initializer, Normal):
        return np.float32(-np.inf), np.float32(np.inf)
    least, beyond = np.float32(initializer.low), np.float32(initializer.high)
    if float(least) < initializer.low:
        least = np.nextafter(least, np.float32(np.inf))
    if float(beyond) >= initializer.high:
        beyond = np.nextafter(beyond, np.float32(-np.inf))
    if least <= beyond:
        return least, beyond
    return np.float32(initializer.low), np.float32(initializer.low)


@inline_jit
def philox(
    key: np.uint64, low: np.uint64, high: np.uint64
) -> tuple[np.uint64, np.uint64, np.uint64, np.uint64]:
    """Philox4x32-10 of the counter (low, high) under a 64-bit key: four numbers below 2**32."""
    mask = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    c0, c1, c2, c3 = low & mask, low >> half, high & mask, high >> half
    k0, k1 = key & mask, key >> half
    for _ in range(10):
        product0 = np.uint64(0xD2511F53) * c0
        product1 = np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (product1 >> half) ^ c1 ^ k0,
            product1 & mask,
            (product0 >> half) ^ c3 ^ k1,
            product0 & mask,
        )
        k0 = (k0 + np.uint64(0x9E3779B9)) & mask
        k1 = (k1 + np.uint64(0xBB67AE85)) & mask
    return c0, c1, c2, c3


@jit
def fill_part(
    rows: Int64Array, wanted: BoolArray, parameters: Parameters, out: Float32Array
) -> None:
    """Writes the initial records of the rows where `wanted` holds to `out`.

    Args:
        rows: (n,) int64, in range: this is not checked.
        wanted: (n,) bool.
        parameters: the group's, see `RowInitializer.parameters`.
        out: (n, record_width) float32; records of other rows are left as they are.
    """
    num_blocks = -(-parameters.dim // 4)
    indices = np.empty(max(1, _TILE_BLOCKS // num_blocks), np.int64)
    lows = np.empty(len(indices) * num_blocks, np.uint64)
    highs = np.empty(len(indices) * num_blocks, np.uint64)
    lanes = np.empty((4, len(lows)), np.uint32)
    numbers = np.empty((len(indices), 4 * num_blocks), np.uint32)
    num_rows = 0
    for index in range(len(rows)):
        if wanted[index]:
            indices[num_rows] = index
            for block in range(num_blocks):
                lows[num_rows * num_blocks + block] = np.uint64(rows[index])
                highs[num_rows * num_blocks + block] = parameters.stream | np.uint64(block)
            num_rows += 1
        if num_rows == len(indices) or index == len(rows) - 1:
            _draw(parameters.seed, lows[: num_rows * num_blocks], highs, lanes, numbers.reshape(-1))
            _fill_tile(rows, indices[:num_rows], parameters, numbers, out)
            num_rows = 0


@jit
def _draw(
    seed: np.uint64, lows: UInt64Array, highs: UInt64Array, lanes: UInt32Array, numbers: UInt32Array
) -> None:
    """Writes the four numbers of each counter (n,) to `numbers` (4 * n,).

    They go by way of `lanes` (4, n), so that vector instructions draw them.
    """
    first, second, third, fourth = lanes[0], lanes[1], lanes[2], lanes[3]
    for place in range(len(lows)):
        drawn = philox(seed, lows[place], highs[place])
        first[place], second[place] = np.uint32(drawn[0]), np.uint32(drawn[1])
        third[place], fourth[place] = np.uint32(drawn[2]), np.uint32(drawn[3])
    for place in range(len(lows)):
        numbers[4 * place], numbers[4 * place + 1] = first[place], second[place]
        numbers[4 * place + 2], numbers[4 * place + 3] = third[place], fourth[place]


@jit
def _fill_tile(
    rows: Int64Array,
    indices: Int64Array,
    parameters: Parameters,
    numbers: UInt32Array,
    out: Float32Array,
) -> None:
    """Writes the records of rows[indices], each from one row of `numbers`.

    A row of `numbers` has as many as a record has weights, or a few more.
    """
    dim, data_type = parameters.dim, parameters.data_type
    weight_words, state = parameters.weight_words, parameters.state
    # Taken out of the loop: each access to an array of a tuple counts a reference.
    offsets, is_normal = parameters.row_offsets, parameters.is_normal
    affine, limits = parameters.affine, parameters.limits
    for place in range(len(indices)):
        index = indices[place]
        table = first_at_least(offsets, rows[index] + 1) - 1
        shift, scale = affine[table, 0], affine[table, 1]
        least, greatest = limits[table, 0], limits[table, 1]
        if data_type == FP32 and not is_normal[table]:
            for column in range(dim):
                out[index, column] = _weight(
                    _unit(numbers[place, column]), shift, scale, least, greatest
                )
        else:
            draws = _normal(numbers[place]) if is_normal[table] else _units(numbers[place])
            _fill_weights(
                draws[:dim], (shift, scale), (least, greatest), data_type, out[index, :weight_words]
            )
        for column in range(weight_words, out.shape[1]):
            out[index, column] = state


@jit
def _fill_weights(
    draws: Float64Array,
    affine: tuple[float, float],
    limits: tuple[np.float32, np.float32],
    data_type: int,
    weights: Float32Array,
) -> None:
    if data_type == FP32:
        for column in range(len(draws)):
            weights[column] = _weight(draws[column], affine[0], affine[1], limits[0], limits[1])
    else:
        words = weights.view(np.uint32)
        words[:] = 0  # also the half word that pads an odd dimension
        for column in range(len(draws)):
            value = _weight(draws[column], affine[0], affine[1], limits[0], limits[1])
            words[column // 2] |= np.uint32(nearest(value, data_type) << (16 * (column % 2)))


@inline_jit
def _weight(
    draw: float, shift: float, scale: float, least: np.float32, greatest: np.float32
) -> np.float32:
    return min(max(np.float32(shift + scale * draw), least), greatest)


@inline_jit
def _unit(number: np.uint32) -> float:
    """A number of [0, 1) from the upper 24 bits, which is all that a float32 holds.

    By way of int32, since processors convert signed numbers with vector instructions.
    """
    return np.float64(np.int32(number >> np.uint32(8))) / 16777216.0


@jit
def _units(numbers: UInt32Array) -> Float64Array:
    draws = np.empty(len(numbers), np.float64)
    for place in range(len(numbers)):
        draws[place] = _unit(numbers[place])
    return draws


@jit
def _normal(numbers: UInt32Array) -> Float64Array:
    """As many standard normal numbers as uniform ones are given, an even number of them.

    After Box and Muller, "A note on the generation of random normal deviates" (1958).
    """
    draws = np.empty(len(numbers), np.float64)
    for pair in range(0, len(numbers), 2):
        radius = math.sqrt(-2.0 * math.log((np.float64(numbers[pair]) + 1.0) / 4294967296.0))
        angle = 2.0 * math.pi * np.float64(numbers[pair + 1]) / 4294967296.0
        draws[pair] = radius * math.cos(angle)
        draws[pair + 1] = radius * math.sin(angle)
    return draws
