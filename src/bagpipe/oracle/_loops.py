"""The Cacher's step, compiled. It works in place on the arrays of `State`, which
`bagpipe.oracle.cacher.Cacher` owns.

`slots_of_uses`, a ring by occurrence (see `bagpipe.oracle.linker`), holds the slots that planned
but not yet settled batches use, negative once evicted: a row used again so soon, as most are, is
found there and its far-away state is not touched.

A step is one call, so that its thread seldom has to ask for the GIL. Threads share its shards (see
`bagpipe.oracle.shards`): each shard plans its part of the step from end to end, and the threads
meet only to join the parts.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np

from bagpipe._jit import NUM_CRITICAL_THREADS, jit, parallel_jit, prange, threaded
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
from bagpipe.oracle._row_loops import (
    early_first,
    evict,
    find_resident,
    find_unsettled,
    free_unsettled,
    keep_uses,
    sort_out,
    take_slots,
)
from bagpipe.oracle.owners import choose_owners
from bagpipe.oracle.shards import slot_at
from bagpipe.types import Int32Array, Int64Array, UInt64Array

EVICTED, EVICTED_EARLY, EVICTED_BLINDLY, FETCHED, FETCHED_EARLY, EARLY_FENCE, LATE_FENCE, DONE = (
    range(8)
)
"""What is counted of a step: rows of each kind, the latest evictions of rows fetched early and
late, -1 for none, and shards."""


class State(NamedTuple):
    """What the Cacher knows of rows and slots. Each of S shards has queues of its own."""

    # (num_rows, 1) each row's slot; -1: never evicted, -2 - tick: evicted at that tick
    slots_of_rows: Int32Array
    rows_of_slots: Int64Array  # (num_slots,)
    # (S + 1,) a shard has the slots from one bound to the next, counted as `slot_at` does
    slot_bounds: Int64Array
    num_used: Int64Array  # (S,) how many of these were ever filled
    unknown: UnknownQueue
    due: DueQueues


class Batch(NamedTuple):
    """The distinct rows of a batch."""

    rows: Int64Array  # (U,)
    previous: Int32Array  # (U,) their previous uses
    users: UInt64Array  # (U,) sets of ranks; only of several trainers
    bounds: Int64Array  # (S + 1,) a shard has the rows from one bound to the next
    first_occurrence: int


class Ticks(NamedTuple):
    """The clock of a step."""

    step: int
    early: int  # the tick of its early transfers
    last_seen: int  # the last step in the window
    oldest_unsettled: int  # the first occurrence that is not settled


class Ranks(NamedTuple):
    """Whose slots they are."""

    num_trainers: int
    num_hosts: int


class Uses(NamedTuple):
    """The rings of occurrences: the linker's and the Cacher's."""

    next_uses: Int32Array
    slots_of_uses: Int32Array


class Moved(NamedTuple):
    """Rows that are evicted or fetched, with their slots: the early ones before the late ones."""

    rows: Int64Array
    slots: Int32Array


class _Shard(NamedTuple):
    """`State` as one shard sees it."""

    slots_of_rows: Int32Array
    rows_of_slots: Int64Array
    first_fresh: int  # where its slots lie that were never filled
    last_fresh: int  # behind these
    host_slots: int
    unknown: UnknownQueue
    due: DueQueues


@partial(threaded, num_threads=NUM_CRITICAL_THREADS)
@parallel_jit
def admit(state: State, batch: Batch, oldest_unsettled: int, step: int) -> None:
    """Makes a new batch's settled rows, which had no known next use, due at its step."""
    slots_of_rows, places = state.slots_of_rows, state.unknown.places
    chunks, chains, queues = state.due.chunks, state.due.chains, state.due.queues
    rows, previous, bounds = batch.rows, batch.previous, batch.bounds
    is_done = np.zeros(len(bounds) - 1, np.bool_)
    for shard in prange(len(bounds) - 1):
        due = DueQueues(chunks[shard], chains[shard], queues[shard])
        _admit(
            slots_of_rows,
            places,
            due,
            rows,
            previous,
            bounds[shard],
            bounds[shard + 1],
            oldest_unsettled,
            step,
        )
        is_done[shard] = True
    if not is_done.all():  # an error in a parallel loop ends the loop, and is lost
        raise AssertionError("a batch could not be admitted: memory is full")


