"""The Cacher's step, compiled. It works in place on the arrays of `State`, which `bagpipe.oracle.cacher.Cacher` owns.

`slots_of_uses`, a ring by occurrence (see `bagpipe.oracle.linker`), holds the slots that planned but not yet settled batches use,
negative once evicted: a row used again so soon, as most are, is found there and its far-away state is not touched.

A step is one call, so that its thread seldom has to ask for the GIL, and what may run side by side shares a parallel loop: each
such loop costs the threads a meeting.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np

from bagpipe._jit import NUM_CRITICAL_THREADS, NUM_PARTS, jit, join_parts, parallel_jit, part_bounds, prange, threaded
from bagpipe.oracle._parts import evict_part, find_resident_part, find_unsettled_part, sort_out_part, take_slots_part
from bagpipe.oracle._queues import (
    DueChain,
    DueQueues,
    UnknownQueue,
    empty_due,
    forget_unknown,
    pop_due,
    pop_unknown,
    push_due,
    push_unknown,
    room_for_unknown,
    take_due,
)
from bagpipe.oracle.linker import STEP
from bagpipe.oracle.owners import choose_owners
from bagpipe.types import Int32Array, Int64Array, UInt64Array


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
    counts = _find_resident(state.slots_of_rows, state.unknown, rows, previous, oldest_unsettled, indices, slots)
    push_due(state.due, steps, indices, slots, counts)


admit = threaded(_admit, NUM_CRITICAL_THREADS)


@parallel_jit
def _find_resident(
    slots_of_rows: Int32Array,
    unknown: UnknownQueue,
    rows: Int64Array,
    previous: Int32Array,
    oldest_unsettled: int,
    indices: Int32Array,
    slots: Int32Array,
) -> Int64Array:
    """Fills `indices` and `slots`, in parts, with the settled rows that have a slot, which leave the queue of unknown ones.

    Returns how many there are in each part.
    """
    places = unknown.places  # numba hands arrays and numbers to parallel loops, but no tuples of them
    counts = np.empty(NUM_PARTS, np.int64)
    for part in prange(NUM_PARTS):
        begin, end = part_bounds(part, len(rows))
        counts[part] = find_resident_part(
            slots_of_rows, rows[begin:end], previous[begin:end], oldest_unsettled, indices[begin:end], slots[begin:end], begin
        )
        forget_unknown(places, slots[begin : begin + counts[part]])
    return counts


@parallel_jit
def _take_and_sort_out(
    chain: DueChain,
    slots: Int32Array,
    first_occurrence: int,
    step: int,
    last_seen: int,
    next_uses: Int32Array,
    slots_of_uses: Int32Array,
    unknown: Int32Array,
    due_steps: Int32Array,
    due_indices: Int32Array,
    due_slots: Int32Array,
) -> Int64Array:
    """Writes the slots of rows that were due, and sorts out those of a batch to settle that no step up to `step` has used again.

    Fills `unknown`, in parts, with the slots of rows without a known next use, and the other arrays with those that have one.
    Returns how many of either there are in each part (2, NUM_PARTS).
    """
    chunks, chunks_of_step, begin_due, end_due = chain.chunks, chain.chain, chain.begin, chain.end
    counts = np.empty((2, NUM_PARTS), np.int64)
    for part in prange(NUM_PARTS):
        take_due(chunks, chunks_of_step, (begin_due, end_due), part, slots)
        begin, end = part_bounds(part, len(unknown))
        counts[0, part], counts[1, part] = sort_out_part(
            first_occurrence + begin,
            step,
            last_seen,
            next_uses,
            slots_of_uses,
            unknown[begin:end],
            due_steps[begin:end],
            due_indices[begin:end],
            due_slots[begin:end],
        )
    return counts


@parallel_jit
def _find_and_push(
    previous: Int32Array,
    oldest_unsettled: int,
    slots_of_uses: Int32Array,
    slots: Int32Array,
    missing: Int32Array,
    queue: UnknownQueue,
    unknown: Int32Array,
    counts: Int64Array,
    firsts: Int64Array,
) -> int:
    """Writes the slots of unsettled rows, and the indices of rows without one to `missing`; returns how many of these.

    Also makes the parts of `unknown` the entries of the queue from `firsts` on.
    """
    queue_slots, places = queue.slots, queue.places
    num_missing = np.empty(NUM_PARTS, np.int64)
    for part in prange(NUM_PARTS):
        begin, end = part_bounds(part, len(previous))
        num_missing[part] = find_unsettled_part(
            previous[begin:end], oldest_unsettled, slots_of_uses, slots[begin:end], missing[begin:end], begin
        )
        begin, _ = part_bounds(part, len(unknown))
        push_unknown(queue_slots, places, firsts[part], unknown[begin : begin + counts[part]])
    return join_parts(missing, num_missing)


@jit
def _free_settled(state: State, num_fresh: int, first_fresh: int, step: int, last_seen: int, freed: Int32Array) -> tuple[int, int]:
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
def _free_unsettled(
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
def _exchange(
    state: State,
    rows: Int64Array,
    missing: Int32Array,
    slots: Int32Array,
    freed: Int32Array,
    num_fresh: int,
    num_settled: int,
    early_tick: int,
    late_tick: int,
    evict_rows: Int64Array,
    missing_rows: Int64Array,
    evicted_at: Int32Array,
) -> None:
    """Takes the i-th freed slot from its row, unless it is fresh, and gives it to the i-th missing one.

    Tells who leaves, in `evict_rows`, at `early_tick` from a settled slot; who comes, and when that row was evicted, -1 for never.
    """
    slots_of_rows, rows_of_slots = state.slots_of_rows, state.rows_of_slots
    for part in prange(NUM_PARTS):
        begin, end = part_bounds(part, len(missing))
        first = min(max(begin, num_fresh), end)
        evict_part(
            slots_of_rows,
            rows_of_slots,
            freed[first:end],
            evict_rows[first - num_fresh : end - num_fresh] if first < end else evict_rows[:0],
            min(max(num_settled - first, 0), end - first),
            early_tick,
            late_tick,
        )
        take_slots_part(
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
def _early_first(
    missing_rows: Int64Array, evicted_at: Int32Array, freed: Int32Array, num_settled: int, early_tick: int
) -> tuple[Int64Array, Int32Array, int, int, int]:
    """Puts the fetches that may be early before the others: to a settled slot, of a row not evicted later.

    Returns (fetch_rows, fetch_slots, how many are early, the latest eviction among the early rows and among the late ones).
    """
    fetch_rows = np.empty(len(freed), np.int64)
    fetch_slots = np.empty(len(freed), np.int32)
    num_early, num_late = 0, 0
    early_fence, late_fence = -1, -1
    for index in range(len(freed)):
        if index < num_settled and evicted_at[index] <= early_tick:
            place = num_early
            num_early += 1
            early_fence = max(early_fence, evicted_at[index])
        else:
            num_late += 1
            place = len(freed) - num_late
            late_fence = max(late_fence, evicted_at[index])
        fetch_rows[place] = missing_rows[index]
        fetch_slots[place] = freed[index]
    return fetch_rows, fetch_slots, num_early, early_fence, late_fence


@jit
def _keep_uses(slots: Int32Array, first_occurrence: int, slots_of_uses: Int32Array) -> None:
    """Writes a planned batch's slots into the ring."""
    begin = first_occurrence & (len(slots_of_uses) - 1)
    num_first = min(len(slots), len(slots_of_uses) - begin)
    slots_of_uses[begin : begin + num_first] = slots[:num_first]
    slots_of_uses[: len(slots) - num_first] = slots[num_first:]


