"""The Triton kernels of `planning_triton`, which calls them in order.

A unique row or a lookup has a thread.
"""

from __future__ import annotations

import triton.language as tl

from bagpipe.cache.triton_launch import device_function, element_kernel
from bagpipe.device_oracle.row_index_triton import entry_of
from bagpipe.device_oracle.sums_triton import put_count, sum_before


@element_kernel
def find(
    planned: tl.tensor,
    entered: tl.tensor,
    settled: tl.tensor,
    batches: tl.tensor,
    headers: tl.tensor,
    now: tl.tensor,
    unique_rows: tl.tensor,
    next_of_places: tl.tensor,
    keys: tl.tensor,
    slots_of_rows: tl.tensor,
    last_uses: tl.tensor,
    next_uses: tl.tensor,
    found_slots: tl.tensor,
    found_next_uses: tl.tensor,
    ranks: tl.tensor,
    tiles: tl.tensor,
    groups: tl.tensor,
    num_missing: tl.tensor,
    room: tl.tensor,
    num_tiles: tl.tensor,
    num_entries: tl.tensor,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    RING: tl.constexpr,
    PLANS: tl.constexpr,
    DEPTH: tl.constexpr,
    FIRST: tl.constexpr,
    NUM_SLOTS: tl.constexpr,
    HEADER: tl.constexpr,
) -> None:
    """Finds slots and next uses; writes step, ring position, place of the plan, rows, if it runs.

    If the step's batch has not entered, it has no rows.
    """
    step = tl.load(planned)
    is_running = step < tl.load(entered)
    position = step % RING
    number = tl.where(is_running, tl.load(headers + position * HEADER + 3), 0)
    unique = tl.program_id(0) * TILE + tl.arange(0, TILE)
    is_unique = unique < number
    place = position * room + unique
    row = tl.load(unique_rows + place, mask=is_unique, other=0).to(tl.int64)
    next_use = tl.load(next_of_places + place, mask=is_unique, other=0)
    entry = entry_of(keys, row, is_unique, num_entries)
    slot = tl.load(slots_of_rows + entry, mask=is_unique, other=0)
    is_cached = is_unique & (slot >= 0)
    used = tl.zeros((TILE,), tl.int32) + step.to(tl.int32)
    tl.store(last_uses + slot, used, mask=is_cached)
    tl.store(next_uses + slot, next_use, mask=is_cached)
    tl.store(found_slots + unique, slot, mask=is_unique)
    tl.store(found_next_uses + unique, next_use, mask=is_unique)
    is_missing = (is_unique & (slot < 0)).to(tl.int32)
    tl.store(ranks + unique, tl.cumsum(is_missing, axis=0), mask=is_unique)
    count = tl.sum(is_missing, axis=0)
    put_count(tiles, groups, num_tiles, count, 0, GROUP)
    tl.atomic_add(num_missing, count, mask=count > 0, sem="relaxed")
    if tl.program_id(0) == 0:
        held = num_held(batches, headers, step, number, RING, DEPTH, FIRST, HEADER)
        # Uses that are old enough are settled, and in a tight cache all before this step.
        old = tl.where(held > NUM_SLOTS, step, step - DEPTH)
        tl.store(settled, tl.maximum(tl.load(settled), old), mask=is_running)
        tl.store(now, step)
        tl.store(now + 1, position)
        tl.store(now + 2, step % PLANS)
        tl.store(now + 3, number)
        tl.store(now + 4, is_running.to(tl.int64))


@device_function
def num_held(
    batches: tl.tensor,
    headers: tl.tensor,
    step: tl.tensor,
    number: tl.tensor,
    RING: tl.constexpr,
    DEPTH: tl.constexpr,
    FIRST: tl.constexpr,
    HEADER: tl.constexpr,
) -> tl.tensor:
    """How many rows the step uses, and those within the prefetch depth before it."""
    held = number
    for before in tl.static_range(1, DEPTH + 1):
        batch = tl.maximum(step - before, 0)
        other = batch % RING
        is_recent = (step - before >= FIRST) & (tl.load(batches + other) == step - before)
        held += tl.where(is_recent, tl.load(headers + other * HEADER + 3), 0)
    return held


