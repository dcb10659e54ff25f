"""The Cacher's loops, compiled. They work in place on the arrays of `State`, which `bagpipe.oracle.cacher.Cacher` owns.

`slots_of_uses`, a ring by occurrence (see `bagpipe.oracle.linker`), holds the slots that planned but not yet settled batches use,
negative once evicted: a row used again so soon, as most are, is found there and its far-away state is not touched.

Loops first gather what is far away into a small buffer without branching on it, so that many cache misses are under way at a time,
and then decide. A step is one call, so that its thread seldom has to ask for the GIL.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np

from bagpipe._jit import NUM_CRITICAL_THREADS, NUM_PARTS, jit, join_parts, parallel_jit, part_bounds, prange, threaded
from bagpipe._prefetch import prefetch
from bagpipe.oracle._queues import (
    DueQueues,
    UnknownQueue,
    forget_unknown,
    pop_due,
    pop_unknown,
    push_due,
    push_unknown,
    take_due,
)
from bagpipe.oracle.linker import INDEX, OCCURRENCES, STEP
from bagpipe.types import Int32Array, Int64Array

_AHEAD = 16
"""Rows ahead for which a row's state is asked for."""
_RECENT = 1 << 30
"""Occurrence numbers wrap round: one that lies less than this behind another is later."""


class State(NamedTuple):
    """What the Cacher knows of rows and slots."""

    slots_of_rows: Int32Array  # (num_rows, 1) each row's slot; -1: never evicted, -2 - tick: evicted at that tick
    rows_of_slots: Int64Array  # (num_slots,)
    unknown: UnknownQueue
    due: DueQueues


@jit
def _admit(state: State, rows: Int64Array, previous: Int32Array, oldest_unsettled: int, step: int) -> None:
    """Makes a new batch's settled rows, which had no known next use, due at `step`."""
    indices = np.empty(len(rows), np.int32)
    slots = np.empty(len(rows), np.int32)
    steps = np.full(len(rows), step, np.int32)
    counts = _find_resident(state.slots_of_rows, rows, previous, oldest_unsettled, indices, slots)
    forget_unknown(state.unknown, slots, counts)
    push_due(state.due, steps, indices, slots, counts)


admit = threaded(_admit, NUM_CRITICAL_THREADS)


@parallel_jit
def _find_resident(
    slots_of_rows: Int32Array,
    rows: Int64Array,
    previous: Int32Array,
    oldest_unsettled: int,
    indices: Int32Array,
    slots: Int32Array,
) -> Int64Array:
    """Fills `indices` and `slots`, in parts, with the settled rows that have a slot; returns how many in each."""
    counts = np.empty(NUM_PARTS, np.int64)
    for part in prange(NUM_PARTS):
        begin, end = part_bounds(part, len(rows))
        counts[part] = _find_resident_part(
            slots_of_rows, rows[begin:end], previous[begin:end], oldest_unsettled, indices[begin:end], slots[begin:end], begin
        )
    return counts


@jit
def _find_resident_part(
    slots_of_rows: Int32Array,
    rows: Int64Array,
    previous: Int32Array,
    oldest_unsettled: int,
    indices: Int32Array,
    slots: Int32Array,
    first_index: int,
) -> int:
    num_settled = 0
    for index in range(len(rows)):
        indices[num_settled] = index
        is_settled = (previous[index] < 0) | (((previous[index] - oldest_unsettled) & OCCURRENCES) >= _RECENT)
        num_settled += is_settled
    num_resident = 0
    for place in range(num_settled):
        prefetch(slots_of_rows, rows[indices[min(place + _AHEAD, num_settled - 1)]], 0)
        index = indices[place]
        slot = slots_of_rows[np.uint64(rows[index]), 0]
        slots[num_resident] = slot
        indices[num_resident] = first_index + index
        num_resident += slot >= 0
    return num_resident


@jit
def find(
    state: State, previous: Int32Array, oldest_unsettled: int, step: int, slots_of_uses: Int32Array
) -> tuple[Int32Array, Int32Array]:
    """The slot of each row that a step needs, negative where it has none, and the indices of those rows."""
    slots = np.full(len(previous), -1, np.int32)
    take_due(state.due, step, slots)
    missing = np.empty(len(previous), np.int32)
    num_missing = _find_unsettled(previous, oldest_unsettled, slots_of_uses, slots, missing)
    return slots, missing[:num_missing]


