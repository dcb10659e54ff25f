"""Shards: the parts of a group's rows that threads plan side by side in one compiled call.

A hash of its number puts a row into one of `NUM_SHARDS` shards (`bagpipe.topology`). Each shard has
its own slots and eviction queues and plans its rows as a small cache would. Shards never meet, so
plans are the same for any number of threads. Rows are spread evenly, so the shards of a cache fetch
about what one undivided cache would (docs/results.md). A small cache is a single shard: several
would be uneven, and there is little work to divide.

With several hosts a row's record lives on one of them, its home, and only trainers of that host may
own the row. So the shards are dealt out to the hosts, and their slots with them. A small cache then
has one shard for each host, which joins all of that host's shards.

The unique rows of a batch stand shard by shard, whatever the cache's size, so a shard's part of any
array with an entry for each row is a slice.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

import numpy as np

from bagpipe.native.jit import jit
from bagpipe.topology import LINE_BITS, NUM_SHARDS, neighbours_on, shard_of
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
    nexts = np.cumsum(nexts)
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


def slot_bounds(num_slots: int, num_rows: int, num_hosts: int = 1) -> Int64Array:
    """Divides a cache's slots among its shards, in proportion to the rows that each of them has.

    All hosts have equally many slots. Slots are counted one host after the other; `slot_at` tells
    which slots of the joint cache they are.

    Returns:
        (num_shards + 1,): a shard has the slots from one bound to the next.
    """
    num_shards = num_hosts if num_slots < MIN_SLOTS else NUM_SHARDS
    host_slots = num_slots // num_hosts
    counts = _num_rows_by_shard(num_rows, num_shards)
    bounds = [0]
    for host in range(num_hosts):
        *ends, num_host_rows = accumulate(
            counts[shard] for shard in neighbours_on(host, num_shards, num_hosts)
        )
        # A host may have no rows at all, where there are fewer lines of rows than hosts.
        bounds += [host * host_slots + end * host_slots // max(1, num_host_rows) for end in ends]
        bounds.append((host + 1) * host_slots)
    return np.array(bounds, np.int64)


@jit
def slot_at(place: int, host_slots: int, num_trainers: int, num_hosts: int) -> int:
    """Returns the slot of the joint cache that a place counted host by host stands for.

    Slot s of the joint cache of N trainers is slot s // N of rank s % N. The ranks of a host are
    neighbours.
    """
    host, host_trainers = place // host_slots, num_trainers // num_hosts
    within = place - host * host_slots
    return within // host_trainers * num_trainers + host * host_trainers + within % host_trainers


def num_slots_needed(rows: Int64Array, num_rows: int, num_hosts: int = 1) -> int:
    """Returns a number of slots such that every cache with at least as many holds these rows.

    That is more than there are rows where they spread unevenly over the shards.

    Args:
        rows: (U,) the rows, shard by shard.
        num_rows: How many rows the group has.
        num_hosts: The hosts among which the cache is divided.
    """
    # Which caches are cut depends on their size, so both ways are tried.
    in_shards = _num_slots_needed(rows, num_rows, num_hosts, NUM_SHARDS)
    if in_shards >= MIN_SLOTS:
        return in_shards
    return _num_slots_needed(rows, num_rows, num_hosts, num_hosts)


def _num_slots_needed(rows: Int64Array, num_rows: int, num_hosts: int, num_shards: int) -> int:
    """Returns the slots of the smallest cache of `num_shards` shards that holds these rows."""
    used = np.diff(shard_bounds(rows, num_shards)).tolist()
    all_rows = _num_rows_by_shard(num_rows, num_shards)
    needed = [0]
    for host in range(num_hosts):
        own = neighbours_on(host, num_shards, num_hosts)
        num_host_rows = sum(all_rows[shard] for shard in own)
        needed += [
            -(-used[shard] * num_host_rows // all_rows[shard]) for shard in own if used[shard]
        ]
    return num_hosts * max(needed)


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