@element_kernel
def assign(
    now: tl.tensor,
    unique_rows: tl.tensor,
    found_slots: tl.tensor,
    found_next_uses: tl.tensor,
    ranks: tl.tensor,
    missing_tiles: tl.tensor,
    missing_groups: tl.tensor,
    victims: tl.tensor,
    rows_of_slots: tl.tensor,
    keys: tl.tensor,
    slots_of_rows: tl.tensor,
    last_uses: tl.tensor,
    next_uses: tl.tensor,
    unique_slots: tl.tensor,
    num_used_slots: tl.tensor,
    kinds: tl.tensor,
    moved_tiles: tl.tensor,
    moved_groups: tl.tensor,
    evicted_rows: tl.tensor,
    noted: tl.tensor,
    room: tl.tensor,
    num_tiles: tl.tensor,
    num_rows: tl.tensor,
    num_entries: tl.tensor,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    DEPTH: tl.constexpr,
    FIRST: tl.constexpr,
    NEVER: tl.constexpr,
) -> None:
    tile = tl.program_id(0)
    unique = tile * TILE + tl.arange(0, TILE)
    is_unique = unique < tl.load(now + 3)
    step = tl.load(now).to(tl.int32)
    ahead = tl.maximum(step - DEPTH, FIRST)
    before = tl.load(found_slots + unique, mask=is_unique, other=0)
    missing = is_unique & (before < 0)
    row = tl.load(unique_rows + tl.load(now + 1) * room + unique, mask=missing, other=0)
    row = row.to(tl.int64)
    rank = tl.load(ranks + unique, mask=missing, other=1) - 1
    rank += sum_before(missing_tiles, missing_groups, num_tiles, tile, 0, GROUP)
    slot = tl.where(missing, tl.load(victims + rank, mask=missing, other=0), before.to(tl.int64))
    tl.store(unique_slots + tl.load(now + 2) * room + unique, slot.to(tl.int32), mask=is_unique)
    evicted = tl.load(rows_of_slots + slot, mask=missing, other=num_rows).to(tl.int64)
    is_evicted = missing & (evicted < num_rows)
    # A slot whose row was used too recently can't be filled ahead, and a row that was evicted too
    # recently can't be fetched ahead: these transfers are urgent.
    last_use = tl.load(last_uses + slot, mask=is_evicted, other=-1)
    is_old = (last_use < step - DEPTH) | (is_evicted == 0)
    is_blind = is_evicted & (tl.load(next_uses + slot, mask=is_evicted, other=0) == NEVER)
    evicted_at = tl.maximum(-2 - before, -1)
    is_ahead = missing & is_old & (evicted_at <= ahead)
    is_urgent = missing & (is_ahead == 0)
    gone = -2 - tl.where(is_old, ahead, step)
    left = entry_of(keys, evicted, is_evicted, num_entries)
    tl.store(slots_of_rows + left, gone, mask=is_evicted)
    entry = entry_of(keys, row, missing, num_entries)
    tl.store(slots_of_rows + entry, slot.to(tl.int32), mask=missing)
    tl.store(rows_of_slots + slot, row.to(rows_of_slots.dtype.element_ty), mask=missing)
    next_use = tl.load(found_next_uses + unique, mask=missing, other=0)
    tl.store(next_uses + slot, next_use, mask=missing)
    tl.store(last_uses + slot, tl.zeros((TILE,), tl.int32) + step, mask=missing)
    tl.store(evicted_rows + unique, evicted.to(evicted_rows.dtype.element_ty), mask=is_evicted)
    # bits of kinds; both counts of a pair in one sum: a tile has fewer than 2**16 elements
    evicts_ahead, evicts_urgently = is_evicted & is_old, is_evicted & (is_old == 0)
    kind = evicts_ahead.to(tl.int32) + 2 * evicts_urgently.to(tl.int32)
    kind += 4 * is_ahead.to(tl.int32) + 8 * is_urgent.to(tl.int32)
    tl.store(kinds + unique, kind, mask=is_unique)
    out, into = tl.sum(pair_of(kind, 0), axis=0), tl.sum(pair_of(kind, 2), axis=0)
    put_moved(moved_tiles, moved_groups, noted, num_tiles, out & 0xFFFF, 0, GROUP)
    put_moved(moved_tiles, moved_groups, noted, num_tiles, out >> 16, 1, GROUP)
    put_moved(moved_tiles, moved_groups, noted, num_tiles, into & 0xFFFF, 2, GROUP)
    put_moved(moved_tiles, moved_groups, noted, num_tiles, into >> 16, 3, GROUP)
    is_new = missing & (is_evicted == 0)
    both = tl.sum(is_new.to(tl.int32) + (is_blind.to(tl.int32) << 16), axis=0)
    num_new, num_blind = both & 0xFFFF, both >> 16
    tl.atomic_add(num_used_slots, num_new.to(tl.int64), mask=num_new > 0, sem="relaxed")
    tl.atomic_add(noted + 6, num_blind, mask=num_blind > 0, sem="relaxed")
    # fences, plus 1
    fence_ahead = tl.max(tl.where(is_ahead, evicted_at + 1, 0), axis=0)
    tl.atomic_max(noted + 4, fence_ahead, mask=fence_ahead > 0, sem="relaxed")
    fence_urgent = tl.max(tl.where(is_urgent, evicted_at + 1, 0), axis=0)
    tl.atomic_max(noted + 5, fence_urgent, mask=fence_urgent > 0, sem="relaxed")


