"""`planning.plan` in Triton, around the choice of victims and running sums of torch's.

settle    (one program) which step and batch it is, and which uses are settled
find      the slots of the batch's rows, and which rows have none
(running sum of these, and `victims_triton`)
assign    slots for the missing rows; which transfers can be issued ahead
(running sums of those)
lists     rows and slots that move, side by side
header    (one program)
lookups   the slot of each lookup
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from bagpipe.cache.triton_launch import Kernel, Tiling, on_device_of
from bagpipe.device_oracle.state import BATCH_HEADER_LENGTH, HEADER_LENGTH, NEVER, State
from bagpipe.device_oracle.victims_triton import choose_victims, running_sums

_TILE = Tiling(elements=1024, per_thread=8).of(1)
_FLAGS = 4
"""Kinds of transfers: evicted ahead, evicted urgently, fetched ahead, fetched urgently."""


def plan(state: State) -> None:
    """See `planning.plan`."""
    window, room, device = state.window, state.capacity.max_uniques, state.planned.device
    tile: dict[str, Any] = {"TILE": _TILE.rows}
    by_unique, warps = _TILE.count(room), _TILE.num_warps

    def ints(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    now = torch.empty(5, dtype=torch.int64, device=device)
    slots, next_uses, is_missing = ints(room), ints(room), ints(room)
    with on_device_of(now):
        _settle.launch(
            1,
            (state.planned, state.entered, state.settled, state.batches, state.headers, now),
            {
                "RING": window.ring_length,
                "PLANS": window.num_plans,
                "DEPTH": window.prefetch_depth,
                "FIRST": window.first_step,
                "NUM_SLOTS": window.num_slots,
                "HEADER": BATCH_HEADER_LENGTH,
            },
            1,
        )
        _find.launch(
            by_unique,
            (
                now,
                state.unique_rows,
                state.next_of_places,
                state.slots_of_rows,
                state.last_uses,
                state.next_uses,
                slots,
                next_uses,
                is_missing,
                room,
            ),
            tile,
            warps,
        )
        ranks = torch.cumsum(is_missing, 0, dtype=torch.int32)
        victims = choose_victims(state, ranks[-1:])
        flags, evicted = ints(_FLAGS, room), torch.empty_like(state.evict_rows[0])
        # fences, and how many rows are evicted of which nobody knows a next use
        found = torch.zeros(3, dtype=torch.int64, device=device)
        found[:2].fill_(-1)
        _assign.launch(
            by_unique,
            (
                now,
                state.unique_rows,
                slots,
                next_uses,
                is_missing,
                ranks,
                victims,
                state.rows_of_slots,
                state.slots_of_rows,
                state.last_uses,
                state.next_uses,
                state.unique_slots,
                state.num_used_slots,
                flags,
                evicted,
                found,
                room,
                state.num_rows,
            ),
            tile | {"DEPTH": window.prefetch_depth, "FIRST": window.first_step, "NEVER": NEVER},
            warps,
        )
        sums = running_sums(flags)
        _lists.launch(
            by_unique,
            (
                now,
                state.unique_rows,
                state.unique_slots,
                flags,
                sums,
                evicted,
                state.evict_rows,
                state.evict_slots,
                state.fetch_rows,
                state.fetch_slots,
                room,
            ),
            tile,
            warps,
        )
        _header.launch(
            1,
            (
                now,
                sums,
                found,
                state.headers,
                state.plan_headers,
                state.num_used_slots,
                state.planned,
                room,
            ),
            {"BATCH_HEADER": BATCH_HEADER_LENGTH, "HEADER": HEADER_LENGTH},
            1,
        )
        size = state.capacity.max_lookups
        _lookups.launch(
            _TILE.count(size),
            (
                now,
                state.headers,
                state.inverse,
                state.unique_slots,
                state.lookup_slots,
                size,
                room,
            ),
            tile | {"HEADER": BATCH_HEADER_LENGTH},
            warps,
        )


@Kernel
def _settle(
    planned: tl.tensor,
    entered: tl.tensor,
    settled: tl.tensor,
    batches: tl.tensor,
    headers: tl.tensor,
    now: tl.tensor,
    RING: tl.constexpr,
    PLANS: tl.constexpr,
    DEPTH: tl.constexpr,
    FIRST: tl.constexpr,
    NUM_SLOTS: tl.constexpr,
    HEADER: tl.constexpr,
) -> None:
    """Writes step, ring position, place of the plan, number of unique rows, and whether it runs."""
    step = tl.load(planned)
    is_running = step < tl.load(entered)
    position = step % RING
    number = tl.load(headers + position * HEADER + 3)
    num_held = number
    for before in tl.static_range(1, DEPTH + 1):
        batch = tl.maximum(step - before, 0)
        other = batch % RING
        is_recent = (step - before >= FIRST) & (tl.load(batches + other) == step - before)
        num_held += tl.where(is_recent, tl.load(headers + other * HEADER + 3), 0)
    # Uses that are old enough are settled, and in a tight cache all before this step.
    old = tl.where(num_held > NUM_SLOTS, step, step - DEPTH)
    tl.store(settled, tl.maximum(tl.load(settled), old), mask=is_running)
    tl.store(now, step)
    tl.store(now + 1, position)
    tl.store(now + 2, step % PLANS)
    tl.store(now + 3, tl.where(is_running, number, 0))
    tl.store(now + 4, is_running.to(tl.int64))


@Kernel
def _find(
    now: tl.tensor,
    unique_rows: tl.tensor,
    next_of_places: tl.tensor,
    slots_of_rows: tl.tensor,
    last_uses: tl.tensor,
    next_uses: tl.tensor,
    found_slots: tl.tensor,
    found_next_uses: tl.tensor,
    is_missing: tl.tensor,
    room: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    unique = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = unique < room
    is_unique = inside & (unique < tl.load(now + 3))
    place = tl.load(now + 1) * room + unique
    row = tl.load(unique_rows + place, mask=is_unique, other=0).to(tl.int64)
    next_use = tl.load(next_of_places + place, mask=is_unique, other=0)
    slot = tl.load(slots_of_rows + row, mask=is_unique, other=0)
    is_cached = is_unique & (slot >= 0)
    step = tl.load(now).to(tl.int32)
    tl.store(last_uses + slot, tl.zeros((TILE,), tl.int32) + step, mask=is_cached)
    tl.store(next_uses + slot, next_use, mask=is_cached)
    tl.store(found_slots + unique, slot, mask=inside)
    tl.store(found_next_uses + unique, next_use, mask=inside)
    tl.store(is_missing + unique, (is_unique & (slot < 0)).to(tl.int32), mask=inside)


@Kernel
def _assign(
    now: tl.tensor,
    unique_rows: tl.tensor,
    found_slots: tl.tensor,
    found_next_uses: tl.tensor,
    is_missing: tl.tensor,
    ranks: tl.tensor,
    victims: tl.tensor,
    rows_of_slots: tl.tensor,
    slots_of_rows: tl.tensor,
    last_uses: tl.tensor,
    next_uses: tl.tensor,
    unique_slots: tl.tensor,
    num_used_slots: tl.tensor,
    flags: tl.tensor,
    evicted_rows: tl.tensor,
    found: tl.tensor,
    room: tl.tensor,
    num_rows: tl.tensor,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    FIRST: tl.constexpr,
    NEVER: tl.constexpr,
) -> None:
    unique = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = unique < room
    step = tl.load(now).to(tl.int32)
    ahead = tl.maximum(step - DEPTH, FIRST)
    missing = inside & (tl.load(is_missing + unique, mask=inside, other=0) != 0)
    row = tl.load(unique_rows + tl.load(now + 1) * room + unique, mask=missing, other=0)
    row = row.to(tl.int64)
    before = tl.load(found_slots + unique, mask=inside, other=0)
    rank = tl.load(ranks + unique, mask=missing, other=1) - 1
    slot = tl.where(missing, tl.load(victims + rank, mask=missing, other=0), before.to(tl.int64))
    tl.store(unique_slots + tl.load(now + 2) * room + unique, slot.to(tl.int32), mask=inside)
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
    tl.store(slots_of_rows + evicted, gone, mask=is_evicted)
    tl.store(slots_of_rows + row, slot.to(tl.int32), mask=missing)
    tl.store(rows_of_slots + slot, row.to(rows_of_slots.dtype.element_ty), mask=missing)
    next_use = tl.load(found_next_uses + unique, mask=missing, other=0)
    tl.store(next_uses + slot, next_use, mask=missing)
    tl.store(last_uses + slot, tl.zeros((TILE,), tl.int32) + step, mask=missing)
    tl.store(evicted_rows + unique, evicted.to(evicted_rows.dtype.element_ty), mask=inside)
    tl.store(flags + unique, (is_evicted & is_old).to(tl.int32), mask=inside)
    tl.store(flags + room + unique, (is_evicted & (is_old == 0)).to(tl.int32), mask=inside)
    tl.store(flags + 2 * room + unique, is_ahead.to(tl.int32), mask=inside)
    tl.store(flags + 3 * room + unique, is_urgent.to(tl.int32), mask=inside)
    num_new = tl.sum((missing & (is_evicted == 0)).to(tl.int32), axis=0)
    tl.atomic_add(num_used_slots, num_new.to(tl.int64), mask=num_new > 0, sem="relaxed")
    num_blind = tl.sum(is_blind.to(tl.int32), axis=0)
    tl.atomic_add(found + 2, num_blind.to(tl.int64), mask=num_blind > 0, sem="relaxed")
    fence_ahead = tl.max(tl.where(is_ahead, evicted_at, -1), axis=0)
    tl.atomic_max(found, fence_ahead.to(tl.int64), mask=fence_ahead >= 0, sem="relaxed")
    fence_urgent = tl.max(tl.where(is_urgent, evicted_at, -1), axis=0)
    tl.atomic_max(found + 1, fence_urgent.to(tl.int64), mask=fence_urgent >= 0, sem="relaxed")


@Kernel
def _lists(
    now: tl.tensor,
    unique_rows: tl.tensor,
    unique_slots: tl.tensor,
    flags: tl.tensor,
    sums: tl.tensor,
    evicted_rows: tl.tensor,
    evict_rows: tl.tensor,
    evict_slots: tl.tensor,
    fetch_rows: tl.tensor,
    fetch_slots: tl.tensor,
    room: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    unique = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = unique < room
    first = tl.load(now + 2) * room
    slot = tl.load(unique_slots + first + unique, mask=inside, other=0)
    row = tl.load(unique_rows + tl.load(now + 1) * room + unique, mask=inside, other=0)
    evicted = tl.load(evicted_rows + unique, mask=inside, other=0)
    for kind in tl.static_range(4):
        is_moved = inside & (tl.load(flags + kind * room + unique, mask=inside, other=0) != 0)
        place = tl.load(sums + kind * room + unique, mask=is_moved, other=1) - 1
        if kind % 2 == 1:  # urgent ones lie behind the others
            place += tl.load(sums + kind * room - 1)
        if kind < 2:
            tl.store(evict_rows + first + place, evicted, mask=is_moved)
            tl.store(evict_slots + first + place, slot, mask=is_moved)
        else:
            moved = row.to(fetch_rows.dtype.element_ty)
            tl.store(fetch_rows + first + place, moved, mask=is_moved)
            tl.store(fetch_slots + first + place, slot, mask=is_moved)


@Kernel
def _header(
    now: tl.tensor,
    sums: tl.tensor,
    found: tl.tensor,
    headers: tl.tensor,
    plan_headers: tl.tensor,
    num_used_slots: tl.tensor,
    planned: tl.tensor,
    room: tl.tensor,
    BATCH_HEADER: tl.constexpr,
    HEADER: tl.constexpr,
) -> None:
    step = tl.load(now)
    is_running = tl.load(now + 4) != 0
    source = headers + tl.load(now + 1) * BATCH_HEADER
    into = plan_headers + tl.load(now + 2) * HEADER
    for index in tl.static_range(BATCH_HEADER):
        tl.store(into + index, tl.load(source + index), mask=is_running)
    for kind in tl.static_range(4):
        total = tl.load(sums + (kind + 1) * room - 1)
        if kind % 2 == 1:
            total += tl.load(sums + kind * room - 1)
        tl.store(into + BATCH_HEADER + kind, total.to(tl.int64), mask=is_running)
    for index in tl.static_range(3):
        tl.store(into + BATCH_HEADER + 4 + index, tl.load(found + index), mask=is_running)
    tl.store(into + BATCH_HEADER + 7, tl.load(num_used_slots), mask=is_running)
    tl.store(planned, step + 1, mask=is_running)


@Kernel
def _lookups(
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
    lookup = tl.program_id(0) * TILE + tl.arange(0, TILE)
    position, place = tl.load(now + 1), tl.load(now + 2)
    number = tl.load(headers + position * HEADER + 1) * tl.load(now + 4)  # 0 if it does not run
    is_lookup = (lookup < size) & (lookup < number)
    unique = tl.load(inverse + position * size + lookup, mask=is_lookup, other=0)
    slot = tl.load(unique_slots + place * room + unique, mask=is_lookup, other=0)
    tl.store(lookup_slots + place * size + lookup, slot, mask=is_lookup)
