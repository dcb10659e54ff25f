"""From 64-bit keys to ids within a table: by hash, or by a dictionary with a frequency cut.

- Hash: ``mix64(key) % num_embeddings``. It takes no pass over the data and no memory, but different
  values may share an id.
- Dictionary: ids count from 1 by falling frequency in the training split (equal counts by ascending
  key). Id 0 stands for every value that is rarer than `min_count`, beyond the table's size, or
  first met in validation. It costs a pass, and 16 bytes per unique value while it is built, 28
  afterwards. Where it goes on with an earlier dictionary, known values have the ids that they have
  there, and new ones get ids behind them in the same way.

A missing value of a single-valued feature is a value like any other. All features of a table share
its ids.
"""

from __future__ import annotations

from typing import Final, Protocol

import numpy as np

from bagpipe.data.transforms import hash_ids
from bagpipe.types import Int32Array, Int64Array

_LEAST_PENDING: Final = 1 << 20
_NOTHING: Final = np.empty(0, np.int64)


class Vocabulary(Protocol):
    """The ids of one table."""

    @property
    def num_embeddings(self) -> int:
        """Ids are below it."""

    def ids(self, keys: Int64Array) -> Int32Array:
        """The ids (n,) of keys (n,)."""


class HashVocabulary:
    """Ids by hash."""

    def __init__(self, num_embeddings: int) -> None:
        self.num_embeddings = num_embeddings

    def ids(self, keys: Int64Array) -> Int32Array:
        """The ids (n,) of keys (n,)."""
        return hash_ids(keys, self.num_embeddings)


class DictionaryVocabulary:
    """Ids by frequency; see the module.

    Args:
        keys: (m,) the unique keys, ascending.
        counts: (m,) how often each occurs in training.
        min_count: Rarer keys have id 0.
        max_embeddings: Most ids, id 0 among them; None sets no limit.
        known: The keys (k,) that have ids 1 to k whatever their counts, and how often each came
            before (k,); there is room for them. None: there are none.

    Attributes:
        keys: (n,) of ids 1 to n.
        counts: (n,) how often each has come.
        num_known: How many ids were there before, id 0 among them.
    """

    def __init__(
        self,
        keys: Int64Array,
        counts: Int64Array,
        *,
        min_count: int,
        max_embeddings: int | None,
        known: tuple[Int64Array, Int64Array] | None = None,
    ) -> None:
        known_keys, known_counts = known or (_NOTHING, _NOTHING)
        self.num_known = 1 + len(known_keys)
        is_new = np.ones(len(keys), np.bool_)
        if len(known_keys) and len(keys):
            places = np.minimum(np.searchsorted(keys, known_keys), len(keys) - 1)
            came = keys[places] == known_keys
            known_counts = known_counts + np.where(came, counts[places], 0)
            is_new[places[came]] = False
        kept = np.flatnonzero((counts >= min_count) & is_new)
        ranked = kept[np.lexsort((keys[kept], -counts[kept]))]
        if max_embeddings is not None:
            ranked = ranked[: max_embeddings - self.num_known]
        self.keys = np.concatenate([known_keys, keys[ranked]])
        self.counts = np.concatenate([known_counts, counts[ranked]])
        order = np.argsort(self.keys, kind="stable")
        self._sorted_keys = self.keys[order]
        self._sorted_ids = (order + 1).astype(np.int32)
        self.num_embeddings = 1 + len(self.keys)

    def ids(self, keys: Int64Array) -> Int32Array:
        """The ids (n,) of keys (n,)."""
        if len(self._sorted_keys) == 0:
            return np.zeros(len(keys), np.int32)
        places = np.minimum(np.searchsorted(self._sorted_keys, keys), len(self._sorted_keys) - 1)
        return np.where(self._sorted_keys[places] == keys, self._sorted_ids[places], np.int32(0))


class KeyCounter:
    """Counts how often each key occurs.

    Memory is 16 bytes per unique key, and three times that while merging. New keys wait until there
    are as many of them as known ones. So each key is merged a logarithmic number of times.
    """

    def __init__(self) -> None:
        self._keys = np.empty(0, np.int64)
        self._counts = np.empty(0, np.int64)
        self._pending: list[tuple[Int64Array, Int64Array]] = []
        self._num_pending = 0

    def add(self, keys: Int64Array) -> None:
        """Counts each of `keys` (n,)."""
        if len(keys) == 0:
            return
        uniques, counts = np.unique(keys, return_counts=True)
        self._pending.append((uniques, counts))
        self._num_pending += len(uniques)
        if self._num_pending >= max(_LEAST_PENDING, len(self._keys)):
            self._merge()

    def counts(self) -> tuple[Int64Array, Int64Array]:
        """The unique keys, ascending (m,), and how often each has come (m,)."""
        if self._pending:
            self._merge()
        return self._keys, self._counts

    def _merge(self) -> None:
        keys = np.concatenate([self._keys, *(keys for keys, _ in self._pending)])
        counts = np.concatenate([self._counts, *(counts for _, counts in self._pending)])
        self._pending, self._num_pending = [], 0
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        self._keys, self._counts = keys[starts], np.add.reduceat(counts[order], starts)
