"""All records of a group in memory that the trainers of one host share.

There is one copy of the tables, not one a trainer. The first trainer makes two memory files without
a name (memfd) and the others open them through its `/proc` entry, so nothing is left behind when
the processes end, however they end. Pages are taken as rows are written, as in the memory store,
but small ones. On one of several hosts it has the records of the rows whose home that host is, and
refuses others.

A row is written by one trainer at a time, its owner, and read by another only once that has said so
(`bagpipe.distributed.communicator`).
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass

import numpy as np

from bagpipe.errors import StoreError
from bagpipe.store.array import ArrayStore, Places
from bagpipe.types import Float32Array, Group, UInt8Array


@dataclass(frozen=True, kw_only=True)
class SharedFiles:
    """Where other processes of the host find a store's files, while their maker lives."""

    records: str
    touched: str


class SharedMemoryStore(ArrayStore):
    """An `EmbeddingStore` that several processes have open.

    Takes at most `record_bytes` + 1 bytes a row in all. With several hosts each has 1 byte a row
    and `record_bytes` for each row of its own, and each process a quarter of a byte a row.
    """

    def __init__(
        self,
        group: Group,
        seed: int,
        files: SharedFiles | None = None,
        *,
        host: int = 0,
        num_hosts: int = 1,
    ) -> None:
        """Makes the store, empty, or with `files` opens the one of another process of this host.

        Raises:
            StoreError: it can't be mapped.
        """
        places = Places(group, host, num_hosts)
        sizes_bytes = {
            "records": places.num_places * group.record_bytes,
            "touched": group.num_rows,
        }
        self._descriptors: list[int] = []
        maps = {}
        try:
            for name, size_bytes in sizes_bytes.items():
                if files is None:
                    descriptor = os.memfd_create(f"bagpipe-{name}")
                    os.truncate(descriptor, size_bytes)
                else:
                    descriptor = os.open(getattr(files, name), os.O_RDWR)
                self._descriptors.append(descriptor)
                maps[name] = mmap.mmap(descriptor, size_bytes)
        except (OSError, OverflowError, ValueError) as error:
            self._close_files()
            raise StoreError(
                f"can't share {sum(sizes_bytes.values()):,} bytes of memory for {group.name}: "
                f"{error}"
            ) from error
        self._records: Float32Array = np.frombuffer(maps["records"], np.float32).reshape(
            places.num_places, group.record_width
        )
        self._touched: UInt8Array = np.frombuffer(maps["touched"], np.uint8)
        super().__init__(group, seed, self._records, self._touched, places)

    @property
    def files(self) -> SharedFiles:
        """For the other processes."""
        records, touched = (
            f"/proc/{os.getpid()}/fd/{descriptor}" for descriptor in self._descriptors
        )
        return SharedFiles(records=records, touched=touched)

    def close(self) -> None:
        """See `EmbeddingStore.close`. The memory goes with the last process that has it open."""
        super().close()
        self._close_files()

    def _make_room(self, places: object) -> None:
        """Nothing to reserve: the system gives pages as they are touched."""

    def _erased_records(self) -> Float32Array:
        return self._records  # what is not touched is not read

    def _erased_touched(self) -> UInt8Array:
        self._touched[:] = 0
        return self._touched

    def _close_files(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())