@jit
def _find_and_settle(
    state: State,
    previous: Int32Array,
    oldest_unsettled: int,
    step: int,
    last_seen: int,
    settled: tuple[int, int],
    next_uses: Int32Array,
    slots_of_uses: Int32Array,
) -> tuple[Int32Array, Int32Array]:
    """Finds the slots of a step's rows, negative where they have none, and puts a batch's rows into the eviction queues.

    Returns the slots and the indices of the rows without one.
    """
    num_kept = settled[1]
    slots, missing = np.full(len(previous), -1, np.int32), np.empty(len(previous), np.int32)
    unknown, due_steps = np.empty(num_kept, np.int32), np.empty(num_kept, np.int32)
    due_indices, due_slots = np.empty(num_kept, np.int32), np.empty(num_kept, np.int32)
    counts = _take_and_sort_out(
        empty_due(state.due, step),
        slots,
        settled[0],
        step,
        last_seen,
        next_uses,
        slots_of_uses,
        unknown,
        due_steps,
        due_indices,
        due_slots,
    )
    num_pushed = counts[0].sum()
    room_for_unknown(state.unknown, num_pushed)
    firsts = state.unknown.ends[1] + np.cumsum(counts[0]) - counts[0]
    num_missing = _find_and_push(
        previous, oldest_unsettled, slots_of_uses, slots, missing, state.unknown, unknown, counts[0], firsts
    )
    state.unknown.ends[1] += num_pushed
    push_due(state.due, due_steps, due_indices, due_slots, counts[1])
    return slots, missing[:num_missing]


