"""The Cacher's loops, compiled. They work in place on the arrays that `bagpipe.oracle.cacher.Cacher` owns.

`slots_of_rows` (num_rows, 1) int32 holds each row's slot; -1 never evicted, or -2 - tick when it was evicted at that tick.
`rows_of_slots` (num_slots,) int64 is the inverse. `slots_of_uses`, a ring by occurrence (see `bagpipe.oracle.linker`), holds the
slots that planned but not yet settled batches use, negative once evicted: a row used again so soon, as most are, is found there and
its far-away state is not touched. Queues are those of `bagpipe.oracle._queues`.

Loops first gather what is far away into a small buffer without branching on it, so that many cache misses are under way
at a time, and then decide.
"""

from __future__ import annotations

import numpy as np

from bagpipe._jit import jit
from bagpipe._prefetch import prefetch
from bagpipe.oracle._queues import NOT_QUEUED
from bagpipe.oracle.linker import INDEX, OCCURRENCES, STEP
from bagpipe.types import Int32Array, Int64Array

_AHEAD = 16
"""Rows ahead for which a row's state is asked for."""
_RECENT = 1 << 30
"""Occurrence numbers wrap round: one that lies less than this behind another is later."""


@jit
def find_settled(
    rows: Int64Array,
    previous: Int32Array,
    begin: int,
    end: int,
    oldest_unsettled: int,
    slots_of_rows: Int32Array,
    places: Int32Array,
) -> tuple[Int32Array, Int32Array]:
    """Takes a new batch's settled rows off the queue of rows without a next use: returns their indices and slots."""
    indices = np.empty(end - begin, np.int32)
    num_settled = 0
    for index in range(begin, end):
        indices[num_settled] = index
        is_settled = (previous[index] < 0) | (((previous[index] - oldest_unsettled) & OCCURRENCES) >= _RECENT)
        num_settled += is_settled
    slots = np.empty(num_settled, np.int32)
    num_resident = 0
    for place in range(num_settled):
        prefetch(slots_of_rows, rows[indices[min(place + _AHEAD, num_settled - 1)]], 0)
        index = indices[place]
        slot = slots_of_rows[np.uint64(rows[index]), 0]
        slots[num_resident] = slot
        indices[num_resident] = index
        num_resident += slot >= 0
    for place in range(num_resident):
        places[slots[place]] = NOT_QUEUED
    return indices[:num_resident], slots[:num_resident]


@jit
def settle(
    first_occurrence: int, num_uniques: int, step: int, last_seen: int, next_uses: Int32Array, slots_of_uses: Int32Array
) -> tuple[Int32Array, Int32Array, Int32Array, Int32Array]:
    """Finds a batch's rows that no step up to `step` has used again.

    Returns the slots of those without a next use up to step `last_seen`, and for the others (steps, indices in that step's batch,
    slots).
    """
    mask, slots_mask = len(next_uses) - 1, len(slots_of_uses) - 1
    unused = np.empty(num_uniques, np.int32)
    num_unused = 0
    for index in range(num_uniques):
        occurrence = first_occurrence + index
        next_step = next_uses[occurrence & mask, STEP]
        unused[num_unused] = occurrence & OCCURRENCES
        num_unused += ((next_step < 0) | (next_step > step)) & (slots_of_uses[occurrence & slots_mask] >= 0)
    steps = np.empty(num_unused, np.int32)
    indices = np.empty(num_unused, np.int32)
    slots = np.empty(num_unused, np.int32)
    unknown = np.empty(num_unused, np.int32)
    num_unknown = num_due = 0
    for occurrence in unused[:num_unused]:
        next_step, slot = next_uses[occurrence & mask, STEP], slots_of_uses[occurrence & slots_mask]
        is_due = (next_step >= 0) & (next_step <= last_seen)
        unknown[num_unknown] = slot
        num_unknown += not is_due
        steps[num_due] = next_step
        indices[num_due] = next_uses[occurrence & mask, INDEX]
        slots[num_due] = slot
        num_due += is_due
    return unknown[:num_unknown], steps[:num_due], indices[:num_due], slots[:num_due]


