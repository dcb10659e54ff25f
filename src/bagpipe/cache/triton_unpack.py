"""Puts the arrays of a plan that came in one piece into their places of rings.

One launch does it for all arrays. A header says where each begins, how long it is, where it goes
and what is added to its values. Programs share an array's tiles.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from bagpipe.cache.triton_launch import element_kernel, on_device_of

_BLOCK = 1024
_NUM_WARPS = 4
_MAX_PARTS = 32


def unpack(
    words: Tensor, header: Tensor, rings: Tensor, *, table: int, num_arrays: int, longest: int
) -> None:
    """Copies `num_arrays` arrays, the first as values of the second.

    The first array's values are places in the second, and what lies there is copied.

    Args:
        words: All arrays, int32.
        header: (H,) int64. From column `table` on there are `num_arrays` numbers each: where arrays
            begin in `words`, their lengths, where they begin in `rings`, and what is added.
        rings: Where the arrays go, int32.
        table: See `header`.
        num_arrays: How many arrays there are.
        longest: The length of the longest.
    """
    num_parts = min(max(1, -(-longest // _BLOCK)), _MAX_PARTS)
    with on_device_of(words):
        _unpack.launch(
            num_arrays * num_parts,
            (words, header, rings),
            {"TABLE": table, "ARRAYS": num_arrays, "BLOCK": _BLOCK},
            _NUM_WARPS,
        )


@element_kernel
def _unpack(
    words: tl.tensor,
    header: tl.tensor,
    rings: tl.tensor,
    TABLE: tl.constexpr,
    ARRAYS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    array, part = tl.program_id(0) % ARRAYS, tl.program_id(0) // ARRAYS
    num_parts = tl.num_programs(0) // ARRAYS
    numbers = header + TABLE + array
    begin, length = tl.load(numbers), tl.load(numbers + ARRAYS)
    into, added = tl.load(numbers + 2 * ARRAYS), tl.load(numbers + 3 * ARRAYS).to(tl.int32)
    values_of_first = words + tl.load(header + TABLE + 1)
    start = part * BLOCK
    while start < length:
        index = start + tl.arange(0, BLOCK)
        inside = index < length
        values = tl.load(words + begin + index, mask=inside, other=0)
        if array == 0:
            values = tl.load(values_of_first + values, mask=inside, other=0)
        tl.store(rings + into + index, values + added, mask=inside)
        start += num_parts * BLOCK
