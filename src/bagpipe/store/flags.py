"""The flags of rows that cuts go by, one byte a row, and the loops over them."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from bagpipe.native.jit import jit
from bagpipe.store.array import TOUCHED
from bagpipe.types import Int64Array, UInt8Array

SINCE_BASE, SINCE_CUT = 2, 4
"""Bits of a row's flag: written since the base; written since the cut in hand began."""
DUE = 8
"""What the flag of a row that is being put back is, until its record is found."""
_FOLD_ROWS = 4096
"""Flags looked at together; where none is set, their memory is not taken."""


@lru_cache(maxsize=1)
def load_code() -> None:
    """Has all loops compiled: else the first cut of a machine would hold writes up for seconds."""
    flags = np.zeros(1, np.uint8)
    count(flags)
    next_rows(flags, 0, SINCE_BASE, 1)
    fold(flags, TOUCHED)
    mark_due(flags)


@jit
def count(flags: UInt8Array) -> tuple[int, int]:
    """How many rows were ever written, and how many since the base, the cut in hand included."""
    num_touched = num_since = 0
    for flag in flags:
        num_touched += flag & 1
        num_since += ((flag >> 1) | (flag >> 2)) & 1
    return num_touched, num_since


@jit
def next_rows(flags: UInt8Array, begin: int, bit: int, most_rows: int) -> tuple[Int64Array, int]:
    """Up to so many rows from `begin` on whose flag has `bit` and not `SINCE_CUT`.

    Returns:
        The rows, ascending, and the row after the last that was looked at.
    """
    rows = np.empty(most_rows, np.int64)
    num_found, row = 0, begin
    while row < len(flags) and num_found < most_rows:
        if flags[row] & (bit | SINCE_CUT) == bit:
            rows[num_found] = row
            num_found += 1
        row += 1
    return rows[:num_found].copy(), row


@jit
def fold(flags: UInt8Array, kept: int) -> None:
    """Keeps some bits, and makes of written since the cut: written since the base."""
    for begin in range(0, len(flags), _FOLD_ROWS):
        block = flags[begin : begin + _FOLD_ROWS]
        any_set = np.uint8(0)
        for flag in block:
            any_set |= flag
        if any_set & ~TOUCHED:
            for index in range(len(block)):
                since = np.uint8((block[index] & SINCE_CUT) >> 1)
                block[index] = np.uint8(block[index] & kept) | since


@jit
def mark_due(flags: UInt8Array) -> int:
    """Makes the flag of rows written since the base `DUE`; returns how many there are."""
    num_due = 0
    for index in range(len(flags)):
        if flags[index] & SINCE_BASE:
            flags[index] = DUE
            num_due += 1
    return num_due
