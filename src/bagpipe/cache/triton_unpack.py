"""Puts the arrays of a plan that came in one piece into their places of rings.

One launch does it for all arrays. A header says where each begins, how long it is, where it goes
and what is added to its values. Programs share an array's tiles. They read the header right from
the host's memory: it is small, and a copy would be one more call of the driver.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import triton
import triton.language as tl
from torch import Tensor

from bagpipe.cache.triton_launch import element_kernel, on_device_of

_BLOCK = 1024
_NUM_WARPS = 4
_MAX_PARTS = 32


def unpack(
    words: Tensor,
    header: Tensor,
    into_header: Tensor,
    rings: Tensor,
    *,
    num_arrays: int,
    longest: int,
) -> None:
    """Copies `num_arrays` arrays, the first as values of the second, and the header's beginning.

    The first array's values are places in the second, and what lies there is copied.

    Args:
        words: All arrays, int32.
        header: (H,) int64 in pinned memory of the host. Behind its beginning there are `num_arrays`
            numbers each: where arrays begin in `words`, their lengths, where they begin in `rings`,
            and what is added.
        into_header: Where the header's beginning goes, (columns,) int64.
        rings: Where the arrays go, int32.
        num_arrays: How many arrays there are.
        longest: The length of the longest.
    """
    num_parts = min(max(1, -(-longest // _BLOCK)), _MAX_PARTS)
    with on_device_of(words):
        _unpack.launch(
            num_arrays * num_parts,
            (words, header.data_ptr(), into_header, rings),
            _constants(len(into_header), num_arrays),
            _NUM_WARPS,
        )


@cache
def _constants(num_columns: int, num_arrays: int) -> Mapping[str, int]:
    return {
        "COLUMNS": num_columns,
        "ROOM": triton.next_power_of_2(num_columns),
        "ARRAYS": num_arrays,
        "BLOCK": _BLOCK,
    }


@element_kernel
def _unpack(
    words: tl.tensor,
    address: tl.tensor,
    into_header: tl.tensor,
    rings: tl.tensor,
    COLUMNS: tl.constexpr,
    ROOM: tl.constexpr,
    ARRAYS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    array, part = tl.program_id(0) % ARRAYS, tl.program_id(0) // ARRAYS
    num_parts = tl.num_programs(0) // ARRAYS
    header = address.to(tl.pointer_type(tl.int64))
    if tl.program_id(0) == 0:
        column = tl.arange(0, ROOM)
        inside = column < COLUMNS
        tl.store(into_header + column, tl.load(header + column, mask=inside), mask=inside)
    numbers = header + COLUMNS + array
    begin, length = tl.load(numbers), tl.load(numbers + ARRAYS)
    into, added = tl.load(numbers + 2 * ARRAYS), tl.load(numbers + 3 * ARRAYS).to(tl.int32)
    values_of_first = words + tl.load(header + COLUMNS + 1)
    start = part * BLOCK
    while start < length:
        index = start + tl.arange(0, BLOCK)
        inside = index < length
        values = tl.load(words + begin + index, mask=inside, other=0)
        if array == 0:
            values = tl.load(values_of_first + values, mask=inside, other=0)
        tl.store(rings + into + index, values + added, mask=inside)
        start += num_parts * BLOCK