@jit
def find_resident(
    previous: Int32Array, begin: int, end: int, oldest_unsettled: int, slots_of_uses: Int32Array, slots: Int32Array
) -> Int32Array:
    """Writes to `slots` the slots of the rows that a batch not yet settled used; returns the indices of rows without any."""
    mask = len(slots_of_uses) - 1
    for index in range(begin, end):
        is_unsettled = (previous[index] >= 0) & (((previous[index] - oldest_unsettled) & OCCURRENCES) < _RECENT)
        slot = slots_of_uses[previous[index] & mask]
        slots[index] = slot if is_unsettled else slots[index]
    missing = np.empty(end - begin, np.int32)
    num_missing = 0
    for index in range(begin, end):
        missing[num_missing] = index
        num_missing += slots[index] < 0
    return missing[:num_missing]


@jit
def pop_unsettled(
    first_occurrence: int,
    num_uniques: int,
    step: int,
    next_uses: Int32Array,
    slots_of_uses: Int32Array,
    freed: Int32Array,
) -> int:
    """Moves slots of rows that a recent step used, but no step from then up to `step`, to `freed`; returns how many."""
    mask, slots_mask = len(next_uses) - 1, len(slots_of_uses) - 1
    num_freed = 0
    for occurrence in range(first_occurrence, first_occurrence + num_uniques):
        if num_freed == len(freed):
            break
        next_step = next_uses[occurrence & mask, STEP]
        slot = slots_of_uses[occurrence & slots_mask]
        if (next_step < 0 or next_step > step) and slot >= 0:
            freed[num_freed] = slot
            num_freed += 1
            slots_of_uses[occurrence & slots_mask] = -1
    return num_freed


@jit
def assign(
    rows: Int64Array,
    missing: Int32Array,
    begin: int,
    end: int,
    slots: Int32Array,
    freed: Int32Array,
    num_settled: int,
    early_tick: int,
    slots_of_rows: Int32Array,
    rows_of_slots: Int64Array,
    fetch_rows: Int64Array,
    fetch_slots: Int32Array,
) -> tuple[int, int, int]:
    """Gives the i-th freed slot to the i-th missing row, and puts the fetches that may be early before the others.

    Fills `fetch_rows` and `fetch_slots` from `begin` to `end`. Returns (how many are early, the latest eviction among the early
    rows and among the late ones).
    """
    num_early, num_late = 0, 0
    early_fence, late_fence = -1, -1
    for index in range(begin, end):
        prefetch(slots_of_rows, rows[missing[min(index + _AHEAD, len(missing) - 1)]], 0)
        row, slot = rows[missing[index]], freed[index]
        evicted_at = -2 - slots_of_rows[np.uint64(row), 0]  # -1: never evicted
        if index < num_settled and evicted_at <= early_tick:
            place = begin + num_early
            num_early += 1
            early_fence = max(early_fence, evicted_at)
        else:
            num_late += 1
            place = end - num_late
            late_fence = max(late_fence, evicted_at)
        fetch_rows[place] = row
        fetch_slots[place] = slot
        slots[missing[index]] = slot
        slots_of_rows[np.uint64(row), 0] = slot
        rows_of_slots[slot] = row
    fetch_rows[begin + num_early : end] = fetch_rows[begin + num_early : end][::-1].copy()
    fetch_slots[begin + num_early : end] = fetch_slots[begin + num_early : end][::-1].copy()
    return num_early, early_fence, late_fence


@jit
def evict(
    slots: Int32Array,
    begin: int,
    end: int,
    num_early: int,
    early_tick: int,
    late_tick: int,
    slots_of_rows: Int32Array,
    rows_of_slots: Int64Array,
    rows: Int64Array,
) -> None:
    """Writes to `rows` which rows leave their slots, the first `num_early` of them at `early_tick`, and remembers when."""
    for index in range(begin, end):
        rows[index] = rows_of_slots[slots[index]]
    for index in range(begin, end):
        slots_of_rows[np.uint64(rows[index]), 0] = -2 - (early_tick if index < num_early else late_tick)


@jit
def keep_uses(slots: Int32Array, first_occurrence: int, slots_of_uses: Int32Array) -> None:
    """Writes a planned batch's slots into the ring."""
    mask = len(slots_of_uses) - 1
    for index in range(len(slots)):
        slots_of_uses[(first_occurrence + index) & mask] = slots[index]


@jit
def expand(slots: Int32Array, inverse: Int32Array, begin: int, end: int, lookup_slots: Int32Array) -> None:
    """The slot of each lookup."""
    for lookup in range(begin, end):
        lookup_slots[lookup] = slots[np.uint32(inverse[lookup])]