@partial(threaded, num_threads=NUM_CRITICAL_THREADS)
@parallel_jit
def plan(
    state: State,
    admitted: Batch,
    batch: Batch,
    recent: Int64Array,
    ticks: Ticks,
    uses: Uses,
    ranks: Ranks,
) -> tuple[Int32Array, tuple[Int64Array, Int32Array], tuple[Int64Array, Int32Array], Int64Array]:
    """Admits the window's last batch, unless it has no rows, and plans a step.

    `recent` (n, S + 1) are the bounds of planned batches' occurrences by shard: of the batch to
    settle, then of unsettled ones, the oldest first. Returns slots (U,), who is evicted, who is
    fetched, each as rows and slots, and what is counted of that.
    """
    # numba hands no tuples to parallel loops, and drops what they write to an array that came from
    # unpacking one.
    slots_of_rows, rows_of_slots = state.slots_of_rows, state.rows_of_slots
    slot_bounds, num_used = state.slot_bounds, state.num_used
    unknown_slots, ends, places = state.unknown.slots, state.unknown.ends, state.unknown.places
    chunks, chains, queues = state.due.chunks, state.due.chains, state.due.queues
    new_rows, new_previous, new_bounds = admitted.rows, admitted.previous, admitted.bounds
    rows, previous, users, bounds = batch.rows, batch.previous, batch.users, batch.bounds
    first_occurrence, next_uses, slots_of_uses = (
        batch.first_occurrence,
        uses.next_uses,
        uses.slots_of_uses,
    )
    step, early, last_seen, oldest_unsettled = (
        ticks.step,
        ticks.early,
        ticks.last_seen,
        ticks.oldest_unsettled,
    )
    num_trainers, num_hosts, host_slots = (
        ranks.num_trainers,
        ranks.num_hosts,
        slot_bounds[-1] // ranks.num_hosts,
    )
    slots = np.empty(len(rows), np.int32)
    evict_rows, evict_slots = np.empty(len(rows), np.int64), np.empty(len(rows), np.int32)
    fetch_rows, fetch_slots = np.empty(len(rows), np.int64), np.empty(len(rows), np.int32)
    counts = np.zeros((len(num_used), DONE + 1), np.int64)
    for shard in prange(len(num_used)):
        due = DueQueues(chunks[shard], chains[shard], queues[shard])
        begin, end = new_bounds[shard], new_bounds[shard + 1]
        _admit(
            slots_of_rows,
            places,
            due,
            new_rows,
            new_previous,
            begin,
            end,
            oldest_unsettled,
            last_seen,
        )
        unknown = UnknownQueue(unknown_slots[shard], ends[shard], places)
        first_fresh, last_fresh = slot_bounds[shard] + num_used[shard], slot_bounds[shard + 1]
        _plan(
            _Shard(slots_of_rows, rows_of_slots, first_fresh, last_fresh, host_slots, unknown, due),
            Batch(rows, previous, users, bounds, first_occurrence),
            bounds[shard],
            bounds[shard + 1],
            recent[:, shard : shard + 2],
            Ticks(step, early, last_seen, oldest_unsettled),
            Uses(next_uses, slots_of_uses),
            Ranks(num_trainers, num_hosts),
            slots,
            Moved(evict_rows, evict_slots),
            Moved(fetch_rows, fetch_slots),
            counts[shard],
        )
        # what nobody had to leave was fresh
        num_used[shard] += counts[shard, FETCHED] - counts[shard, EVICTED]
    totals = counts.sum(axis=0)
    if totals[DONE] < len(num_used):  # as in `admit`
        raise AssertionError(
            "a shard could not be planned: it has fewer slots than rows, which admit checks, or "
            "memory is full"
        )
    for fence in (EARLY_FENCE, LATE_FENCE):
        totals[fence] = counts[:, fence].max()
    evicted_rows, evicted_slots = (
        np.empty(totals[EVICTED], np.int64),
        np.empty(totals[EVICTED], np.int32),
    )
    fetched_rows, fetched_slots = (
        np.empty(totals[FETCHED], np.int64),
        np.empty(totals[FETCHED], np.int32),
    )
    for shard in prange(len(num_used)):
        begin = bounds[shard]
        _join(
            shard,
            begin,
            counts[:, EVICTED],
            counts[:, EVICTED_EARLY],
            Moved(evict_rows, evict_slots),
            Moved(evicted_rows, evicted_slots),
        )
        _join(
            shard,
            begin,
            counts[:, FETCHED],
            counts[:, FETCHED_EARLY],
            Moved(fetch_rows, fetch_slots),
            Moved(fetched_rows, fetched_slots),
        )
    return slots, (evicted_rows, evicted_slots), (fetched_rows, fetched_slots), totals


@jit
def _admit(
    slots_of_rows: Int32Array,
    places: Int32Array,
    due: DueQueues,
    rows: Int64Array,
    previous: Int32Array,
    begin: int,
    end: int,
    oldest_unsettled: int,
    step: int,
) -> None:
    """`admit` for the rows of one shard."""
    indices, slots = np.empty(end - begin, np.int32), np.empty(end - begin, np.int32)
    count = find_resident(
        slots_of_rows, rows[begin:end], previous[begin:end], oldest_unsettled, indices, slots, begin
    )
    forget_unknown(places, slots[:count])
    push_due(due, np.full(count, step, np.int32), indices[:count], slots[:count])


