"""Exact counts of 64-bit keys.

Memory is 16 bytes per unique key, and three times that while merging.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from bagpipe.types import Int64Array

_LEAST_PENDING: Final = 1 << 20


class KeyCounter:
    """Counts how often each key occurs.

    New keys wait until there are as many of them as known ones. So each key is merged a logarithmic
    number of times.
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
