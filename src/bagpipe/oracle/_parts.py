"""The Cacher's loops over one part of a batch, compiled; `bagpipe.oracle._loops` runs them side by side.

Each first gathers what is far away into a small buffer without branching on it, so that many cache misses are under way at a time,
and then decides.
"""

from __future__ import annotations

import numpy as np

from bagpipe._jit import jit
from bagpipe._prefetch import prefetch
from bagpipe.oracle.linker import INDEX, OCCURRENCES, STEP
from bagpipe.types import Int32Array, Int64Array

_AHEAD = 16
"""Rows ahead for which a row's state is asked for."""
_RECENT = 1 << 30
"""Occurrence numbers wrap round: one that lies less than this behind another is later."""


@jit
def find_resident_part(
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
def find_unsettled_part(
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
def sort_out_part(
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
def evict_part(
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
def take_slots_part(
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
