"""Initial records from a counter-based generator: a row's weights depend on (seed, row) alone, never on the order of events.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with the seed as its key and
(row, block) as its counter gives four 32-bit numbers a block, one for each weight. Nothing is stored: an untouched row is computed
when it is read, at about 5 ns a weight, so creating a table of any size costs nothing.
"""

from __future__ import annotations

import math

import numpy as np

from bagpipe._jit import jit
from bagpipe.types import Adagrad, Float32Array, Group, Int64Array, Normal, RowWiseAdagrad

_UNIFORM, _NORMAL = 0, 1


class RowInitializer:
    """Computes the initial records of one group's rows."""

    def __init__(self, group: Group, seed: int) -> None:
        self._row_offsets = group.row_offsets
        self._kinds = np.array([isinstance(table.initializer, Normal) for table in group.tables], np.int64)
        self._parameters = np.array([_parameters(table.initializer) for table in group.tables], np.float64)  # (tables, 2)
        self._dim = group.embedding_dim
        self._seed = np.uint64(seed % 2**64)
        optimizer = group.optimizer
        self._state = np.float32(optimizer.initial_accumulator_value if isinstance(optimizer, Adagrad | RowWiseAdagrad) else 0.0)

    def fill(self, rows: Int64Array, out: Float32Array) -> None:
        """Writes the initial records of `rows` (n,), which must be in range, to `out` (n, record_width)."""
        self.fill_where(rows, np.ones(len(rows), np.bool_), out)

    def fill_where(self, rows: Int64Array, wanted: np.ndarray[tuple[int], np.dtype[np.bool_]], out: Float32Array) -> None:
        """As `fill`, for those rows where `wanted` (n,) holds; other entries of `out` stay."""
        _fill(rows, wanted, self._row_offsets, self._kinds, self._parameters, self._dim, self._seed, self._state, out)


def _parameters(initializer: object) -> tuple[float, float]:
    """(low, high) or (mean, std)."""
    first, second = vars(initializer).values()
    return float(first), float(second)


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
def _fill(
    rows: Int64Array,
    wanted: np.ndarray[tuple[int], np.dtype[np.bool_]],
    row_offsets: Int64Array,
    kinds: Int64Array,
    parameters: np.ndarray[tuple[int, int], np.dtype[np.float64]],
    dim: int,
    seed: np.uint64,
    state: np.float32,
    out: Float32Array,
) -> None:
    draws = np.empty(4, np.float64)
    for index in range(len(rows)):
        if not wanted[index]:
            continue
        row = rows[index]
        table = np.searchsorted(row_offsets, row, side="right") - 1
        first, second = parameters[table]
        for begin in range(0, dim, 4):
            numbers = philox(seed, np.uint64(row), np.uint64(begin // 4))
            if kinds[table] == _NORMAL:
                _normal(numbers, draws)
                for lane in range(min(4, dim - begin)):
                    out[index, begin + lane] = first + second * draws[lane]
            else:
                for lane in range(min(4, dim - begin)):
                    # 24 bits: every fraction is a float32 below 1, and rounding to float32 can't reach `high` but by one case.
                    fraction = np.float64(numbers[lane] >> np.uint64(8)) / 16777216.0
                    value = np.float32(first + (second - first) * fraction)
                    out[index, begin + lane] = value if value < second or first == second else np.float32(first)
        for column in range(dim, out.shape[1]):
            out[index, column] = state


@jit
def _normal(
    numbers: tuple[np.uint64, np.uint64, np.uint64, np.uint64], draws: np.ndarray[tuple[int], np.dtype[np.float64]]
) -> None:
    """Four standard normal numbers from four uniform ones (Box and Muller 1958)."""
    for pair in range(0, 4, 2):
        radius = math.sqrt(-2.0 * math.log((np.float64(numbers[pair]) + 1.0) / 4294967296.0))
        angle = 2.0 * math.pi * np.float64(numbers[pair + 1]) / 4294967296.0
        draws[pair] = radius * math.cos(angle)
        draws[pair + 1] = radius * math.sin(angle)
