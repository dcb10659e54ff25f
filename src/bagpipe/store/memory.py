"""All records of a group in this process's memory.

The array is virtual until it is written: a store of any size is created at once, and its memory follows the rows touched (in whole
pages; with transparent huge pages, which numpy asks for, 2 MB at a time). Not for tables beyond RAM: use the file store.
"""

from __future__ import annotations

import numpy as np

from bagpipe.store.array import ArrayStore
from bagpipe.types import Group


class MemoryStore(ArrayStore):
    """An `EmbeddingStore` in host RAM: `record_bytes` + 1 bytes a row at most."""

    def __init__(self, group: Group, seed: int) -> None:
        super().__init__(
            group, seed, np.zeros((group.num_rows, group.record_width), np.float32), np.zeros(group.num_rows, np.uint8)
        )

    def clear(self) -> None:
        """See `EmbeddingStore.clear`."""
        shape = self._open_records().shape
        self._records = None  # the old memory goes before the new is asked for
        self._records, self._touched = np.zeros(shape, np.float32), np.zeros(shape[0], np.uint8)

    def close(self) -> None:
        """See `EmbeddingStore.close`."""
        self._records, self._touched = None, np.empty(0, np.uint8)
