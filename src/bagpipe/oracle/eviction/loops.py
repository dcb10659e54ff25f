"""The Cacher's step, compiled: all shards side by side.

It works in place on the arrays of `State`, which `bagpipe.oracle.eviction.cacher.Cacher` owns.

`slots_of_uses`, a ring by occurrence (`bagpipe.oracle.linker`), holds the slots that recently
planned batches use. Most rows are used again soon. Such a row's slot is found in the ring, near by
in memory, unless a tight cache has settled the row already.

A step is one call, so that its thread seldom has to ask for the GIL. Threads divide its shards
among them (`bagpipe.oracle.shards`). Each shard plans its part of the step from end to end, and the
threads meet only to join the parts.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np

from bagpipe.native.jit import NUM_CRITICAL_THREADS, jit, parallel_jit, prange, threaded
from bagpipe.oracle.eviction.moved import DONE, EVICTED, FETCHED, Moved, join, total_counts
from bagpipe.oracle.eviction.queues import DueQueues, UnknownQueue
from bagpipe.oracle.eviction.shard_loops import (
    Batch,
    Shard,
    Ticks,
    Uses,
    admit_shard,
    plan_shard,
)
from bagpipe.types import Int32Array, Int64Array


class State(NamedTuple):
    """What the Cacher knows of rows and slots; each of the S shards has queues of its own."""

    # (num_rows, 1) each row's slot; -1 for a row never cached, -2 - tick for one evicted at a tick
    slots_of_rows: Int32Array
    rows_of_slots: Int64Array  # (num_slots,)
    # (S + 1,) a shard has the slots from one bound to the next
    slot_bounds: Int64Array
    num_used: Int64Array  # (S,) how many of a shard's slots were ever filled
    oldest_unsettled: Int64Array  # (S,) the first occurrence that is not settled
    unknown: UnknownQueue
    due: DueQueues


@jit
def admit(state: State, batch: Batch, step: int) -> None:
    """Makes those rows of a new batch that are settled and cached due at its step."""
    slots_of_rows, places = state.slots_of_rows, state.unknown.places
    chunks, chains, queues = state.due.chunks, state.due.chains, state.due.queues
    rows, previous, bounds = batch.rows, batch.previous, batch.bounds
    oldest_unsettled = state.oldest_unsettled
    # Threads would not pay: `plan` admits all batches, unless the window grows.
    for shard in range(len(bounds) - 1):
        due = DueQueues(chunks[shard], chains[shard], queues[shard])
        admit_shard(
            slots_of_rows,
            places,
            due,
            rows,
            previous,
            bounds[shard],
            bounds[shard + 1],
            oldest_unsettled[shard],
            step,
        )


@partial(threaded, num_threads=NUM_CRITICAL_THREADS)
@parallel_jit
def plan(
    state: State,
    admitted: Batch,
    batch: Batch,
    recent: Int64Array,
    ticks: Ticks,
    uses: Uses,
    num_trainers: int,
) -> tuple[Int32Array, tuple[Int64Array, Int32Array], tuple[Int64Array, Int32Array], Int64Array]:
    """Admits the window's last batch and plans a step.

    Args:
        state: The Cacher's arrays, changed in place.
        admitted: The batch to admit; it has no rows where there is none.
        batch: The batch to plan.
        recent: (n, S + 1) for planned batches the bounds of their occurrences by shard. The first
            is the batch that is old enough to settle; younger ones follow, the oldest first.
        ticks: The clock.
        uses: The rings of occurrences.
        num_trainers: How many trainers have the cache together.

    Returns:
        The slots of the batch's rows (U,); the rows evicted and their slots; the rows fetched and
        their slots; and the counts that `moved` names.
    """
    # numba hands no tuples to parallel loops, and loses what they write to an array that was
    # unpacked from a tuple inside the loop.
    slots_of_rows, rows_of_slots = state.slots_of_rows, state.rows_of_slots
    slot_bounds, num_used = state.slot_bounds, state.num_used
    oldest_unsettled = state.oldest_unsettled
    unknown_slots, ends, places = state.unknown.slots, state.unknown.ends, state.unknown.places
    chunks, chains, queues = state.due.chunks, state.due.chains, state.due.queues
    new_rows, new_previous, new_bounds = admitted.rows, admitted.previous, admitted.bounds
    rows, previous, users, bounds = batch.rows, batch.previous, batch.users, batch.bounds
    first_occurrence = batch.first_occurrence
    next_uses, slots_of_uses = uses.next_uses, uses.slots_of_uses
    step, overlapped, last_seen = ticks.step, ticks.overlapped, ticks.last_seen
    slots = np.empty(len(rows), np.int32)
    evict_rows, evict_slots = np.empty(len(rows), np.int64), np.empty(len(rows), np.int32)
    fetch_rows, fetch_slots = np.empty(len(rows), np.int64), np.empty(len(rows), np.int32)
    counts = np.zeros((len(num_used), DONE + 1), np.int64)
    for shard in prange(len(num_used)):
        due = DueQueues(chunks[shard], chains[shard], queues[shard])
        begin, end = new_bounds[shard], new_bounds[shard + 1]
        admit_shard(
            slots_of_rows,
            places,
            due,
            new_rows,
            new_previous,
            begin,
            end,
            oldest_unsettled[shard],
            last_seen,
        )
        unknown = UnknownQueue(unknown_slots[shard], ends[shard], places)
        first_slot, last_fresh = slot_bounds[shard], slot_bounds[shard + 1]
        oldest_unsettled[shard] = plan_shard(
            Shard(
                slots_of_rows,
                rows_of_slots,
                first_slot + num_used[shard],
                last_fresh,
                last_fresh - first_slot,
                unknown,
                due,
            ),
            Batch(rows, previous, users, bounds, first_occurrence),
            bounds[shard],
            bounds[shard + 1],
            recent[:, shard : shard + 2],
            oldest_unsettled[shard],
            Ticks(step, overlapped, last_seen),
            Uses(next_uses, slots_of_uses),
            num_trainers,
            slots,
            Moved(evict_rows, evict_slots),
            Moved(fetch_rows, fetch_slots),
            counts[shard],
        )
        # A fetch for which no row was evicted took a slot that was never filled before.
        num_used[shard] += counts[shard, FETCHED] - counts[shard, EVICTED]
    totals = total_counts(counts)
    # numba ends a parallel loop at an error and drops the error, so shards say that they are done.
    if totals[DONE] < len(num_used):
        raise AssertionError(
            "a shard could not be planned: it has fewer slots than rows, which admit checks, or "
            "memory is full"
        )
    moved_out, moved_in = join(
        bounds, counts, Moved(evict_rows, evict_slots), Moved(fetch_rows, fetch_slots)
    )
    return slots, moved_out, moved_in, totals