@parallel_jit
def _find_unsettled(
    previous: Int32Array, oldest_unsettled: int, slots_of_uses: Int32Array, slots: Int32Array, missing: Int32Array
) -> int:
    """Writes the slots of unsettled rows, and the indices of rows without one to `missing`; returns how many of these."""
    counts = np.empty(NUM_PARTS, np.int64)
    for part in prange(NUM_PARTS):
        begin, end = part_bounds(part, len(previous))
        counts[part] = _find_unsettled_part(
            previous[begin:end], oldest_unsettled, slots_of_uses, slots[begin:end], missing[begin:end], begin
        )
    return join_parts(missing, counts)


@jit
def _find_unsettled_part(
    previous: Int32Array,
    oldest_unsettled: int,
    slots_of_uses: Int32Array,
    slots: Int32Array,
    missing: Int32Array,
    first_index: int,
) -> int:
    mask = len(slots_of_uses) - 1
    for index in range(len(previous)):
        is_unsettled = (previous[index] >= 0) & (((previous[index] - oldest_unsettled) & OCCURRENCES) < _RECENT)
        slot = slots_of_uses[previous[index] & mask]
        slots[index] = slot if is_unsettled else slots[index]
    num_missing = 0
    for index in range(len(previous)):
        missing[num_missing] = first_index + index
        num_missing += slots[index] < 0
    return num_missing


@jit
def settle(
    state: State,
    first_occurrence: int,
    num_uniques: int,
    step: int,
    last_seen: int,
    next_uses: Int32Array,
    slots_of_uses: Int32Array,
) -> None:
    """Makes a batch's rows that no step up to `step` has used again candidates for eviction; the window ends at `last_seen`."""
    unknown = np.empty(num_uniques, np.int32)
    steps = np.empty(num_uniques, np.int32)
    indices = np.empty(num_uniques, np.int32)
    slots = np.empty(num_uniques, np.int32)
    counts = _sort_out(first_occurrence, step, last_seen, next_uses, slots_of_uses, unknown, steps, indices, slots)
    push_unknown(state.unknown, unknown, counts[0])
    push_due(state.due, steps, indices, slots, counts[1])


@parallel_jit
def _sort_out(
    first_occurrence: int,
    step: int,
    last_seen: int,
    next_uses: Int32Array,
    slots_of_uses: Int32Array,
    unknown: Int32Array,
    steps: Int32Array,
    indices: Int32Array,
    slots: Int32Array,
) -> Int64Array:
    """Fills `unknown`, in parts, with the slots of rows without a known next use, and the others with those that have one.

    Returns how many of either there are in each part (2, NUM_PARTS).
    """
    counts = np.empty((2, NUM_PARTS), np.int64)
    for part in prange(NUM_PARTS):
        begin, end = part_bounds(part, len(unknown))
        counts[0, part], counts[1, part] = _sort_out_part(
            first_occurrence + begin,
            step,
            last_seen,
            next_uses,
            slots_of_uses,
            unknown[begin:end],
            steps[begin:end],
            indices[begin:end],
            slots[begin:end],
        )
    return counts


@jit
def _sort_out_part(
    first_occurrence: int,
    step: int,
    last_seen: int,
    next_uses: Int32Array,
    slots_of_uses: Int32Array,
    unknown: Int32Array,
    steps: Int32Array,
    indices: Int32Array,
    slots: Int32Array,
) -> tuple[int, int]:
    mask, slots_mask = len(next_uses) - 1, len(slots_of_uses) - 1
    num_unknown = num_due = 0
    for occurrence in range(first_occurrence, first_occurrence + len(unknown)):
        next_step, slot = next_uses[occurrence & mask, STEP], slots_of_uses[occurrence & slots_mask]
        is_unused = ((next_step < 0) | (next_step > step)) & (slot >= 0)
        is_due = (next_step >= 0) & (next_step <= last_seen)
        unknown[num_unknown] = slot
        num_unknown += is_unused & (not is_due)
        steps[num_due] = next_step
        indices[num_due] = next_uses[occurrence & mask, INDEX]
        slots[num_due] = slot
        num_due += is_unused & is_due
    return num_unknown, num_due


