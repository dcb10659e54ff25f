"""What the C library does with freed memory, for processes that hold no torch tensors."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def keep_freed_memory() -> None:
    """Lets freed arrays stay with the process, where the C library is glibc: a step's arrays are as
    large as the next one's.

    By default their pages go back to the system and are faulted in again, a tenth of the oracle's
    time (docs/results.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # the highest that it takes; what is larger, rows' state, is never freed
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)
