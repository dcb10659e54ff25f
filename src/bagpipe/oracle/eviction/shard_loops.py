"""What the Cacher does for one shard in a step, compiled.

`bagpipe.oracle.eviction.loops` runs all shards side by side.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bagpipe.native.jit import jit
from bagpipe.oracle.eviction.moved import (
    DONE,
    EVICTED,
    EVICTED_BLINDLY,
    EVICTED_OVERLAPPED,
    FETCHED,
    FETCHED_OVERLAPPED,
    OVERLAPPED_FENCE,
    URGENT_FENCE,
    Moved,
)
from bagpipe.oracle.eviction.queues import (
    DueQueues,
    UnknownQueue,
    forget_unknown,
    pop_due,
    pop_unknown,
    push_due,
    push_unknown,
    take_due,
)
from bagpipe.oracle.eviction.row_loops import (
    evict,
    find_resident,
    find_unsettled,
    is_before,
    keep_uses,
    old_first,
    overlapped_first,
    sort_out,
    take_slots,
)
from bagpipe.oracle.owners import choose_owners
from bagpipe.types import Int32Array, Int64Array, UInt64Array


class Batch(NamedTuple):
    """The unique rows of a batch."""

    rows: Int64Array  # (U,)
    previous: Int32Array  # (U,) their previous occurrences
    users: UInt64Array  # (U,) the sets of ranks that use them; empty with one trainer
    bounds: Int64Array  # (S + 1,) a shard has the rows from one bound to the next
    first_occurrence: int


class Ticks(NamedTuple):
    """The clock of a step."""

    step: int
    overlapped: int  # the tick of its overlapped transfers
    last_seen: int  # the last step in the window


class Uses(NamedTuple):
    """The rings of occurrences: the linker's and the Cacher's."""

    next_uses: Int32Array
    slots_of_uses: Int32Array


class Shard(NamedTuple):
    """`State` as one shard sees it."""

    slots_of_rows: Int32Array
    rows_of_slots: Int64Array
    first_fresh: int  # where those of its slots begin that were never filled
    last_fresh: int  # where they end
    num_slots: int
    unknown: UnknownQueue
    due: DueQueues


@jit
def admit_shard(
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
    """Makes those rows of a new batch in one shard that are settled and cached due at its step.

    Until now they had no known next use.
    """
    indices, slots = np.empty(end - begin, np.int32), np.empty(end - begin, np.int32)
    count = find_resident(
        slots_of_rows, rows[begin:end], previous[begin:end], oldest_unsettled, indices, slots, begin
    )
    forget_unknown(places, slots[:count])
    steps = np.empty(count, np.int32)
    steps[:] = step
    push_due(due, steps, indices[:count], slots[:count])


@jit
def plan_shard(
    shard: Shard,
    batch: Batch,
    begin: int,
    end: int,
    recent: Int64Array,
    oldest_unsettled: int,
    ticks: Ticks,
    uses: Uses,
    num_trainers: int,
    all_slots: Int32Array,
    evicted: Moved,
    fetched: Moved,
    counts: Int64Array,
) -> int:
    """Plans a step for one shard, which has the batch's rows from `begin` to `end`.

    It finds the rows' slots, settles older rows, frees as many slots as are missing, evicts the
    rows in them, gives the slots to the missing rows, and remembers what slots the batch uses.

    Args:
        shard: The state of the shard.
        batch: The batch to plan.
        begin: Where in the batch the shard's rows begin.
        end: Where they end.
        recent: (n, 2) as in `loops.plan`, for this shard.
        oldest_unsettled: The first occurrence that is not settled before the step.
        ticks: The clock.
        uses: The rings of occurrences.
        num_trainers: How many trainers have the cache together.
        all_slots: (U,) is filled from `begin` to `end` with the rows' slots.
        evicted: (U,) each, are filled from `begin` on.
        fetched: (U,) each, are filled from `begin` on.
        counts: (DONE + 1,) is filled; `DONE` last, so that a shard that failed lacks it.

    Returns:
        The first occurrence that is not settled after the step.
    """
    slots = all_slots[begin:end]
    slots[:] = -1
    # Before any slot is freed: what the batch itself needs must not leave.
    take_due(shard.due, ticks.step, all_slots)
    num_settled = _settle_all(shard, recent, oldest_unsettled, end - begin, ticks, uses)
    missing = np.empty(len(slots), np.int32)
    num_missing = find_unsettled(
        batch.previous[begin:end], oldest_unsettled, uses.slots_of_uses, slots, missing
    )
    first_unsettled = (
        recent[num_settled, 0] if num_settled < len(recent) else batch.first_occurrence + begin
    )
    missing, freed = missing[:num_missing], np.empty(num_missing, np.int32)
    num_fresh, num_unknown, num_freed = _free(shard, ticks, freed)
    if num_freed < num_missing:
        return first_unsettled
    # Some rows were used so recently that they have settled only because the cache is tight. Their
    # slots can't be filled ahead.
    num_ahead = num_fresh + old_first(
        freed[num_fresh:],
        recent[1:num_settled],
        uses.slots_of_uses,
        len(shard.rows_of_slots) if num_settled > 1 else 0,
    )
    if num_trainers > 1:
        missing = choose_owners(missing, batch.users[begin:end], freed, num_trainers)

    _evict(shard, freed[num_fresh:], num_ahead - num_fresh, ticks, begin, evicted, counts)
    counts[EVICTED_BLINDLY] = num_unknown - num_fresh
    rows = batch.rows[begin:end]
    _fetch(shard, rows, missing, slots, freed, num_ahead, ticks, begin, fetched, counts)
    keep_uses(slots, batch.first_occurrence + begin, uses.slots_of_uses)
    counts[DONE] = 1
    return first_unsettled


@jit
def _settle_all(
    shard: Shard,
    recent: Int64Array,
    oldest_unsettled: int,
    num_rows: int,
    ticks: Ticks,
    uses: Uses,
) -> int:
    """Settles the batch that is old enough, and all younger ones if the cache is tight.

    It is tight if it could not hold the younger batches together with the planned one, which has
    `num_rows` rows in this shard.

    Returns:
        How many of `recent` are settled, with those that were settled before.
    """
    num_held = num_rows
    for batch in range(1, len(recent)):
        num_held += recent[batch, 1] - recent[batch, 0]
    last = len(recent) if num_held > shard.num_slots else 1
    num_settled = 0
    for batch in range(len(recent)):
        # A tight cache has settled younger batches in an earlier step already.
        if not is_before(recent[batch, 0], oldest_unsettled):
            if batch >= last:
                break
            _settle(shard, recent[batch], ticks, uses)
        num_settled += 1
    return num_settled


@jit
def _settle(shard: Shard, settled: Int64Array, ticks: Ticks, uses: Uses) -> None:
    """Puts the slots of a batch's occurrences between two bounds into the eviction queues.

    Rows that are in use again are left out: they settle with their next occurrence.
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
def _free(shard: Shard, ticks: Ticks, freed: Int32Array) -> tuple[int, int, int]:
    """Fills `freed` with slots, by Belady's rule.

    First come slots that were never filled, then those of rows without a known next use, then those
    of the rows with the farthest next use.

    Returns:
        How many slots are of the first kind, of the first two kinds, and of all kinds.
    """
    num_fresh = min(len(freed), shard.last_fresh - shard.first_fresh)
    for index in range(num_fresh):
        freed[index] = shard.first_fresh + index
    num_unknown = num_fresh + pop_unknown(shard.unknown, freed[num_fresh:])
    num_freed = num_unknown
    due_step = ticks.last_seen
    while num_freed < len(freed) and due_step > ticks.step:
        num_freed += pop_due(shard.due, due_step, freed[num_freed:])
        due_step -= 1
    return num_fresh, num_unknown, num_freed


