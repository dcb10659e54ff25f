"""The Cacher's loops, compiled. They work in place on the arrays that `bagpipe.oracle.cacher.Cacher` owns.

`row_states` (num_rows, 2) int32 holds side by side, since both are wanted at once and a row's state is seldom in the CPU's cache,

- `[row, SLOT]`: the row's slot; -1 never evicted, or -2 - tick when it was evicted at that tick;
- `[row, LAST_USE]`: its latest occurrence in the window, -1 for none.

`found` (U, 2) int32 is what `admit` read there for a batch's rows. The eviction queues are those of `bagpipe.oracle._queues`.

Loops over rows first gather what is far away into a small buffer without branching on it, so that many cache misses are under way
at a time, and then decide: with the branch in the gathering loop each wrong guess waited for memory, and `admit` took 3x as long.
"""

from __future__ import annotations

import numpy as np

from bagpipe._jit import jit
from bagpipe._prefetch import prefetch
from bagpipe.oracle._queues import NOT_QUEUED
from bagpipe.types import Int32Array, Int64Array

SLOT, LAST_USE = 0, 1
AHEAD = 16
"""Rows ahead for which a row's state is asked for."""
OCCURRENCES = (1 << 31) - 1
"""Mask of occurrence numbers, which wrap round; rings are powers of two, so a number's low bits stay its place."""


@jit
def admit(
    rows: Int64Array,
    step: int,
    first_occurrence: int,
    row_states: Int32Array,
    next_uses: Int32Array,
    places: Int32Array,
) -> tuple[Int32Array, Int32Array]:
    """Tells each row's previous occurrence that the row comes next at `step`, and takes settled rows off the queue.

    Returns `found` and the slots of the settled rows, which are now due at `step`.
    """
    mask = len(next_uses) - 1
    found = np.empty((len(rows), 2), np.int32)
    for index in range(len(rows)):
        prefetch(row_states, rows[min(index + AHEAD, len(rows) - 1)], SLOT)
        row = np.uint64(rows[index])
        occurrence = (first_occurrence + index) & OCCURRENCES
        found[index, SLOT] = row_states[row, SLOT]
        found[index, LAST_USE] = row_states[row, LAST_USE]
        row_states[row, LAST_USE] = occurrence
        next_uses[occurrence & mask] = -1
    due_slots = np.empty(len(rows), np.int32)
    num_due = 0
    for index in range(len(rows)):
        if found[index, LAST_USE] >= 0:
            next_uses[found[index, LAST_USE] & mask] = step
        elif found[index, SLOT] >= 0:
            places[found[index, SLOT]] = NOT_QUEUED
            due_slots[num_due] = found[index, SLOT]
            num_due += 1
    return found, due_slots[:num_due]


@jit
def copy_ring(ring: Int32Array, larger: Int32Array, first_occurrence: int, num_occurrences: int) -> None:
    """Copies the entries of consecutive occurrences to their places in a larger ring."""
    mask, larger_mask = len(ring) - 1, len(larger) - 1
    for occurrence in range(first_occurrence, first_occurrence + num_occurrences):
        larger[occurrence & larger_mask] = ring[occurrence & mask]


@jit
def settle(
    rows: Int64Array,
    slots: Int32Array,
    first_occurrence: int,
    step: int,
    may_be_gone: bool,
    row_states: Int32Array,
    rows_of_slots: Int64Array,
    next_uses: Int32Array,
    queue: Int32Array,
    queue_ends: Int64Array,
    places: Int32Array,
    num_due_queues: int,
) -> tuple[Int32Array, Int32Array]:
    """Queues a batch's rows that have no next use; those that a step up to `step` used again are passed over.

    Returns the due queues and the slots of all others. `may_be_gone`: some rows may have been evicted before they settled.
    """
    mask = len(next_uses) - 1
    offset = step - step % num_due_queues
    end = queue_ends[1]
    due_queues = np.empty(len(rows), np.int32)
    due_slots = np.empty(len(rows), np.int32)
    num_due = 0
    for index in range(len(rows)):
        next_use = next_uses[(first_occurrence + index) & mask]
        if next_use < 0:
            row_states[np.uint64(rows[index]), LAST_USE] = -1
        elif next_use <= step:
            continue
        if may_be_gone and rows_of_slots[slots[index]] != rows[index]:
            continue
        if next_use < 0:
            places[slots[index]] = end
            queue[end] = slots[index]
            end += 1
        else:
            due_queue = next_use - offset
            due_queues[num_due] = due_queue - num_due_queues if due_queue >= num_due_queues else due_queue
            due_slots[num_due] = slots[index]
            num_due += 1
    queue_ends[1] = end
    return due_queues[:num_due], due_slots[:num_due]


