"""A file of zeros of fixed size, mapped into memory, whose places are reserved on disk before they are first written.

Writing through a map into a hole of a sparse file has no way to fail but SIGBUS, which kills the process when the disk is full.
So `reserve` asks the file system for the blocks first (`posix_fallocate`), a stretch at a time: a full disk is an OSError before
anything is written. What is left is a disk that breaks, or a file that someone else cuts, under a map: both still kill the process.
"""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from pathlib import Path

import numpy as np

from bagpipe.types import Int64Array

STRETCH_BYTES = 1 << 20
"""Reserved at a time: 256 pages, so that reserving is rare. Random rows reserve the whole file soon, as they would fill it."""


class SparseFile:
    """A new file of `size_bytes` zeros at `path`, which replaces one of that name; `map` is its memory. Raises OSError.

    A process that still has the replaced file mapped keeps it, without a name, so that neither sees the other's rows.
    """

    def __init__(self, path: Path, size_bytes: int) -> None:
        self.path = path
        self._size_bytes = size_bytes
        path.unlink(missing_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self._close_file = weakref.finalize(self, os.close, self._file)  # of a store that nobody closed, too
        os.ftruncate(self._file, size_bytes)
        self.map = mmap.mmap(self._file, size_bytes)
        self.map.madvise(mmap.MADV_RANDOM)  # a fault reads one page, not the pages around it
        self._reserved = np.zeros(-(-size_bytes // STRETCH_BYTES), np.bool_)
        # Where posix_fallocate is emulated by writing zeros, a second one of the same stretch could undo another thread's write.
        self._lock = threading.Lock()

    def reserve(self, first_bytes: Int64Array, last_bytes: Int64Array) -> None:
        """Gives disk blocks to the stretches of bytes `first_bytes` and `last_bytes` (n,). Raises OSError when the disk is full."""
        stretches = np.concatenate([first_bytes // STRETCH_BYTES, last_bytes // STRETCH_BYTES])
        if self._reserved[stretches].all():
            return
        with self._lock:
            for stretch in np.unique(stretches[~self._reserved[stretches]]).tolist():
                begin = stretch * STRETCH_BYTES
                os.posix_fallocate(self._file, begin, min(STRETCH_BYTES, self._size_bytes - begin))
                self._reserved[stretch] = True

    def erase(self) -> None:
        """Makes every byte zero and gives the blocks back; the map stays."""
        os.ftruncate(self._file, 0)
        os.ftruncate(self._file, self._size_bytes)
        self._reserved[:] = False

    def close(self) -> None:
        """Closes the file. The map lives until no array is over it; the file stays on disk. Closing twice is allowed."""
        self._close_file()
