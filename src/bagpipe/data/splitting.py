"""Which rows are held out for validation, and for a test.

They are the last ones by time, those of the test behind the others, or a share by a hash of the row
number. Every rule is a pure function of a row's number and time. The cut by a time column is exact
and takes bounded memory: it passes over that column four times, and each pass finds 16 more bits of
the value at the cut (a radix selection).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from bagpipe.data.base import Split
from bagpipe.data.hashing import hashed_units
from bagpipe.data.raw import RawBlock, RawSource
from bagpipe.types import Int64Array, UInt8Array

if TYPE_CHECKING:
    from bagpipe.config.data import SplitConfig

_DIGIT_BITS: Final = 16
_SIGN: Final = np.uint64(1 << 63)


SPLITS: Final[tuple[Split, ...]] = ("train", "validation", "test")


class Splitter(Protocol):
    """Tells which split each row belongs to."""

    def split_of(self, block: RawBlock) -> UInt8Array:
        """The split of each row of the block (n,): its place in `SPLITS`."""


class ByShare:
    """Fixed shares of the row numbers, chosen by hash."""

    def __init__(self, validation: float, test: float, seed: int) -> None:
        self._validation, self._test, self._seed = validation, test, seed

    def split_of(self, block: RawBlock) -> UInt8Array:
        """See `Splitter`."""
        units = hashed_units(block.rows, self._seed)
        return np.where(
            units < self._validation, 1, np.where(units < self._validation + self._test, 2, 0)
        ).astype(np.uint8)


class ByRow:
    """Validation has the rows from number `validation` on, and the test those from `test` on."""

    def __init__(self, validation: int, test: int) -> None:
        self._validation, self._test = validation, test

    def split_of(self, block: RawBlock) -> UInt8Array:
        """See `Splitter`."""
        return _after(block.rows, self._validation, self._test)


class ByTime:
    """As `ByRow` by time; rows of the same time stay together. No `test`: there is none."""

    def __init__(self, validation: int, test: int | None) -> None:
        self._validation, self._test = validation, test

    def split_of(self, block: RawBlock) -> UInt8Array:
        """See `Splitter`."""
        assert block.times is not None
        return _after(block.times, self._validation, self._test)


def _after(numbers: Int64Array, validation: int, test: int | None) -> UInt8Array:
    held_out = (numbers >= validation).astype(np.uint8)
    return held_out if test is None else np.where(numbers >= test, np.uint8(2), held_out)


def make_splitter(config: SplitConfig, source: RawSource) -> Splitter:
    """The splitter that the configuration asks for.

    For a split by time it reads the source's time column, or counts its rows.
    """
    held_out = config.validation_share + config.test_share
    if config.by == "share" or held_out == 0.0:
        return ByShare(config.validation_share, config.test_share, config.seed)
    if not source.has_time:
        num_rows = source.num_rows()
        return ByRow(
            _first_held_out(num_rows, held_out), _first_held_out(num_rows, config.test_share)
        )
    num_times = sum(len(block) for block in source.times())
    if num_times == 0:
        return ByRow(0, 0)  # every row will be refused for its missing time

    def first(share: float) -> int:
        return nth_smallest(source.times, min(_first_held_out(num_times, share), num_times - 1))

    return ByTime(first(held_out), first(config.test_share) if config.test_share else None)


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
