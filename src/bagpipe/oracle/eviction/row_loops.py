"""The Cacher's compiled loops over the rows of one shard of a batch.

`bagpipe.oracle.eviction.shard_loops` calls them in turn. Each first gathers what is far away in
memory into a small buffer without branching on it, so that many cache misses are under way at a
time. Then it decides.
"""

from __future__ import annotations

import numpy as np

from bagpipe.native.jit import jit
from bagpipe.native.prefetch import prefetch
from bagpipe.oracle.linker import INDEX, OCCURRENCES, STEP
from bagpipe.types import Int32Array, Int64Array

_AHEAD = 16
"""How many rows ahead of its use a row's state is prefetched."""
_RECENT = 1 << 30
"""Occurrence numbers wrap round: those less than this above another one come after it."""


@jit
def is_before(occurrence: int, other: int) -> bool:
    """Whether an occurrence comes before another one."""
    return ((occurrence - other) & OCCURRENCES) >= _RECENT


@jit
def find_resident(
    slots_of_rows: Int32Array,
    rows: Int64Array,
    previous: Int32Array,
    oldest_unsettled: int,
    indices: Int32Array,
    slots: Int32Array,
    first_index: int,
) -> int:
    """Finds those of a batch's rows that are settled and have a slot.

    Args:
        slots_of_rows: (num_rows, 1) as in `State`.
        rows: (n,) the rows.
        previous: (n,) their previous occurrences.
        oldest_unsettled: The first occurrence that is not settled.
        indices: (n,) is filled with the indices of the rows found in their batch.
        slots: (n,) is filled with their slots.
        first_index: The index in the batch of the first of `rows`.

    Returns:
        How many rows were found.
    """
    num_settled = 0
    # Always written, but kept only if it is one: a branch here could not be predicted. It is so in
    # all loops below that count what they keep.
    for index in range(len(rows)):
        indices[num_settled] = index
        is_settled = (previous[index] < 0) | (
            ((previous[index] - oldest_unsettled) & OCCURRENCES) >= _RECENT
        )
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
def find_unsettled(
    previous: Int32Array,
    oldest_unsettled: int,
    slots_of_uses: Int32Array,
    slots: Int32Array,
    missing: Int32Array,
) -> int:
    """Finds the slots of rows that are not settled, and then the rows that have no slot.

    Args:
        previous: (n,) the rows' previous occurrences.
        oldest_unsettled: The first occurrence that is not settled.
        slots_of_uses: The ring of slots by occurrence.
        slots: (n,) the rows' slots as far as they are known, else -1; unsettled ones are filled in.
        missing: (n,) is filled with the indices of rows without a slot.

    Returns:
        How many rows have no slot.
    """
    mask = len(slots_of_uses) - 1
    for index in range(len(previous)):
        is_unsettled = (previous[index] >= 0) & (
            ((previous[index] - oldest_unsettled) & OCCURRENCES) < _RECENT
        )
        # Read even for a row that is settled or new: some place of the ring, which is dropped.
        slot = slots_of_uses[previous[index] & mask]
        slots[index] = slot if is_unsettled else slots[index]
    num_missing = 0
    for index in range(len(previous)):
        missing[num_missing] = index
        num_missing += slots[index] < 0
    return num_missing


@jit
def sort_out(
    settled: Int64Array,
    step: int,
    last_seen: int,
    next_uses: Int32Array,
    slots_of_uses: Int32Array,
    unknown: Int32Array,
    steps: Int32Array,
    indices: Int32Array,
    slots: Int32Array,
) -> tuple[int, int]:
    """Sorts out which occurrences that settle have no known next use, and which are due when.

    Rows that a step up to `step` uses again are left out.

    Args:
        settled: (2,) the bounds of the n occurrences that settle.
        step: The step that is planned.
        last_seen: The last step of the window.
        next_uses: The linker's ring of next uses.
        slots_of_uses: The ring of slots by occurrence.
        unknown: (n,) is filled with the slots of rows without a known next use.
        steps: (n,) is filled with the next uses' steps of the other rows.
        indices: (n,) is filled with their indices in the batches of those steps.
        slots: (n,) is filled with their slots.

    Returns:
        How many rows there are without and with a known next use.
    """
    mask, slots_mask = len(next_uses) - 1, len(slots_of_uses) - 1
    num_unknown = num_due = 0
    for occurrence in range(settled[0], settled[1]):
        next_step, slot = next_uses[occurrence & mask, STEP], slots_of_uses[occurrence & slots_mask]
        # The linker runs ahead: what it knows of steps behind the window must not change plans, or
        # they would depend on threads.
        is_unused = (next_step < 0) | (next_step > step)
        is_due = (next_step >= 0) & (next_step <= last_seen)
        unknown[num_unknown] = slot
        num_unknown += is_unused & (not is_due)
        steps[num_due] = next_step
        indices[num_due] = next_uses[occurrence & mask, INDEX]
        slots[num_due] = slot
        num_due += is_unused & is_due
    return num_unknown, num_due