@jit
def _plan(
    shard: _Shard,
    batch: Batch,
    begin: int,
    end: int,
    recent: Int64Array,
    ticks: Ticks,
    uses: Uses,
    ranks: Ranks,
    all_slots: Int32Array,
    evicted: Moved,
    fetched: Moved,
    counts: Int64Array,
) -> None:
    """`plan` for one shard, which has the batch's rows from `begin` to `end`.

    Finds their slots, settles, frees as many slots as are missing, evicts, assigns and remembers.
    Fills `all_slots`, `evicted` and `fetched` from `begin` on; counts itself once it is done.
    """
    rows, slots = batch.rows[begin:end], all_slots[begin:end]
    slots[:] = -1
    take_due(shard.due, ticks.step, all_slots)
    _settle(shard, recent[0], ticks, uses)
    missing = np.empty(len(slots), np.int32)
    num_missing = find_unsettled(
        batch.previous[begin:end], ticks.oldest_unsettled, uses.slots_of_uses, slots, missing
    )
    missing, freed = missing[:num_missing], np.empty(num_missing, np.int32)
    num_fresh, num_unknown, num_settled, num_freed = _free(
        shard, recent[1:], ticks, uses, ranks, freed
    )
    if num_freed < num_missing:
        return
    if ranks.num_trainers > 1:
        missing = choose_owners(missing, batch.users[begin:end], freed, ranks.num_trainers)

    num_evicted, num_early = num_missing - num_fresh, num_settled - num_fresh
    evicted.slots[begin : begin + num_evicted] = freed[num_fresh:]
    evict(
        shard.slots_of_rows,
        shard.rows_of_slots,
        freed[num_fresh:],
        evicted.rows[begin : begin + num_evicted],
        num_early,
        ticks.early,
        ticks.step,
    )
    counts[EVICTED], counts[EVICTED_EARLY], counts[EVICTED_BLINDLY] = (
        num_evicted,
        num_early,
        num_unknown - num_fresh,
    )

    missing_rows, evicted_at = np.empty(num_missing, np.int64), np.empty(num_missing, np.int32)
    take_slots(
        shard.slots_of_rows,
        shard.rows_of_slots,
        rows,
        missing,
        slots,
        freed,
        missing_rows,
        evicted_at,
    )
    counts[FETCHED] = num_missing
    counts[FETCHED_EARLY], counts[EARLY_FENCE], counts[LATE_FENCE] = early_first(
        missing_rows,
        evicted_at,
        freed,
        num_settled,
        ticks.early,
        fetched.rows[begin:end],
        fetched.slots[begin:end],
    )
    keep_uses(slots, batch.first_occurrence + begin, uses.slots_of_uses)
    counts[DONE] = 1


@jit
def _settle(shard: _Shard, settled: Int64Array, ticks: Ticks, uses: Uses) -> None:
    """Puts the rows of a batch's occurrences, between two bounds, into the eviction queues unless
    they are in use again.
    """
    num_settled = settled[1] - settled[0]
    unknown, steps = np.empty(num_settled, np.int32), np.empty(num_settled, np.int32)
    indices, slots = np.empty(num_settled, np.int32), np.empty(num_settled, np.int32)
    num_unknown, num_due = sort_out(
        settled,
        ticks.step,
        ticks.last_seen,
        uses.next_uses,
        uses.slots_of_uses,
        unknown,
        steps,
        indices,
        slots,
    )
    push_unknown(shard.unknown, unknown[:num_unknown])
    push_due(shard.due, steps[:num_due], indices[:num_due], slots[:num_due])


@jit
def _free(
    shard: _Shard, unsettled: Int64Array, ticks: Ticks, uses: Uses, ranks: Ranks, freed: Int32Array
) -> tuple[int, int, int, int]:
    """Fills `freed` with slots never filled, of rows without a next use, of those with the
    farthest, and of unsettled rows.

    Returns how many are of the first kind, of the first two, of the first three, and of all.
    """
    num_fresh = min(len(freed), shard.last_fresh - shard.first_fresh)
    for index in range(num_fresh):
        freed[index] = slot_at(
            shard.first_fresh + index, shard.host_slots, ranks.num_trainers, ranks.num_hosts
        )
    num_unknown = num_fresh + pop_unknown(shard.unknown, freed[num_fresh:])
    num_freed = num_unknown
    due_step = ticks.last_seen
    while num_freed < len(freed) and due_step > ticks.step:
        num_freed += pop_due(shard.due, due_step, freed[num_freed:])
        due_step -= 1
    num_settled = num_freed
    for batch in range(len(unsettled)):
        if num_freed < len(freed):
            num_freed += free_unsettled(
                unsettled[batch], ticks.step, uses.next_uses, uses.slots_of_uses, freed[num_freed:]
            )
    return num_fresh, num_unknown, num_settled, num_freed


@jit
def _join(
    shard: int,
    begin: int,
    num_moved: Int64Array,
    num_early: Int64Array,
    parts: Moved,
    joined: Moved,
) -> None:
    """Copies a shard's part, which begins at `begin`, behind those of the shards before it; numbers
    are of all shards (S,).
    """
    early, late = num_early[shard], num_moved[shard] - num_early[shard]
    first_early = num_early[:shard].sum()
    first_late = num_early.sum() + num_moved[:shard].sum() - first_early
    joined.rows[first_early : first_early + early] = parts.rows[begin : begin + early]
    joined.slots[first_early : first_early + early] = parts.slots[begin : begin + early]
    joined.rows[first_late : first_late + late] = parts.rows[begin + early : begin + early + late]
    joined.slots[first_late : first_late + late] = parts.slots[begin + early : begin + early + late]
