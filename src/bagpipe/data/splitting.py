"""Which rows are held out for validation.

They are the last ones by time, or a share by a hash of the row number. Every rule is a pure
function of a row's number and time. The cut by a time column is exact and takes bounded memory: it
passes over that column four times, and each pass finds 16 more bits of the value at the cut (a
radix selection).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from bagpipe.data.hashing import hashed_units
from bagpipe.data.raw import RawBlock, RawSource
from bagpipe.types import BoolArray, Int64Array

if TYPE_CHECKING:
    from bagpipe.config.data import SplitConfig

_DIGIT_BITS: Final = 16
_SIGN: Final = np.uint64(1 << 63)


class Splitter(Protocol):
    """Tells validation rows from training rows."""

    def is_validation(self, block: RawBlock) -> BoolArray:
        """Whether each row of the block (n,) is held out."""


class ByShare:
    """A fixed share of the row numbers, chosen by hash."""

    def __init__(self, share: float, seed: int) -> None:
        self._share, self._seed = share, seed

    def is_validation(self, block: RawBlock) -> BoolArray:
        """Whether each row of the block (n,) is held out."""
        return hashed_units(block.rows, self._seed) < self._share


class ByRow:
    """The rows from number `first` on."""

    def __init__(self, first: int) -> None:
        self._first = first

    def is_validation(self, block: RawBlock) -> BoolArray:
        """Whether each row of the block (n,) is held out."""
        return block.rows >= self._first


class ByTime:
    """The rows of time `first` and later; rows of the same time stay together."""

    def __init__(self, first: int) -> None:
        self._first = first

    def is_validation(self, block: RawBlock) -> BoolArray:
        """Whether each row of the block (n,) is held out."""
        assert block.times is not None
        return block.times >= self._first


def make_splitter(config: SplitConfig, source: RawSource) -> Splitter:
    """The splitter that the configuration asks for.

    For a split by time it reads the source's time column, or counts its rows.
    """
    if config.by == "share" or config.validation_share == 0.0:
        return ByShare(config.validation_share, config.seed)
    if not source.has_time:
        return ByRow(_first_held_out(source.num_rows(), config.validation_share))
    num_times = sum(len(block) for block in source.times())
    if num_times == 0:
        return ByRow(0)  # every row will be refused for its missing time
    rank = min(_first_held_out(num_times, config.validation_share), num_times - 1)
    return ByTime(nth_smallest(source.times, rank))


def nth_smallest(blocks: Callable[[], Iterable[Int64Array]], rank: int) -> int:
    """The value that has exactly `rank` values before it in ascending order.

    Args:
        blocks: Returns the values in blocks; it is called four times.
        rank: A number from 0 to below the number of values.
    """
    prefix = 0
    for shift in range(64 - _DIGIT_BITS, -1, -_DIGIT_BITS):
        counts = np.zeros(1 << _DIGIT_BITS, np.int64)
        for block in blocks():
            unsigned = block.view(np.uint64) ^ _SIGN  # sorts as the signed numbers do
            above = unsigned >> np.uint64(shift)
            digits = above[(above >> np.uint64(_DIGIT_BITS)) == np.uint64(prefix)] & np.uint64(
                (1 << _DIGIT_BITS) - 1
            )
            counts += np.bincount(digits.astype(np.int64), minlength=1 << _DIGIT_BITS)
        below = np.cumsum(counts)
        digit = int(np.searchsorted(below, rank, side="right"))
        rank -= int(below[digit - 1]) if digit else 0
        prefix = (prefix << _DIGIT_BITS) | digit
    return prefix - (1 << 63)


def _first_held_out(num_rows: int, share: float) -> int:
    return num_rows - round(num_rows * share)