@device_function
def put_moved(
    tiles: tl.tensor,
    groups: tl.tensor,
    noted: tl.tensor,
    num_tiles: tl.tensor,
    count: tl.tensor,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """Writes the count of this program's tile, and adds it to that of all."""
    put_count(tiles, groups, num_tiles, count, KIND, GROUP)
    tl.atomic_add(noted + KIND, count, mask=count > 0, sem="relaxed")


@device_function
def pair_of(kind: tl.tensor, FIRST_BIT: tl.constexpr) -> tl.tensor:
    """A bit, and the next one as 2**16."""
    return ((kind >> FIRST_BIT) & 1) + (((kind >> (FIRST_BIT + 1)) & 1) << 16)


@element_kernel
def lists(
    now: tl.tensor,
    unique_rows: tl.tensor,
    unique_slots: tl.tensor,
    kinds: tl.tensor,
    tiles: tl.tensor,
    groups: tl.tensor,
    evicted_rows: tl.tensor,
    noted: tl.tensor,
    evict_rows: tl.tensor,
    evict_slots: tl.tensor,
    fetch_rows: tl.tensor,
    fetch_slots: tl.tensor,
    headers: tl.tensor,
    plan_headers: tl.tensor,
    num_used_slots: tl.tensor,
    planned: tl.tensor,
    room: tl.tensor,
    num_tiles: tl.tensor,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    BATCH_HEADER: tl.constexpr,
    HEADER: tl.constexpr,
) -> None:
    tile = tl.program_id(0)
    unique = tile * TILE + tl.arange(0, TILE)
    first = tl.load(now + 2) * room
    kind = tl.load(kinds + unique, mask=unique < tl.load(now + 3), other=0)
    slot = tl.load(unique_slots + first + unique, mask=kind > 0, other=0)
    row = tl.load(unique_rows + tl.load(now + 1) * room + unique, mask=kind > 0, other=0)
    evicted = tl.load(evicted_rows + unique, mask=(kind & 3) > 0, other=0)
    for pair in tl.static_range(2):
        bits = pair_of(kind, 2 * pair)
        up_to = tl.cumsum(bits, axis=0)
        # urgent ones lie behind the others
        ahead = sum_before(tiles, groups, num_tiles, tile, 2 * pair, GROUP)
        urgent = sum_before(tiles, groups, num_tiles, tile, 2 * pair + 1, GROUP)
        urgent += tl.load(noted + 2 * pair)
        is_urgent = bits > 1
        place = tl.where(is_urgent, urgent + (up_to >> 16), ahead + (up_to & 0xFFFF)) - 1
        if pair == 0:
            moved = evicted.to(evict_rows.dtype.element_ty)
            tl.store(evict_rows + first + place, moved, mask=bits > 0)
            tl.store(evict_slots + first + place, slot, mask=bits > 0)
        else:
            moved = row.to(fetch_rows.dtype.element_ty)
            tl.store(fetch_rows + first + place, moved, mask=bits > 0)
            tl.store(fetch_slots + first + place, slot, mask=bits > 0)
    if (tile == 0) & (tl.load(now + 4) != 0):
        source = headers + tl.load(now + 1) * BATCH_HEADER
        into = plan_headers + tl.load(now + 2) * HEADER
        for index in tl.static_range(BATCH_HEADER):
            tl.store(into + index, tl.load(source + index))
        for index in tl.static_range(7):
            value = tl.load(noted + index)
            if index == 1 or index == 3:  # all of them
                value += tl.load(noted + index - 1)
            if index == 4 or index == 5:
                value -= 1
            tl.store(into + BATCH_HEADER + index, value.to(tl.int64))
        tl.store(into + BATCH_HEADER + 7, tl.load(num_used_slots))
        tl.store(planned, tl.load(now) + 1)


@element_kernel
def lookups(
    now: tl.tensor,
    headers: tl.tensor,
    inverse: tl.tensor,
    unique_slots: tl.tensor,
    lookup_slots: tl.tensor,
    size: tl.tensor,
    room: tl.tensor,
    TILE: tl.constexpr,
    HEADER: tl.constexpr,
) -> None:
    """Writes the slot of each lookup."""
    lookup = tl.program_id(0) * TILE + tl.arange(0, TILE)
    position, place = tl.load(now + 1), tl.load(now + 2)
    number = tl.load(headers + position * HEADER + 1) * tl.load(now + 4)  # 0 if it does not run
    is_lookup = (lookup < size) & (lookup < number)
    unique = tl.load(inverse + position * size + lookup, mask=is_lookup, other=0)
    slot = tl.load(unique_slots + place * room + unique, mask=is_lookup, other=0)
    tl.store(lookup_slots + place * size + lookup, slot, mask=is_lookup)
