"""What a step moves into a cache and out of it: counted by shard, then joined.

Each shard writes its rows where those of the batch in it stand, from `begin` on. What all shards
move is joined without gaps, the overlapped parts first.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bagpipe.native.jit import jit, parallel_jit, prange
from bagpipe.plan import Transfers
from bagpipe.types import Int32Array, Int64Array

(
    EVICTED,
    EVICTED_OVERLAPPED,
    EVICTED_BLINDLY,
    FETCHED,
    FETCHED_OVERLAPPED,
    OVERLAPPED_FENCE,
    URGENT_FENCE,
    DONE,
) = range(8)
"""What is counted of a step.

These are the rows evicted and fetched, and how many of them are overlapped; the rows evicted
although nobody knows their next use; the latest eviction among rows of overlapped and of urgent
fetches, -1 for none; and the shards that are done.
"""


class Moved(NamedTuple):
    """Rows that are evicted or fetched, and their slots; the overlapped ones come first."""

    rows: Int64Array
    slots: Int32Array


@jit
def total_counts(counts: Int64Array) -> Int64Array:
    """What all shards have together (DONE + 1,) of what is counted of each (S, DONE + 1)."""
    totals = np.zeros(DONE + 1, np.int64)
    totals[OVERLAPPED_FENCE] = totals[URGENT_FENCE] = -1
    for shard in range(len(counts)):
        for kind in range(DONE + 1):
            if kind == OVERLAPPED_FENCE or kind == URGENT_FENCE:
                totals[kind] = max(totals[kind], counts[shard, kind])
            else:
                totals[kind] += counts[shard, kind]
    return totals


def as_transfers(evicted: Moved, fetched: Moved, counts: Int64Array) -> tuple[Transfers, Transfers]:
    """A step's overlapped and urgent transfers, from what it moves and its `counts` (DONE + 1,)."""
    num_out, num_in = counts[EVICTED_OVERLAPPED], counts[FETCHED_OVERLAPPED]
    overlapped, urgent = (
        Transfers(
            evict_rows=evicted.rows[out],
            evict_slots=evicted.slots[out],
            fetch_rows=fetched.rows[into],
            fetch_slots=fetched.slots[into],
            fence_tick=int(counts[fence]),
        )
        for out, into, fence in (
            (slice(num_out), slice(num_in), OVERLAPPED_FENCE),
            (slice(num_out, None), slice(num_in, None), URGENT_FENCE),
        )
    )
    return overlapped, urgent


@parallel_jit
def join(
    bounds: Int64Array, counts: Int64Array, evicted: Moved, fetched: Moved
) -> tuple[tuple[Int64Array, Int32Array], tuple[Int64Array, Int32Array]]:
    """Joins what the shards move.

    Args:
        bounds: (S + 1,) a shard has written from its bound on.
        counts: (S, DONE + 1) what is counted of each shard.
        evicted: What the shards have written, (U,) each.
        fetched: As `evicted`.

    Returns:
        The rows evicted and their slots, and the rows fetched and their slots.
    """
    # numba hands no tuples to parallel loops.
    evict_rows, evict_slots = evicted.rows, evicted.slots
    fetch_rows, fetch_slots = fetched.rows, fetched.slots
    num_evicted, num_fetched = 0, 0
    for shard in range(len(counts)):
        num_evicted += counts[shard, EVICTED]
        num_fetched += counts[shard, FETCHED]
    evicted_rows, evicted_slots = np.empty(num_evicted, np.int64), np.empty(num_evicted, np.int32)
    fetched_rows, fetched_slots = np.empty(num_fetched, np.int64), np.empty(num_fetched, np.int32)
    for shard in prange(len(counts)):
        _join_shard(
            shard,
            bounds[shard],
            counts[:, EVICTED : EVICTED_OVERLAPPED + 1],
            Moved(evict_rows, evict_slots),
            Moved(evicted_rows, evicted_slots),
        )
        _join_shard(
            shard,
            bounds[shard],
            counts[:, FETCHED : FETCHED_OVERLAPPED + 1],
            Moved(fetch_rows, fetch_slots),
            Moved(fetched_rows, fetched_slots),
        )
    return (evicted_rows, evicted_slots), (fetched_rows, fetched_slots)


@jit
def _join_shard(
    shard: int,
    begin: int,
    counts: Int64Array,
    parts: Moved,
    joined: Moved,
) -> None:
    """Copies what one shard moves to its place among what all shards move.

    The overlapped parts of all shards come first, then the urgent ones, each in the order of the
    shards.

    Args:
        shard: The shard.
        begin: Where in `parts` its rows begin.
        counts: (S, 2) how many rows each shard moves, and how many of them, the first ones, are
            overlapped.
        parts: What the shards have written.
        joined: Is filled.
    """
    first_overlapped = first_urgent = 0
    for other in range(len(counts)):
        num_moved, num_overlapped = counts[other, 0], counts[other, 1]
        first_urgent += num_overlapped
        if other < shard:
            first_overlapped += num_overlapped
            first_urgent += num_moved - num_overlapped
    middle, end = begin + counts[shard, 1], begin + counts[shard, 0]
    _copy_moved(parts, begin, middle, joined, first_overlapped)
    _copy_moved(parts, middle, end, joined, first_urgent)


@jit
def _copy_moved(parts: Moved, begin: int, end: int, joined: Moved, first: int) -> None:
    """Copies the rows and slots of `parts` from `begin` to `end` into `joined` from `first` on."""
    # Loops, since numba's copies of slices bring a message for slices of unequal lengths, which
    # takes longer to compile than all else here.
    part_rows, rows, part_slots, slots = parts.rows, joined.rows, parts.slots, joined.slots
    for index in range(end - begin):
        rows[first + index] = part_rows[begin + index]
    for index in range(end - begin):
        slots[first + index] = part_slots[begin + index]
