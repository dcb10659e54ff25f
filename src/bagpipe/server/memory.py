"""Memory that a trainer shares with the shard servers of its host.

It is one file without a name (memfd), sealed to its size and mapped once as a whole, so that it can
be pinned. The file is sparse: it takes memory only where it has been used. Whoever needs an array
for records takes a block of it and gives it back. A server that has the file's descriptor maps it
too, and gathers records right where they are wanted.

A block begins at a page, and its size is a power of two. It is zero when it is first used.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import threading
from collections import defaultdict

import numpy as np
import pyarrow as pa

from bagpipe.errors import StoreError
from bagpipe.types import Float32Array, UInt8Array

DEFAULT_BYTES = 64 << 30
"""Room for the blocks of a trainer; only what is used takes memory."""
MOST_BYTES = 1 << 40
"""The largest file that a server maps."""

_TMPFS_MAGIC = 0x01021994  # of linux/magic.h; memory files of huge pages have another
_libc = ctypes.CDLL(None, use_errno=True)


class StagingMemory:
    """Owns the file and its blocks. Any thread may call it."""

    def __init__(self, size_bytes: int = DEFAULT_BYTES) -> None:
        """Makes the file.

        Args:
            size_bytes: room for blocks, from one page to `MOST_BYTES`.

        Raises:
            StoreError: the system refuses.
        """
        size_bytes = -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self.file = -1
        try:
            self.file = os.memfd_create("bagpipe-staging", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(self.file, size_bytes)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(self.file, fcntl.F_ADD_SEALS, seals)
            self._memory = map_file(self.file, size_bytes)
        except OSError as error:
            self.close()
            raise StoreError(
                f"can't make {size_bytes:,} bytes of memory to share with shard servers: {error}"
            ) from error
        self._address = pa.py_buffer(self._memory).address
        self._lock = threading.Lock()
        self._end = 0  # of the blocks that were ever taken
        self._free: dict[int, list[int]] = defaultdict(list)  # beginnings of blocks, by size

    @property
    def size_bytes(self) -> int:
        """Room for blocks."""
        return len(self._memory)

    def take(self, num_records: int, record_width: int) -> Float32Array:
        """An array for records, the taker's until it is given back.

        Returns:
            (num_records, record_width) float32, C-contiguous, with undefined content.

        Raises:
            StoreError: There is no room for it.
        """
        size = 4 * num_records * record_width
        if not size:
            return np.empty((num_records, record_width), np.float32)
        block = _block_bytes(size)
        with self._lock:
            if self._free[block]:
                begin = self._free[block].pop()
            elif self._end + block <= self.size_bytes:
                begin, self._end = self._end, self._end + block
            else:
                raise StoreError(
                    f"the memory shared with shard servers has no room for {size:,} bytes more: "
                    f"{self._end:,} of {self.size_bytes:,} are taken"
                )
        array: Float32Array = self._memory[begin : begin + size].view(np.float32)
        return array.reshape(num_records, record_width)

    def give_back(self, array: Float32Array) -> None:
        """Takes an array back that nobody uses any more, and no server either."""
        if not array.size:
            return
        begin = self.offset_of(array)
        assert begin is not None
        with self._lock:
            self._free[_block_bytes(array.nbytes)].append(begin)

    def offset_of(self, array: Float32Array) -> int | None:
        """Where in the file a contiguous array lies, in bytes; None if elsewhere."""
        offset: int = pa.py_buffer(array).address - self._address
        return offset if 0 <= offset <= self.size_bytes - array.nbytes else None

    def close(self) -> None:
        """Closes the file. Arrays of it, and mappings of servers, stay good."""
        if self.file >= 0:
            os.close(self.file)
            self.file = -1


def map_file(file: int, size_bytes: int) -> UInt8Array:
    """All of a file's memory, shared: (size_bytes,)."""
    return np.frombuffer(mmap.mmap(file, size_bytes), np.uint8)


def map_foreign(file: int) -> UInt8Array:
    """Maps a file that another process has handed over.

    No access to the mapping can then end this process, whatever the other does. The file can't get
    smaller: it is sealed. No page of it can be missing: it is a plain memory file, since one of
    huge pages can run out of them.

    Raises:
        StoreError: it is no such file, or too large.
    """
    try:
        seals = fcntl.fcntl(file, fcntl.F_GET_SEALS)
    except OSError as error:
        raise StoreError("what was handed over for staging is no memory file (memfd)") from error
    if not seals & fcntl.F_SEAL_SHRINK:
        raise StoreError(
            "the memory file handed over for staging may get smaller: seal it (F_SEAL_SHRINK)"
        )
    if _file_system(file) != _TMPFS_MAGIC:
        raise StoreError("the memory file handed over for staging has huge pages: use small ones")
    size_bytes = os.fstat(file).st_size
    if not mmap.PAGESIZE <= size_bytes <= MOST_BYTES:
        raise StoreError(
            f"the memory file handed over for staging has {size_bytes:,} bytes, must have "
            f"{mmap.PAGESIZE:,} to {MOST_BYTES:,}"
        )
    try:
        return map_file(file, size_bytes)
    except OSError as error:
        raise StoreError(
            f"can't map the memory file handed over for staging to read and write it: {error}"
        ) from error


def _file_system(file: int) -> int:
    """The magic number of the file system that a file belongs to."""
    found = (ctypes.c_long * 32)()  # struct statfs begins with it
    if _libc.fstatfs(file, found) != 0:
        raise StoreError(f"can't look at what was handed over: {os.strerror(ctypes.get_errno())}")
    return found[0]


def _block_bytes(size_bytes: int) -> int:
    return max(mmap.PAGESIZE, 1 << (size_bytes - 1).bit_length())
