"""Copies of memory from compiled code: numba's own, of an array's slice to another's, take several
times as long on some CPUs.
"""

from __future__ import annotations

from typing import Any

import numba.core.cgutils
import numpy.typing as npt
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

from bagpipe.native.jit import NUM_PARTS, jit, parallel_jit, prange, threaded
from bagpipe.types import Int64Array

_cgutils: Any = numba.core.cgutils  # only a part of numba is typed


def _copy_bytes_types(typing_context: Any, target: Any, source: Any, num_bytes: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = ir.IntType(8).as_pointer()
        to, of = (builder.inttoptr(value, pointer) for value in arguments[:2])
        _cgutils.raw_memcpy(builder, to, of, arguments[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


_copy_bytes: Any = intrinsic(_copy_bytes_types)


@jit
def copy_run(source: npt.NDArray[Any], target: npt.NDArray[Any]) -> None:
    """Copies all of `source` to the beginning of `target`: contiguous arrays of one type and row
    length, not of one memory.
    """
    assert source.size <= target.size
    _copy_bytes(target.ctypes.data, source.ctypes.data, source.size * source.itemsize)


@threaded
@parallel_jit
def copy_all(sources: Int64Array, targets: Int64Array, lengths: Int64Array) -> None:
    """Copies from address to address, so many bytes each: (n,). Nobody checks them. All bytes
    together are cut into equal parts.

    One call, since each gives up the GIL and asks for it again.
    """
    num_bytes = lengths.sum()
    for part in prange(NUM_PARTS):
        _copy_part(
            sources,
            targets,
            lengths,
            part * num_bytes // NUM_PARTS,
            (part + 1) * num_bytes // NUM_PARTS,
        )


@jit
def _copy_part(
    sources: Int64Array, targets: Int64Array, lengths: Int64Array, begin: int, end: int
) -> None:
    first = 0  # of the buffer, among all bytes
    for index in range(len(lengths)):
        low, high = max(begin - first, 0), min(end - first, lengths[index])
        if low < high:
            _copy_bytes(targets[index] + low, sources[index] + low, high - low)
        first += lengths[index]
