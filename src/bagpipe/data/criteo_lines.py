"""The compiled parser of Criteo's lines.

A line is ``label \\t I1..I13 \\t C1..C26``: decimal integers, then hexadecimal ones; an empty field
is a missing value. The parser writes straight into arrays in one pass. For each line that is not
well-formed it says what is wrong and in which column, so that nothing has to be read a second time
to name the fault.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from bagpipe.data.raw import MISSING_KEY
from bagpipe.native.jit import jit
from bagpipe.types import Float32Array, Int64Array, UInt8Array

NUM_DENSE: Final = 13
NUM_SPARSE: Final = 26
NUM_COLUMNS: Final = 1 + NUM_DENSE + NUM_SPARSE
MAX_HEX_DIGITS: Final = 8

OK: Final = 0
WRONG_COLUMN_COUNT: Final = 1
BAD_LABEL: Final = 2
BAD_DENSE: Final = 3
BAD_CATEGORY: Final = 4

_MISSING = np.int64(MISSING_KEY)
_TAB: Final = 9
_RETURN: Final = 13
_MINUS: Final = 45
_ZERO: Final = 48


@jit
def parse_lines(
    text: UInt8Array,
    ends: Int64Array,
    labels: Float32Array,
    dense: Float32Array,
    keys: Int64Array,
    faults: Int64Array,
) -> None:
    """Parses lines into arrays.

    Args:
        text: The text; line i is ``text[ends[i - 1] + 1 : ends[i]]``.
        ends: (n,) where the lines end.
        labels: (n,) is filled.
        dense: (n, 13) is filled; 0 where a value is missing.
        keys: (26, n) is filled.
        faults: (n, 2) is filled with (code, column from 0), which is (OK, 0) for a good line. The
            other outputs of a faulty line are undefined.
    """
    begin = 0
    for line in range(len(ends)):
        end = ends[line]
        next_begin = end + 1
        if end > begin and text[end - 1] == _RETURN:
            end -= 1
        code, column = _parse_line(text, begin, end, line, labels, dense, keys)
        faults[line, 0] = code
        faults[line, 1] = column
        begin = next_begin


@jit
def _parse_line(
    text: UInt8Array,
    begin: int,
    end: int,
    line: int,
    labels: Float32Array,
    dense: Float32Array,
    keys: Int64Array,
) -> tuple[int, int]:
    num_columns = 1
    for position in range(begin, end):
        num_columns += text[position] == _TAB
    if num_columns != NUM_COLUMNS:
        return WRONG_COLUMN_COUNT, num_columns
    stop = begin - 1
    for column in range(NUM_COLUMNS):
        start = stop + 1
        stop = start
        while stop < end and text[stop] != _TAB:
            stop += 1
        if column == 0:
            if stop - start != 1 or text[start] < _ZERO or text[start] > _ZERO + 1:
                return BAD_LABEL, column
            labels[line] = np.float32(text[start] - _ZERO)
        elif column <= NUM_DENSE:
            good, number = _parse_integer(text, start, stop)
            if not good:
                return BAD_DENSE, column
            dense[line, column - 1] = np.float32(number)
        else:
            good, number = _parse_hex(text, start, stop)
            if not good:
                return BAD_CATEGORY, column
            keys[column - 1 - NUM_DENSE, line] = number
    return OK, 0


@jit
def _parse_integer(text: UInt8Array, start: int, stop: int) -> tuple[bool, np.int64]:
    """Decimal digits, at most 18 to fit 64 bits, after an optional minus; empty is 0."""
    number = np.int64(0)
    first = start
    if start < stop and text[start] == _MINUS:
        first += 1
        if first == stop:
            return False, number
    if stop - first > 18:
        return False, number
    for position in range(first, stop):
        digit = np.int64(text[position]) - _ZERO
        if digit < 0 or digit > 9:
            return False, number
        number = number * 10 + digit
    return True, -number if first > start else number


@jit
def _parse_hex(text: UInt8Array, start: int, stop: int) -> tuple[bool, np.int64]:
    """One to eight hexadecimal digits of either case; empty means missing."""
    if start == stop:
        return True, _MISSING
    number = np.int64(0)
    if stop - start > MAX_HEX_DIGITS:
        return False, number
    for position in range(start, stop):
        character = np.int64(text[position])
        letter = (character | 32) - 97
        if 0 <= character - _ZERO <= 9:
            number = number * 16 + character - _ZERO
        elif 0 <= letter <= 5:
            number = number * 16 + letter + 10
        else:
            return False, number
    return True, number