@jit
def find_resident(
    rows: Int64Array, found: Int32Array, row_states: Int32Array, rows_of_slots: Int64Array
) -> tuple[Int32Array, Int32Array]:
    """Returns each row's slot, negative when it has none, and the indices of those rows.

    Most rows are still where `found` says, which the slot itself confirms: it is nearer than the row's state.
    """
    slots = np.empty(len(rows), np.int32)
    missing = np.empty(len(rows), np.int32)
    holds = np.empty(len(rows), np.int64)
    for index in range(len(rows)):
        holds[index] = rows_of_slots[max(found[index, SLOT], 0)]
    num_moved = 0
    for index in range(len(rows)):
        slots[index] = found[index, SLOT]
        missing[num_moved] = index
        num_moved += (found[index, SLOT] < 0) | (holds[index] != rows[index])
    num_missing = 0
    for place in range(num_moved):
        prefetch(row_states, rows[missing[min(place + AHEAD, num_moved - 1)]], SLOT)
        index = missing[place]
        slot = row_states[np.uint64(rows[index]), SLOT]
        slots[index] = slot
        missing[num_missing] = index
        num_missing += slot < 0
    return slots, missing[:num_missing]


@jit
def pop_unsettled(
    rows: Int64Array,
    slots: Int32Array,
    first_occurrence: int,
    step: int,
    rows_of_slots: Int64Array,
    next_uses: Int32Array,
    freed: Int32Array,
) -> int:
    """Moves slots of rows that a recent step used, but no step from then up to `step`, to `freed`; returns how many."""
    mask = len(next_uses) - 1
    num_freed = 0
    for index in range(len(rows)):
        if num_freed == len(freed):
            break
        next_use = next_uses[(first_occurrence + index) & mask]
        if (next_use < 0 or next_use > step) and rows_of_slots[slots[index]] == rows[index]:
            freed[num_freed] = slots[index]
            num_freed += 1
    return num_freed


@jit
def assign(
    rows: Int64Array,
    missing: Int32Array,
    slots: Int32Array,
    freed: Int32Array,
    num_settled: int,
    early_tick: int,
    row_states: Int32Array,
    rows_of_slots: Int64Array,
) -> tuple[Int64Array, Int32Array, int, int, int]:
    """Gives the i-th freed slot to the i-th missing row, and puts the fetches that may be early before the others.

    Returns (fetch_rows, fetch_slots, how many are early, the latest eviction among the early rows and among the late ones).
    """
    fetch_rows = np.empty(len(missing), np.int64)
    fetch_slots = np.empty(len(missing), np.int32)
    num_early, num_late = 0, 0
    early_fence, late_fence = -1, -1
    for index in range(len(missing)):
        row, slot = rows[missing[index]], freed[index]
        evicted_at = -2 - slots[missing[index]]  # -1: never evicted
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
        row_states[np.uint64(row), SLOT] = slot
        rows_of_slots[slot] = row
    return fetch_rows, fetch_slots, num_early, early_fence, late_fence


@jit
def mark_evicted(rows: Int64Array, tick: int, row_states: Int32Array) -> None:
    """Remembers of each row that it left its slot at `tick`."""
    for index in range(len(rows)):
        row_states[np.uint64(rows[index]), SLOT] = -2 - tick


@jit
def expand(slots: Int32Array, inverse: Int32Array) -> Int32Array:
    """The slot of each lookup."""
    lookup_slots = np.empty(len(inverse), np.int32)
    for lookup in range(len(inverse)):
        lookup_slots[lookup] = slots[np.uint32(inverse[lookup])]
    return lookup_slots
