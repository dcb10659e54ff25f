"""The Cacher's loops, compiled. They work in place on the arrays of `State`, which `bagpipe.oracle.cacher.Cacher` owns.

`slots_of_uses`, a ring by occurrence (see `bagpipe.oracle.linker`), holds the slots that planned but not yet settled batches use,
negative once evicted: a row used again so soon, as most are, is found there and its far-away state is not touched.

Loops first gather what is far away into a small buffer without branching on it, so that many cache misses are under way at a time,
and then decide. A step is three calls, so that its thread seldom has to ask for the GIL.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bagpipe._jit import jit
from bagpipe._prefetch import prefetch
from bagpipe.oracle._queues import (
    NOT_QUEUED,
    DueQueues,
    UnknownQueue,
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
def admit(state: State, rows: Int64Array, previous: Int32Array, oldest_unsettled: int, step: int) -> None:
    """Makes a new batch's settled rows, which had no known next use, due at `step`."""
    indices = np.empty(len(rows), np.int32)
    num_settled = 0
    for index in range(len(rows)):
        indices[num_settled] = index
        is_settled = (previous[index] < 0) | (((previous[index] - oldest_unsettled) & OCCURRENCES) >= _RECENT)
        num_settled += is_settled
    slots = np.empty(num_settled, np.int32)
    num_resident = 0
    for place in range(num_settled):
        prefetch(state.slots_of_rows, rows[indices[min(place + _AHEAD, num_settled - 1)]], 0)
        index = indices[place]
        slot = state.slots_of_rows[np.uint64(rows[index]), 0]
        slots[num_resident] = slot
        indices[num_resident] = index
        num_resident += slot >= 0
    for place in range(num_resident):
        state.unknown.places[slots[place]] = NOT_QUEUED
    steps = np.full(num_resident, step, np.int32)
    push_due(state.due, steps, indices[:num_resident], slots[:num_resident])


@jit
def find(
    state: State, previous: Int32Array, oldest_unsettled: int, step: int, slots_of_uses: Int32Array
) -> tuple[Int32Array, Int32Array]:
    """The slot of each row that a step needs, negative where it has none, and the indices of those rows."""
    slots = np.full(len(previous), -1, np.int32)
    take_due(state.due, step, slots)
    mask = len(slots_of_uses) - 1
    for index in range(len(previous)):
        is_unsettled = (previous[index] >= 0) & (((previous[index] - oldest_unsettled) & OCCURRENCES) < _RECENT)
        slot = slots_of_uses[previous[index] & mask]
        slots[index] = slot if is_unsettled else slots[index]
    missing = np.empty(len(previous), np.int32)
    num_missing = 0
    for index in range(len(previous)):
        missing[num_missing] = index
        num_missing += slots[index] < 0
    return slots, missing[:num_missing].copy()


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
    push_unknown(state.unknown, unknown[:num_unknown])
    push_due(state.due, steps[:num_due], indices[:num_due], slots[:num_due])


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


@jit
def evict(state: State, slots: Int32Array, num_early: int, early_tick: int, late_tick: int) -> Int64Array:
    """The rows that leave their slots (n,), the first `num_early` of them at `early_tick`; remembers when."""
    rows = np.empty(len(slots), np.int64)
    for index in range(len(slots)):
        rows[index] = state.rows_of_slots[slots[index]]
    for index in range(len(slots)):
        prefetch(state.slots_of_rows, rows[min(index + _AHEAD, len(slots) - 1)], 0)
        state.slots_of_rows[np.uint64(rows[index]), 0] = -2 - (early_tick if index < num_early else late_tick)
    return rows


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
    fetch_rows = np.empty(len(missing), np.int64)
    fetch_slots = np.empty(len(missing), np.int32)
    num_early, num_late = 0, 0
    early_fence, late_fence = -1, -1
    for index in range(len(missing)):
        prefetch(state.slots_of_rows, rows[missing[min(index + _AHEAD, len(missing) - 1)]], 0)
        row, slot = rows[missing[index]], freed[index]
        evicted_at = -2 - state.slots_of_rows[np.uint64(row), 0]  # -1: never evicted
        if index < num_settled and evicted_at <= early_tick:
            place = num_early
            num_early += 1
            early_fence = max(early_fence, evicted_at)
        else:
            num_late += 1
            place = len(missing) - num_late
            late_fence = max(late_fence, evicted_at)
        fetch_rows[place] = row
        fetch_slots[place] = slot
        slots[missing[index]] = slot
        state.slots_of_rows[np.uint64(row), 0] = slot
        state.rows_of_slots[slot] = row
    return fetch_rows, fetch_slots, num_early, early_fence, late_fence


@jit
def keep_uses(slots: Int32Array, first_occurrence: int, slots_of_uses: Int32Array) -> None:
    """Writes a planned batch's slots into the ring."""
    mask = len(slots_of_uses) - 1
    for index in range(len(slots)):
        slots_of_uses[(first_occurrence + index) & mask] = slots[index]


@jit
def find_and_free(
    state: State,
    previous: Int32Array,
    oldest_unsettled: int,
    step: int,
    last_seen: int,
    settled: tuple[int, int],
    num_used_slots: int,
    next_uses: Int32Array,
    slots_of_uses: Int32Array,
) -> tuple[Int32Array, Int32Array, Int32Array, int, int, int]:
    """A step's first half: finds the rows' slots, settles a batch (first occurrence, number of rows), and frees settled slots.

    Returns (slots, missing, freed, how many of these were never used, how many there are with those without a next use, in all).
    """
    slots, missing = find(state, previous, oldest_unsettled, step, slots_of_uses)
    if settled[1] > 0:
        settle(state, settled[0], settled[1], step, last_seen, next_uses, slots_of_uses)
    freed = np.empty(len(missing), np.int32)
    num_fresh = min(len(missing), len(state.rows_of_slots) - num_used_slots)
    num_unknown, num_freed = free_settled(state, num_fresh, num_used_slots, step, last_seen, freed)
    return slots, missing, freed, num_fresh, num_unknown, num_freed


@jit
def move(
    state: State,
    rows: Int64Array,
    missing: Int32Array,
    slots: Int32Array,
    freed: Int32Array,
    num_fresh: int,
    num_settled: int,
    early_tick: int,
    step: int,
    first_occurrence: int,
    slots_of_uses: Int32Array,
) -> tuple[Int64Array, Int64Array, Int32Array, int, int, int]:
    """A step's second half: evicts, assigns and remembers. Returns (evict_rows, what `assign` returns)."""
    evict_rows = evict(state, freed[num_fresh:], num_settled - num_fresh, early_tick, step)
    fetch_rows, fetch_slots, num_early, early_fence, late_fence = assign(
        state, rows, missing, slots, freed, num_settled, early_tick
    )
    keep_uses(slots, first_occurrence, slots_of_uses)
    return evict_rows, fetch_rows, fetch_slots, num_early, early_fence, late_fence
