"""From 64-bit keys to ids within a table: by hash, or by a dictionary with a frequency cut.

- hash: ``mix64(key) % num_embeddings``. No pass over the data, no memory; different values may
  share an id.
- dictionary: ids from 1 by falling frequency in the training split (equal counts by ascending key);
  id 0 stands for every value rarer than `min_count`, beyond the table's size, or first met in
  validation. Costs a pass, and 16 bytes a distinct value while it is built, 12 afterwards.

A missing value of a single-valued feature is a value like any other. All features of a table share
its ids.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from bagpipe.data.files import HashingFile
from bagpipe.data.hashing import hash_ids
from bagpipe.types import Int32Array, Int64Array


class Vocabulary(Protocol):
    """The ids of one table."""

    @property
    def num_embeddings(self) -> int:
        """Ids are 0 to this, exclusive."""

    def ids(self, keys: Int64Array) -> Int32Array:
        """The ids of keys (n,); (n,)."""


class HashVocabulary:
    """Ids by hash."""

    def __init__(self, num_embeddings: int) -> None:
        self.num_embeddings = num_embeddings

    def ids(self, keys: Int64Array) -> Int32Array:
        """The ids of keys (n,); (n,)."""
        return hash_ids(keys, self.num_embeddings)


class DictionaryVocabulary:
    """Ids by frequency; see the module. `keys`, ascending, and `counts` are (m,)."""

    def __init__(
        self, keys: Int64Array, counts: Int64Array, *, min_count: int, max_embeddings: int | None
    ) -> None:
        kept = np.flatnonzero(counts >= min_count)
        ranked = kept[np.lexsort((keys[kept], -counts[kept]))]
        if max_embeddings is not None:
            ranked = ranked[: max_embeddings - 1]
        self._by_rank_keys, self._by_rank_counts = keys[ranked], counts[ranked]
        order = np.argsort(self._by_rank_keys, kind="stable")
        self._sorted_keys = self._by_rank_keys[order]
        self._sorted_ids = (order + 1).astype(np.int32)
        self.num_embeddings = 1 + len(ranked)

    def ids(self, keys: Int64Array) -> Int32Array:
        """The ids of keys (n,); (n,)."""
        if len(self._sorted_keys) == 0:
            return np.zeros(len(keys), np.int32)
        places = np.minimum(np.searchsorted(self._sorted_keys, keys), len(self._sorted_keys) - 1)
        return np.where(self._sorted_keys[places] == keys, self._sorted_ids[places], np.int32(0))

    def save(self, path: Path) -> HashingFile:
        """Writes ids 1 and up as an Arrow file: key int64, count int64; row i holds id i + 1.
        Returns the closed file.
        """
        table = pa.table({"key": self._by_rank_keys, "count": self._by_rank_counts})
        with HashingFile(path) as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        return file