@jit
def _free(
    state: State,
    num_missing: int,
    step: int,
    last_seen: int,
    unsettled: Int64Array,
    num_used_slots: int,
    next_uses: Int32Array,
    slots_of_uses: Int32Array,
) -> tuple[Int32Array, int, int, int]:
    """Frees as many slots as are missing.

    Returns them, and how many are fresh, fresh or of rows without a next use, and settled.
    """
    freed = np.empty(num_missing, np.int32)
    num_fresh = min(num_missing, len(state.rows_of_slots) - num_used_slots)
    num_unknown, num_settled = _free_settled(state, num_fresh, num_used_slots, step, last_seen, freed)
    num_freed = num_settled
    for batch in range(len(unsettled)):
        if num_freed < len(freed):
            first, num_uniques = unsettled[batch]
            num_freed += _free_unsettled(first, num_uniques, step, next_uses, slots_of_uses, freed[num_freed:])
    if num_freed < len(freed):
        raise AssertionError("fewer slots than rows: admit has checked that the batch fits")
    return freed, num_fresh, num_unknown, num_settled


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
    users: UInt64Array,
    num_trainers: int,
) -> tuple[Int32Array, Int32Array, Int64Array, Int64Array, Int32Array, tuple[int, int, int], tuple[int, int, int]]:
    """Admits a batch, and plans a step.

    It finds the rows' slots, settles a batch, frees as many slots as are missing, evicts, assigns and remembers. `admitted` are
    the rows of the batch to admit (none: no batch), their previous uses and its step. `steps` are the step, the tick of its early
    transfers and the last step seen; `settled` and each of `unsettled` (n, 2), oldest first, are the first occurrence and the
    number of rows of a planned batch. `users` (U,), of several trainers, are the sets of ranks that use the rows.

    Returns slots (U,), freed slots, the rows evicted from all but the fresh of them, fetched rows and their slots; how many freed
    slots are fresh, fresh or of rows without a next use, and settled; how many fetches are early, and the latest eviction among the
    early rows and among the late ones.
    """
    step, early_tick, last_seen = steps
    if len(admitted[0]) > 0:
        _admit(state, admitted[0], admitted[1], oldest_unsettled, admitted[2])
    slots, missing = _find_and_settle(state, previous, oldest_unsettled, step, last_seen, settled, next_uses, slots_of_uses)
    freed, num_fresh, num_unknown, num_settled = _free(
        state, len(missing), step, last_seen, unsettled, num_used_slots, next_uses, slots_of_uses
    )
    if num_trainers > 1:
        missing = choose_owners(missing, users, freed, num_trainers)
    evict_rows = np.empty(len(freed) - num_fresh, np.int64)
    missing_rows, evicted_at = np.empty(len(freed), np.int64), np.empty(len(freed), np.int32)
    _exchange(
        state,
        rows,
        missing,
        slots,
        freed,
        num_fresh,
        num_settled,
        early_tick,
        step,
        evict_rows,
        missing_rows,
        evicted_at,
    )
    fetch_rows, fetch_slots, num_early, early_fence, late_fence = _early_first(
        missing_rows, evicted_at, freed, num_settled, early_tick
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
