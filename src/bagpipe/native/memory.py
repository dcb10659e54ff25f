"""Copies of memory from compiled code, and what becomes of freed memory.

numba's own copies, of one array's slice to another's, take several times as long on some CPUs.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import numba.core.cgutils
import numpy as np
import numpy.typing as npt
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

from bagpipe.native.jit import NUM_PARTS, jit, parallel_jit, prange, threaded
from bagpipe.native.workers import Workers
from bagpipe.types import Int32Array, Int64Array

_cgutils: Any = numba.core.cgutils  # only a part of numba is typed
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_THREAD_ITEMS = 1 << 22
"""From how many items on a thread is worth its start."""
_MAX_THREADS = 8


def filled(num_rows: int, value: int) -> Int32Array:
    """A column of `num_rows` times `value`, (num_rows, 1).

    Several threads fill a long one, since its pages are new: the system clears each, and a virtual
    machine may have to ask its host for it.
    """
    column = np.empty((num_rows, 1), np.int32)
    num_threads = min(num_rows // _THREAD_ITEMS, os.cpu_count() or 1, _MAX_THREADS)
    if num_threads < 2:
        column.fill(value)
        return column
    with Workers("bagpipe-fill", num_threads) as workers:
        parts = np.array_split(column, num_threads)
        for call in [workers.submit(part.fill, value) for part in parts]:
            call.result()
    return column


def keep_freed_memory() -> None:
    """Has the C library keep freed arrays for the process, where it is glibc.

    A step's arrays are as large as the next one's. By default their pages go back to the system and
    are faulted in again, a tenth of the oracle's time (docs/results.md). It is meant for processes
    that hold no torch tensors.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # the highest that it takes; what is larger, rows' state, is never freed
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)


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
    """Copies all of `source` to the beginning of `target`.

    Both are contiguous, of one type and row length, and don't overlap.
    """
    assert source.size <= target.size
    _copy_bytes(target.ctypes.data, source.ctypes.data, source.size * source.itemsize)


@threaded
@parallel_jit
def copy_all(sources: Int64Array, targets: Int64Array, lengths: Int64Array) -> None:
    """Copies runs of bytes from address to address; nobody checks them.

    One call copies all of them, since each call gives up the GIL and asks for it again.

    Args:
        sources: addresses to copy from, (n,).
        targets: addresses to copy to, (n,).
        lengths: bytes to copy, (n,).
    """
    # parts of equal bytes, whichever runs they begin and end in: runs may differ much in length
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
    """Copies bytes `begin` to `end` of all runs, counted as if one lay behind the other."""
    first = 0  # where the run begins in that count
    for index in range(len(lengths)):
        low, high = max(begin - first, 0), min(end - first, lengths[index])
        if low < high:
            _copy_bytes(targets[index] + low, sources[index] + low, high - low)
        first += lengths[index]
