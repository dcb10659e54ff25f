"""Shards: the parts of a group's rows that threads plan side by side in one compiled call.

A hash of its number puts a row into one of `NUM_SHARDS` shards (`bagpipe.topology`). Each shard has
its own slots and eviction queues and plans its rows as a small cache would. Shards never meet, so
plans are the same for any number of threads. Rows are spread evenly, so the shards of a cache fetch
about what one undivided cache would (docs/results.md). A small cache is a single shard: several
would be uneven, and there is little work to divide.

The unique rows of a batch stand shard by shard, whatever the cache's size, so a shard's part of any
array with an entry for each row is a slice.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

import numpy as np

from bagpipe.native.jit import jit
from bagpipe.topology import LINE_BITS, NUM_SHARDS, shard_of
from bagpipe.types import Int32Array, Int64Array

MIN_SLOTS = 1 << 15
"""Slots of the smallest cache that is cut into `NUM_SHARDS` shards."""


@jit
def order_by_shard(
    rows: Int64Array, counts: Int32Array
) -> tuple[Int64Array, Int32Array, Int32Array]:
    """Puts rows (U,) and their counts (U,) shard by shard, in the order given within a shard.

    Returns:
        The rows, the counts, and the new place of each row given, (U,) each.
    """
    nexts = np.zeros(NUM_SHARDS + 1, np.int64)
    for row in rows:
        nexts[shard_of(row, NUM_SHARDS) + 1] += 1
    for before in range(NUM_SHARDS):
        nexts[before + 1] += nexts[before]
    ordered, ordered_counts = np.empty_like(rows), np.empty_like(counts)
    places = np.empty(len(rows), np.int32)
    for index in range(len(rows)):
        shard = shard_of(rows[index], NUM_SHARDS)
        places[index] = nexts[shard]
        nexts[shard] += 1
    for index in range(len(rows)):
        place = np.uint32(places[index])
        ordered[place], ordered_counts[place] = rows[index], counts[index]
    return ordered, ordered_counts, places


@jit
def shard_bounds(rows: Int64Array, num_shards: int) -> Int64Array:
    """Finds where in rows (U,), which stand shard by shard, each shard begins: (num_shards + 1,).

    With fewer than `NUM_SHARDS` shards, each of them joins several neighbours.
    """
    bounds = np.zeros(num_shards + 1, np.int64)
    bounds[num_shards] = len(rows)
    for shard in range(1, num_shards):
        low, high = bounds[shard - 1], len(rows)
        while low < high:
            middle = (low + high) // 2
            if shard_of(rows[middle], num_shards) < shard:
                low = middle + 1
            else:
                high = middle
        bounds[shard] = low
    return bounds


def slot_bounds(num_slots: int, num_rows: int) -> Int64Array:
    """Divides a cache's slots among its shards, in proportion to the rows that each of them has.

    Returns:
        (num_shards + 1,): a shard has the slots from one bound to the next.
    """
    *ends, num_of_all = accumulate(_num_rows_by_shard(num_rows, _num_shards(num_slots)))
    bounds = [0, *(end * num_slots // max(1, num_of_all) for end in ends), num_slots]
    return np.array(bounds, np.int64)


def num_slots_needed(rows: Int64Array, num_rows: int) -> int:
    """Returns a number of slots such that every cache with at least as many holds these rows.

    That is more than there are rows where they spread unevenly over the shards.

    Args:
        rows: (U,) the rows, shard by shard.
        num_rows: How many rows the group has.
    """
    # Which caches are cut depends on their size, so both ways are tried.
    in_shards = _num_slots_needed(rows, num_rows)
    return in_shards if in_shards >= MIN_SLOTS else len(rows)


def _num_shards(num_slots: int) -> int:
    return 1 if num_slots < MIN_SLOTS else NUM_SHARDS


def _num_slots_needed(rows: Int64Array, num_rows: int) -> int:
    """Returns the slots of the smallest cache cut into shards that holds these rows."""
    used = np.diff(shard_bounds(rows, NUM_SHARDS)).tolist()
    num_of_shards = _num_rows_by_shard(num_rows, NUM_SHARDS)
    return max(
        (
            -(-count * num_rows // of_shard)
            for count, of_shard in zip(used, num_of_shards, strict=True)
            if count
        ),
        default=0,
    )


@lru_cache
def _num_rows_by_shard(num_rows: int, num_shards: int) -> tuple[int, ...]:
    """Counts the rows of a group in each of its shards."""
    return tuple(_count_rows(num_rows).reshape(num_shards, -1).sum(axis=1).tolist())


@jit
def _count_rows(num_rows: int) -> Int64Array:
    """Counts the rows from 0 to `num_rows` in each of `NUM_SHARDS` shards."""
    counts = np.zeros(NUM_SHARDS, np.int64)
    for first_row in range(0, num_rows, 1 << LINE_BITS):
        counts[shard_of(first_row, NUM_SHARDS)] += min(1 << LINE_BITS, num_rows - first_row)
    return counts
