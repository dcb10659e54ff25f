"""Shards: the parts into which the Cacher's work is cut, so that threads plan side by side in one compiled call.

A row belongs to one of `NUM_SHARDS` shards by a hash of its number. Each shard has its own slots and eviction queues and plans
its rows as a small cache would; shards never meet, so plans are the same for any number of threads. Rows are spread evenly, so the
shards of a cache together fetch what one would (docs/results.md). Rows whose 4-byte states share a cache line share a shard, lest
threads take lines from each other. A small cache is one shard: several would be uneven, and there is little to share.

The distinct rows of a batch stand shard by shard, whatever the cache's size, so that a shard's part of an array by row is a slice.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

import numpy as np

from bagpipe._jit import jit
from bagpipe.types import Int32Array, Int64Array

_BITS = 3
NUM_SHARDS = 1 << _BITS
MIN_SLOTS = 1 << 15
"""Slots of the smallest cache that is cut into shards."""
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio
_LINE_BITS = 4
"""Binary logarithm of how many 4-byte states a cache line holds."""


@jit
def _shard_of(row: int) -> np.int64:
    return np.int64((np.uint64(row >> _LINE_BITS) * _MULTIPLIER) >> np.uint64(64 - _BITS))


@jit
def order_by_shard(rows: Int64Array, counts: Int32Array) -> tuple[Int64Array, Int32Array, Int32Array]:
    """Rows (U,) and their counts shard by shard, else in the order given; and where each of the given ones now stands (U,)."""
    nexts = np.zeros(NUM_SHARDS + 1, np.int64)
    for row in rows:
        nexts[_shard_of(row) + 1] += 1
    nexts = np.cumsum(nexts)
    ordered, ordered_counts = np.empty_like(rows), np.empty_like(counts)
    places = np.empty(len(rows), np.int32)
    for index in range(len(rows)):
        shard = _shard_of(rows[index])
        places[index] = nexts[shard]
        nexts[shard] += 1
    for index in range(len(rows)):
        place = np.uint32(places[index])
        ordered[place], ordered_counts[place] = rows[index], counts[index]
    return ordered, ordered_counts, places


@jit
def shard_bounds(rows: Int64Array, num_shards: int) -> Int64Array:
    """Where in rows (U,), which stand shard by shard, each shard begins (num_shards + 1,); one shard has them all."""
    bounds = np.zeros(num_shards + 1, np.int64)
    bounds[num_shards] = len(rows)
    for shard in range(1, num_shards):
        low, high = bounds[shard - 1], len(rows)
        while low < high:
            middle = (low + high) // 2
            if _shard_of(rows[middle]) < shard:
                low = middle + 1
            else:
                high = middle
        bounds[shard] = low
    return bounds


def slot_bounds(num_slots: int, num_rows: int) -> Int64Array:
    """Which slots each shard of a cache has, from one bound to the next: as many as its share of the group's rows."""
    if num_slots < MIN_SLOTS:
        return np.array([0, num_slots], np.int64)
    return np.array([end * num_slots // num_rows for end in accumulate(_num_rows_by_shard(num_rows), initial=0)], np.int64)


def num_slots_needed(rows: Int64Array, num_rows: int) -> int:
    """Any cache of at least so many slots holds rows (U,), which stand shard by shard, of a group's `num_rows`."""
    counts = np.diff(shard_bounds(rows, NUM_SHARDS)).tolist()
    shares = _num_rows_by_shard(num_rows)
    in_shards = max((-(-count * num_rows // share) for count, share in zip(counts, shares, strict=True) if count), default=0)
    return len(rows) if in_shards < MIN_SLOTS else in_shards


@lru_cache
def _num_rows_by_shard(num_rows: int) -> tuple[int, ...]:
    """How many of a group's rows each shard has."""
    return tuple(_count_rows(num_rows).tolist())


@jit
def _count_rows(num_rows: int) -> Int64Array:
    counts = np.zeros(NUM_SHARDS, np.int64)
    for first_row in range(0, num_rows, 1 << _LINE_BITS):
        counts[_shard_of(first_row)] += min(1 << _LINE_BITS, num_rows - first_row)
    return counts
