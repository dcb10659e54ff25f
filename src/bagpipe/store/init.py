"""Initial records from a counter-based generator: (seed, group, row) decides them, no order of events.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with the seed as its key and
(row, group and block) as its counter gives four 32-bit numbers a block, one for each weight. The group's index is part of it since
all groups of a model get the same seed: row 7 of two groups must not start alike. Nothing is stored: an untouched row is computed
when it is read, so creating a table of any size costs nothing.

Cost, on one core: about 7 ns a Uniform weight, 32 ns a Normal one. Uniform weights are the same on every machine; Normal ones go
through the C library's log, sin and cos in float64, whose last bit may differ between machines and then, rarely, the float32's.
Weights of 16 bits are these, rounded to the nearest: a Uniform's may lie half a place outside of [low, high).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bagpipe._jit import jit
from bagpipe.store.half import CODES, FP32, nearest
from bagpipe.types import Adagrad, Float32Array, Group, Initializer, Int64Array, Normal, RowWiseAdagrad

Float64Array = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


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
    """Computes the initial records of one group's rows: weights by its table's distribution, then the optimizer's initial state."""

    def __init__(self, group: Group, seed: int) -> None:
        initializers = [table.initializer for table in group.tables]
        optimizer = group.optimizer
        state = optimizer.initial_accumulator_value if isinstance(optimizer, Adagrad | RowWiseAdagrad) else 0.0
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
        """Writes the initial records of `rows` (n,), which must be in range, to `out` (n, record_width)."""
        fill_part(rows, np.ones(len(rows), np.bool_), self.parameters, out)


def _affine(initializer: Initializer) -> tuple[float, float]:
    """(shift, scale) from a draw of [0, 1) or of the standard normal distribution to a weight."""
    if isinstance(initializer, Normal):
        return initializer.mean, initializer.std
    return initializer.low, initializer.high - initializer.low


def _limits(initializer: Initializer) -> tuple[np.float32, np.float32]:
    """Least and greatest float32 that the distribution may give: rounding must not leave [low, high).

    Where [low, high) holds no float32, the one nearest to low.
    """
    if isinstance(initializer, Normal):
        return np.float32(-np.inf), np.float32(np.inf)
    least, beyond = np.float32(initializer.low), np.float32(initializer.high)
    if float(least) < initializer.low:
        least = np.nextafter(least, np.float32(np.inf))
    if float(beyond) >= initializer.high:
        beyond = np.nextafter(beyond, np.float32(-np.inf))
    return (least, beyond) if least <= beyond else (np.float32(initializer.low), np.float32(initializer.low))


@jit
def philox(key: np.uint64, low: np.uint64, high: np.uint64) -> tuple[np.uint64, np.uint64, np.uint64, np.uint64]:
    """Philox4x32-10 of the 128-bit counter (low, high) under a 64-bit key: four numbers below 2**32."""
    mask = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    c0, c1, c2, c3 = low & mask, low >> half, high & mask, high >> half
    k0, k1 = key & mask, key >> half
    for _ in range(10):
        product0 = np.uint64(0xD2511F53) * c0
        product1 = np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (product1 >> half) ^ c1 ^ k0, product1 & mask, (product0 >> half) ^ c3 ^ k1, product0 & mask
        k0 = (k0 + np.uint64(0x9E3779B9)) & mask
        k1 = (k1 + np.uint64(0xBB67AE85)) & mask
    return c0, c1, c2, c3


@jit
def fill_part(rows: Int64Array, wanted: BoolArray, parameters: Parameters, out: Float32Array) -> None:
    """Writes the initial records of those rows (n,) where `wanted` (n,) holds to `out` (n, record_width)."""
    dim, data_type = parameters.dim, parameters.data_type
    draws = np.empty(4, np.float64)
    words = out.view(np.uint32)
    for index in range(len(rows)):
        if not wanted[index]:
            continue
        table = np.searchsorted(parameters.row_offsets, rows[index], side="right") - 1
        shift, scale = parameters.affine[table]
        least, greatest = parameters.limits[table]
        for begin in range(0, dim, 4):
            numbers = philox(parameters.seed, np.uint64(rows[index]), parameters.stream | np.uint64(begin // 4))
            if parameters.is_normal[table]:
                _normal(numbers, draws)
            else:
                _unit(numbers, draws)
            for lane in range(min(4, dim - begin)):
                value = min(max(np.float32(shift + scale * draws[lane]), least), greatest)
                if data_type == FP32:
                    out[index, begin + lane] = value
                else:
                    word, place = (begin + lane) // 2, (begin + lane) % 2
                    others = words[index, word] if place else np.uint32(0)  # also what pads an odd dimension
                    words[index, word] = others | np.uint32(nearest(value, data_type) << (16 * place))
        for column in range(parameters.weight_words, out.shape[1]):
            out[index, column] = parameters.state


@jit
def _unit(numbers: tuple[np.uint64, np.uint64, np.uint64, np.uint64], draws: Float64Array) -> None:
    """Four numbers of [0, 1) from the upper 24 bits of each, which is all that a float32 holds."""
    for lane in range(4):
        draws[lane] = np.float64(numbers[lane] >> np.uint64(8)) / 16777216.0


@jit
def _normal(numbers: tuple[np.uint64, np.uint64, np.uint64, np.uint64], draws: Float64Array) -> None:
    """Four standard normal numbers from four uniform ones (Box and Muller 1958)."""
    for pair in range(0, 4, 2):
        radius = math.sqrt(-2.0 * math.log((np.float64(numbers[pair]) + 1.0) / 4294967296.0))
        angle = 2.0 * math.pi * np.float64(numbers[pair + 1]) / 4294967296.0
        draws[pair] = radius * math.cos(angle)
        draws[pair + 1] = radius * math.sin(angle)