@jit
def free_settled(state: State, num_fresh: int, first_fresh: int, step: int, last_seen: int, freed: Int32Array) -> tuple[int, int]:
    """Fills `freed` with slots never used, then with those of rows without a next use, then with those of the farthest.

    Returns how many there are up to the second kind and in all.
    """
    for index in range(num_fresh):
        freed[index] = first_fresh + index
    num_unknown = num_fresh + pop_unknown(state.unknown, freed[num_fresh:])
    num_freed = num_unknown
    due_step = last_seen
    while num_freed < len(freed) and due_step > step:
        num_freed += pop_due(state.due, due_step, freed[num_freed:])
        due_step -= 1
    return num_unknown, num_freed


@jit
def free_unsettled(
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


@parallel_jit
def _evict(
    slots_of_rows: Int32Array,
    rows_of_slots: Int64Array,
    slots: Int32Array,
    num_early: int,
    early_tick: int,
    late_tick: int,
) -> Int64Array:
    """The rows that leave their slots (n,), the first `num_early` of them at `early_tick`; remembers when."""
    rows = np.empty(len(slots), np.int64)
    for part in prange(NUM_PARTS):
        begin, end = part_bounds(part, len(slots))
        num_early_here = min(max(num_early - begin, 0), end - begin)
        _evict_part(slots_of_rows, rows_of_slots, slots[begin:end], rows[begin:end], num_early_here, early_tick, late_tick)
    return rows


@jit
def _evict_part(
    slots_of_rows: Int32Array,
    rows_of_slots: Int64Array,
    slots: Int32Array,
    rows: Int64Array,
    num_early: int,
    early_tick: int,
    late_tick: int,
) -> None:
    for index in range(len(slots)):
        rows[index] = rows_of_slots[np.uint32(slots[index])]
    for index in range(len(slots)):
        prefetch(slots_of_rows, rows[min(index + _AHEAD, len(slots) - 1)], 0)
        slots_of_rows[np.uint64(rows[index]), 0] = -2 - (early_tick if index < num_early else late_tick)


@jit
def assign(
    state: State,
    rows: Int64Array,
    missing: Int32Array,
    slots: Int32Array,
    freed: Int32Array,
    num_settled: int,
    early_tick: int,
) -> tuple[Int64Array, Int32Array, int, int, int]:
    """Gives the i-th freed slot to the i-th missing row, and puts the fetches that may be early before the others.

    Returns (fetch_rows, fetch_slots, how many are early, the latest eviction among the early rows and among the late ones).
    """
    missing_rows = np.empty(len(missing), np.int64)
    evicted_at = np.empty(len(missing), np.int32)
    _take_slots(state.slots_of_rows, state.rows_of_slots, rows, missing, slots, freed, missing_rows, evicted_at)
    fetch_rows = np.empty(len(missing), np.int64)
    fetch_slots = np.empty(len(missing), np.int32)
    num_early, num_late = 0, 0
    early_fence, late_fence = -1, -1
    for index in range(len(missing)):
        if index < num_settled and evicted_at[index] <= early_tick:
            place = num_early
            num_early += 1
            early_fence = max(early_fence, evicted_at[index])
        else:
            num_late += 1
            place = len(missing) - num_late
            late_fence = max(late_fence, evicted_at[index])
        fetch_rows[place] = missing_rows[index]
        fetch_slots[place] = freed[index]
    return fetch_rows, fetch_slots, num_early, early_fence, late_fence


@parallel_jit
def _take_slots(
    slots_of_rows: Int32Array,
    rows_of_slots: Int64Array,
    rows: Int64Array,
    missing: Int32Array,
    slots: Int32Array,
    freed: Int32Array,
    missing_rows: Int64Array,
    evicted_at: Int32Array,
) -> None:
    """Gives the i-th freed slot to the i-th missing row, and tells the row and when it was evicted, -1 for never."""
    for part in prange(NUM_PARTS):
        begin, end = part_bounds(part, len(missing))
        _take_slots_part(
            slots_of_rows,
            rows_of_slots,
            rows,
            missing[begin:end],
            slots,
            freed[begin:end],
            missing_rows[begin:end],
            evicted_at[begin:end],
        )


@jit
def _take_slots_part(
    slots_of_rows: Int32Array,
    rows_of_slots: Int64Array,
    rows: Int64Array,
    missing: Int32Array,
    slots: Int32Array,
    freed: Int32Array,
    missing_rows: Int64Array,
    evicted_at: Int32Array,
) -> None:
    for index in range(len(missing)):
        prefetch(slots_of_rows, rows[missing[min(index + _AHEAD, len(missing) - 1)]], 0)
        row, slot = rows[np.uint32(missing[index])], freed[index]
        missing_rows[index] = row
        evicted_at[index] = -2 - slots_of_rows[np.uint64(row), 0]
        slots_of_rows[np.uint64(row), 0] = slot
        rows_of_slots[np.uint32(slot)] = row
        slots[np.uint32(missing[index])] = slot


@jit
def _keep_uses(slots: Int32Array, first_occurrence: int, slots_of_uses: Int32Array) -> None:
    """Writes a planned batch's slots into the ring."""
    begin = first_occurrence & (len(slots_of_uses) - 1)
    num_first = min(len(slots), len(slots_of_uses) - begin)
    slots_of_uses[begin : begin + num_first] = slots[:num_first]
    slots_of_uses[: len(slots) - num_first] = slots[num_first:]


@partial(threaded, num_threads=NUM_CRITICAL_THREADS)
@jit
def plan(
    state: State,
    admitted: tuple[Int64Array, Int32Array, int],
    rows: Int64Array,
    previous: Int32Array,
    first_occurrence: int,
    oldest_unsettled: int,
    steps: tuple[int, int, int],
    settled: tuple[int, int],
    unsettled: Int64Array,
    num_used_slots: int,
    next_uses: Int32Array,
    slots_of_uses: Int32Array,
) -> tuple[Int32Array, Int32Array, Int64Array, Int64Array, Int32Array, tuple[int, int, int], tuple[int, int, int]]:
    """Admits a batch, and plans a step.

    It finds the rows' slots, settles a batch, frees as many slots as are missing, evicts, assigns and remembers. `admitted` are
    the rows of the batch to admit (none: no batch), their previous uses and its step. `steps` are the step, the tick of its early
    transfers and the last step seen; `settled` and each of `unsettled` (n, 2), oldest first, are the first occurrence and the
    number of rows of a planned batch.

    Returns slots (U,), freed slots, the rows evicted from all but the fresh of them, fetched rows and their slots; how many freed
    slots are fresh, fresh or of rows without a next use, and settled; how many fetches are early, and the latest eviction among the
    early rows and among the late ones.
    """
    step, early_tick, last_seen = steps
    if len(admitted[0]) > 0:
        _admit(state, admitted[0], admitted[1], oldest_unsettled, admitted[2])
    slots, missing = find(state, previous, oldest_unsettled, step, slots_of_uses)
    if settled[1] > 0:
        settle(state, settled[0], settled[1], step, last_seen, next_uses, slots_of_uses)
    freed = np.empty(len(missing), np.int32)
    num_fresh = min(len(missing), len(state.rows_of_slots) - num_used_slots)
    num_unknown, num_settled = free_settled(state, num_fresh, num_used_slots, step, last_seen, freed)
    num_freed = num_settled
    for batch in range(len(unsettled)):
        if num_freed < len(freed):
            num_freed += free_unsettled(unsettled[batch, 0], unsettled[batch, 1], step, next_uses, slots_of_uses, freed[num_freed:])
    if num_freed < len(freed):
        raise AssertionError("fewer slots than rows: admit has checked that the batch fits")
    evict_rows = _evict(state.slots_of_rows, state.rows_of_slots, freed[num_fresh:], num_settled - num_fresh, early_tick, step)
    fetch_rows, fetch_slots, num_early, early_fence, late_fence = assign(
        state, rows, missing, slots, freed, num_settled, early_tick
    )
    _keep_uses(slots, first_occurrence, slots_of_uses)
    return (
        slots,
        freed,
        evict_rows,
        fetch_rows,
        fetch_slots,
        (num_fresh, num_unknown, num_settled),
        (num_early, early_fence, late_fence),
    )
