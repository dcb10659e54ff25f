"""A memory-mapped file of fixed size, whose items get disk blocks before their first write.

Writing through a map into a hole of a sparse file has no way to fail but SIGBUS, which kills the
process when the disk is full. So `reserve` asks the file system for the blocks first
(`posix_fallocate`), a stretch at a time: a full disk is an OSError before anything is written.
Items that were not reserved must not be read, either: on tmpfs, looking at a hole fills it. Two
cases are left that still kill the process: a disk that breaks, or a file that someone else
truncates, under a map.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bagpipe.native.jit import jit
from bagpipe.types import BoolArray, Int64Array

STRETCH_BYTES = 1 << 20
"""Bytes reserved at a time, or one item where that is longer, so that reserving is rare.

Random rows soon reserve the whole file, as they would fill it.
"""


class SparseFile:
    """A file of `num_items` x `item_bytes` zeros at `path`; `map` is its memory.

    A new one replaces a file of that name. A process that still has the replaced file mapped keeps
    it, without a name, so that neither sees the other's rows. One that `is_there` is opened as it
    is; of its items those are to be given to `note_reserved` that were reserved before.

    Raises:
        BlockingIOError: another process, or another object, has the file open.
        OSError: the file can't be made, sized or mapped.
    """

    def __init__(
        self, path: Path, num_items: int, item_bytes: int, *, is_there: bool = False
    ) -> None:
        self.path = path
        self._item_bytes = item_bytes
        self._size_bytes = size_bytes = num_items * item_bytes
        # No item is longer than a stretch, so its two ends tell all stretches that it lies in.
        self._stretch_bytes = max(STRETCH_BYTES, item_bytes)
        if is_there:
            self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        else:
            path.unlink(missing_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        # Closes the file of a store that nobody closed, too.
        self._close_file = weakref.finalize(self, os.close, self._file)
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not is_there:
            os.ftruncate(self._file, size_bytes)
        elif os.fstat(self._file).st_size != size_bytes:
            raise OSError(
                errno.EINVAL, f"has {os.fstat(self._file).st_size:,} bytes, not {size_bytes:,}"
            )
        self.map = mmap.mmap(self._file, size_bytes)
        self.map.madvise(mmap.MADV_RANDOM)  # a fault reads one page, not the pages around it
        self._reserved = np.zeros(-(-size_bytes // self._stretch_bytes), np.bool_)
        # Where posix_fallocate is emulated by writing zeros, a second one of the same stretch could
        # undo another thread's write. And a file closed by another thread must not be reserved in:
        # its number may be another file's by then.
        self._lock = threading.Lock()

    def reserve(self, items: Int64Array) -> None:
        """Gives disk blocks to the stretches of `items` (n,) int64.

        Raises:
            OSError: the disk is full, or the file closed.
        """
        if _are_reserved(self._reserved, items, self._item_bytes, self._stretch_bytes):
            return
        begin = items * self._item_bytes
        stretches = np.concatenate([begin, begin + (self._item_bytes - 1)]) // self._stretch_bytes
        with self._lock:
            if not self._close_file.alive:
                raise OSError(errno.EBADF, "the file was closed meanwhile")
            for stretch in np.unique(stretches[~self._reserved[stretches]]).tolist():
                begin_bytes = stretch * self._stretch_bytes
                os.posix_fallocate(
                    self._file,
                    begin_bytes,
                    min(self._stretch_bytes, self._size_bytes - begin_bytes),
                )
                self._reserved[stretch] = True

    def note_reserved(self, items: Int64Array) -> None:
        """Says of items (n,) int64 that an earlier object has reserved them."""
        begin = items * self._item_bytes
        self._reserved[begin // self._stretch_bytes] = True
        self._reserved[(begin + (self._item_bytes - 1)) // self._stretch_bytes] = True

    def sync(self) -> None:
        """Returns once all that was written is on disk. OSError: the disk failed, or is full."""
        os.fsync(self._file)

    @contextlib.contextmanager
    def reading_ahead(self) -> Iterator[None]:
        """Page faults also read the pages that follow, for going through the file in order."""
        self.map.madvise(mmap.MADV_SEQUENTIAL)
        try:
            yield
        finally:
            self.map.madvise(mmap.MADV_RANDOM)

    def erase(self) -> None:
        """Makes every byte zero and gives the blocks back; the map stays.

        Raises:
            OSError: the file could not be cut or extended; the map must not be used any more.
        """
        os.ftruncate(self._file, 0)
        os.ftruncate(self._file, self._size_bytes)
        self._reserved[:] = False

    def close(self) -> None:
        """Closes the file, which stays on disk; closing twice is allowed.

        The map lives until no array is over it.
        """
        with self._lock:
            if self._close_file.alive:
                fcntl.flock(self._file, fcntl.LOCK_UN)  # a forked process has the same file open
            self._close_file()


@jit
def _are_reserved(
    reserved: BoolArray, items: Int64Array, item_bytes: int, stretch_bytes: int
) -> bool:
    """Whether all stretches that the items lie in are reserved."""
    for item in items:
        begin = item * item_bytes
        if not (
            reserved[begin // stretch_bytes] and reserved[(begin + item_bytes - 1) // stretch_bytes]
        ):
            return False
    return True