@jit
def evict(
    slots_of_rows: Int32Array,
    rows_of_slots: Int64Array,
    slots: Int32Array,
    rows: Int64Array,
    num_overlapped: int,
    issue_tick: int,
    urgent_tick: int,
) -> None:
    """Takes slots (n,) from their rows, and writes these to `rows` (n,).

    The first `num_overlapped` of them are evicted at `issue_tick`, the others at `urgent_tick`.
    """
    # Two loops, so that the second one knows which rows to prefetch.
    for index in range(len(slots)):
        rows[index] = rows_of_slots[np.uint32(slots[index])]
    for index in range(len(slots)):
        prefetch(slots_of_rows, rows[min(index + _AHEAD, len(slots) - 1)], 0)
        slots_of_rows[np.uint64(rows[index]), 0] = -2 - (
            issue_tick if index < num_overlapped else urgent_tick
        )


@jit
def take_slots(
    slots_of_rows: Int32Array,
    rows_of_slots: Int64Array,
    rows: Int64Array,
    missing: Int32Array,
    slots: Int32Array,
    freed: Int32Array,
    missing_rows: Int64Array,
    evicted_at: Int32Array,
) -> None:
    """Gives the i-th freed slot to the i-th missing row.

    Fills `missing_rows` with these rows, and `evicted_at` with the ticks at which they were last
    evicted, -1 for never.
    """
    for index in range(len(missing)):
        prefetch(slots_of_rows, rows[missing[min(index + _AHEAD, len(missing) - 1)]], 0)
        row, slot = rows[np.uint32(missing[index])], freed[index]
        missing_rows[index] = row
        evicted_at[index] = -2 - slots_of_rows[np.uint64(row), 0]
        slots_of_rows[np.uint64(row), 0] = slot
        rows_of_slots[np.uint32(slot)] = row
        slots[np.uint32(missing[index])] = slot


@jit
def old_first(
    freed: Int32Array, young: Int64Array, slots_of_uses: Int32Array, num_slots: int
) -> int:
    """Puts the slots of rows that no young batch uses before the others; else keeps their order.

    Args:
        freed: (n,) the slots, reordered in place.
        young: (m, 2) the bounds of the young batches' occurrences.
        slots_of_uses: The ring of slots by occurrence.
        num_slots: Slots of the cache.

    Returns:
        How many slots come first.
    """
    if len(young) == 0:
        return len(freed)
    mask, is_young = len(slots_of_uses) - 1, np.zeros(num_slots, np.bool_)
    for batch in range(len(young)):
        for occurrence in range(young[batch, 0], young[batch, 1]):
            # A slot that has got another row since then is marked, too. That is right: that row's
            # last use is younger still.
            is_young[slots_of_uses[occurrence & mask]] = True
    kept, num_old, num_young = np.empty(len(freed), np.int32), 0, 0
    for slot in freed:
        if is_young[slot]:
            kept[num_young] = slot
            num_young += 1
        else:
            freed[num_old] = slot
            num_old += 1
    for index in range(num_young):
        freed[num_old + index] = kept[index]
    return num_old


@jit
def overlapped_first(
    missing_rows: Int64Array,
    evicted_at: Int32Array,
    freed: Int32Array,
    num_ahead: int,
    issue_tick: int,
    fetch_rows: Int64Array,
    fetch_slots: Int32Array,
) -> tuple[int, int, int]:
    """Puts the overlapped fetches before the urgent ones.

    A fetch can be overlapped if its slot can be filled ahead and its row was evicted no later than
    `issue_tick`.

    Args:
        missing_rows: (n,) the rows to fetch.
        evicted_at: (n,) the ticks at which they were last evicted, -1 for never.
        freed: (n,) their slots.
        num_ahead: How many of these, the first ones, can be filled ahead.
        issue_tick: The tick of the step's overlapped transfers.
        fetch_rows: (n,) is filled with the rows.
        fetch_slots: (n,) is filled with their slots.

    Returns:
        How many fetches are overlapped, and the latest eviction among the overlapped rows and among
        the urgent ones, -1 for none.
    """
    num_overlapped, num_urgent = 0, 0
    overlapped_fence, urgent_fence = -1, -1
    for index in range(len(freed)):
        if index < num_ahead and evicted_at[index] <= issue_tick:
            place = num_overlapped
            num_overlapped += 1
            overlapped_fence = max(overlapped_fence, evicted_at[index])
        else:
            num_urgent += 1
            place = len(freed) - num_urgent
            urgent_fence = max(urgent_fence, evicted_at[index])
        fetch_rows[place] = missing_rows[index]
        fetch_slots[place] = freed[index]
    return num_overlapped, overlapped_fence, urgent_fence


@jit
def keep_uses(slots: Int32Array, first_occurrence: int, slots_of_uses: Int32Array) -> None:
    """Writes the slots (n,) of consecutive occurrences into the ring."""
    # Two copies of whole runs: the second one is what has gone round the ring's end.
    begin = first_occurrence & (len(slots_of_uses) - 1)
    num_first = min(len(slots), len(slots_of_uses) - begin)
    for index in range(num_first):
        slots_of_uses[begin + index] = slots[index]
    for index in range(len(slots) - num_first):
        slots_of_uses[index] = slots[num_first + index]