@jit
def _evict(
    shard: Shard,
    freed: Int32Array,
    num_overlapped: int,
    ticks: Ticks,
    begin: int,
    evicted: Moved,
    counts: Int64Array,
) -> None:
    """Evicts the rows in freed slots (n,), the first `num_overlapped` of them ahead."""
    evicted_slots = evicted.slots
    for index in range(len(freed)):
        evicted_slots[begin + index] = freed[index]
    evict(
        shard.slots_of_rows,
        shard.rows_of_slots,
        freed,
        evicted.rows[begin : begin + len(freed)],
        num_overlapped,
        ticks.overlapped,
        ticks.step,
    )
    counts[EVICTED], counts[EVICTED_OVERLAPPED] = len(freed), num_overlapped


@jit
def _fetch(
    shard: Shard,
    rows: Int64Array,
    missing: Int32Array,
    slots: Int32Array,
    freed: Int32Array,
    num_ahead: int,
    ticks: Ticks,
    begin: int,
    fetched: Moved,
    counts: Int64Array,
) -> None:
    """Fetches the missing ones of the shard's rows into freed slots (n,).

    The first `num_ahead` slots can be filled ahead.
    """
    end = begin + len(freed)
    missing_rows, evicted_at = np.empty(len(freed), np.int64), np.empty(len(freed), np.int32)
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
    counts[FETCHED] = len(freed)
    # A slot that can be filled ahead does not suffice: its row may have been evicted too late.
    counts[FETCHED_OVERLAPPED], counts[OVERLAPPED_FENCE], counts[URGENT_FENCE] = overlapped_first(
        missing_rows,
        evicted_at,
        freed,
        num_ahead,
        ticks.overlapped,
        fetched.rows[begin:end],
        fetched.slots[begin:end],
    )
