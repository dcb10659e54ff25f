"""All records of a group in this process's memory.

The array is an anonymous map that takes memory page by page as rows are written. A store of any
size, even one larger than RAM, is therefore created in microseconds: the kernel is asked not to
count the map against its limit (MAP_NORESERVE; without it, it refuses what could never fit at
once). If rows beyond RAM are touched, the kernel kills the process: use the file store for such
tables.

Pages are huge (2 MB) when the whole table takes at most half of RAM: a gather of 20,000 random
records then took 4.4 ms instead of 6.8 (4.2 GB table, two busy cores, fewer TLB misses). The first
row touched in a page pays for clearing all of it. So the first steps are slow (a virtual machine
took 0.2 s a GB, and 3 s where its host had to find the memory first), and the store soon takes the
memory of the whole table. Larger tables keep 4 KB pages: their memory follows the rows touched.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
from collections.abc import Callable

import numpy as np

from bagpipe.errors import StoreError
from bagpipe.store.array import ArrayStore, Places
from bagpipe.types import Float32Array, Group, Int64Array, UInt8Array

_MAP_NORESERVE = 0x4000
"""Linux's value on x86-64 and arm64; Python's `mmap` does not name it."""

_HUGE_PAGES_MAX_SHARE = 0.5
"""Share of physical memory: a table that takes more keeps small pages."""


class MemoryStore(ArrayStore):
    """An `EmbeddingStore` in host RAM: at most `record_bytes` + 1 bytes a row.

    Args:
        group: the group whose records these are.
        seed: what initial records are drawn from.
        shard: the shard whose rows it has, of `num_shards`.
        allocate: returns so many bytes of memory, zeros, or raises OSError; by default a map as
            said above.

    Raises:
        StoreError: the memory can't be mapped.
    """

    def __init__(
        self,
        group: Group,
        seed: int,
        *,
        shard: int = 0,
        num_shards: int = 1,
        allocate: Callable[[int], UInt8Array] | None = None,
    ) -> None:
        places = Places(group, shard, num_shards)
        self.group = group
        self._shape = (places.num_places, group.record_width)
        self._allocate = allocate or _map_pages
        super().__init__(group, seed, self._erased_records(), places=places)

    def _make_room(self, places: Int64Array) -> None:
        """Nothing to reserve: the system gives pages as they are touched."""

    def _erased_records(self) -> Float32Array:
        num_bytes = math.prod(self._shape) * np.dtype(np.float32).itemsize
        try:
            memory = self._allocate(num_bytes)
        except (OSError, OverflowError) as error:
            raise StoreError(
                f"can't map {num_bytes:,} bytes of memory for the {self._shape[0]:,} rows of "
                f"{self.group.name} ({error}): use the file store"
            ) from error
        return memory.view(np.float32).reshape(self._shape)


def _map_pages(num_bytes: int) -> UInt8Array:
    """Memory (num_bytes,), zero and not yet backed by pages."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    if num_bytes <= _HUGE_PAGES_MAX_SHARE * os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE:
        # A kernel without transparent huge pages refuses; small ones give the same results.
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)
