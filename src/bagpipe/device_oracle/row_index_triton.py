"""`row_index` in Triton: device functions for the kernels that need an entry, and `rebuild`.

A map is a table of open addressing. A row's entry is the first one from its *home* on, around the
end, that has its key or has none. The home is spread over all entries by the upper bits of a
product. Nothing leaves the table but as it is rebuilt, so a row is found before the first entry
without a key. At most two thirds of the entries have one.

Which entry a row gets depends on which thread is first. All that is read or written of a row goes
by its entry, so that decides nothing.

    keep      (of the old table) puts rows that are near side by side, and notes the latest eviction
              that is forgotten
    (clear)
    insert    gives them entries in the new table
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from bagpipe.cache.triton_launch import Tiling, device_function, element_kernel, on_device_of
from bagpipe.device_oracle import row_index
from bagpipe.device_oracle.alerts import INDEX_FULL
from bagpipe.device_oracle.state import NO_KEY, SPARE, State

_TILE = Tiling(elements=1024, per_thread=4).of(1)
_INSERTED = Tiling(elements=128, per_thread=4).of(1)
"""Smaller, since all of a tile look for as long as one of it does."""
assert _TILE.rows <= SPARE  # each thread's spare entry is its own
_MULTIPLIER = tl.constexpr(0x9E3779B97F4A7C15 - (1 << 64))
_NO_KEY = tl.constexpr(NO_KEY)
_NOBODY = tl.constexpr(-1)  # is never a key
_INDEX_FULL = tl.constexpr(INDEX_FULL)


@device_function
def home_of(row: tl.tensor, num_entries: tl.tensor) -> tl.tensor:
    """The entry at which the search for a row begins; rows are int64."""
    upper = ((row * _MULTIPLIER) >> 32) & 0xFFFFFFFF
    return (upper * num_entries) >> 32


@device_function
def entry_of(
    keys: tl.tensor, row: tl.tensor, is_row: tl.tensor, num_entries: tl.tensor
) -> tl.tensor:
    """The entries of rows that have one, else spare ones: see `row_index.find`; rows are int64."""
    if keys is None:
        entry = row
    else:
        at = home_of(row, num_entries)
        entry = num_entries + tl.arange(0, row.shape[0]).to(tl.int64)
        is_sought, num_seen = is_row, 0
        while (tl.max(is_sought.to(tl.int32), axis=0) > 0) & (num_seen < num_entries):
            key = tl.load(keys + at, mask=is_sought, other=_NO_KEY)
            entry = tl.where(is_sought & (key == row), at, entry)
            is_sought = is_sought & (key != row) & (key != _NO_KEY)
            at = tl.where(at + 1 == num_entries, 0, at + 1)
            num_seen += 1
    return entry


@device_function
def claim_entry(
    keys: tl.tensor,
    row: tl.tensor,
    is_row: tl.tensor,
    num_entries: tl.tensor,
    alert: tl.tensor,
    step: tl.tensor,
) -> tl.tensor:
    """As `entry_of`, for different rows, which get an entry where they have none."""
    if keys is None:
        entry = row
    else:
        at = home_of(row, num_entries)
        spare = num_entries + tl.arange(0, row.shape[0]).to(tl.int64)
        entry, is_sought, num_seen = spare, is_row, 0
        while (tl.max(is_sought.to(tl.int32), axis=0) > 0) & (num_seen < num_entries):
            key = tl.load(keys + at, mask=is_sought, other=_NOBODY)
            is_free = is_sought & (key == _NO_KEY)
            # There is no mask for this operation, so the others compare with what is nobody's.
            expected = tl.where(is_free, _NO_KEY, _NOBODY).to(tl.int64)
            before = tl.atomic_cas(
                keys + tl.where(is_free, at, spare), expected, row, sem="relaxed"
            )
            is_own = (key == row) | (is_free & (before == _NO_KEY))
            entry = tl.where(is_sought & is_own, at, entry)
            is_sought = is_sought & (is_own == 0)
            at = tl.where(at + 1 == num_entries, 0, at + 1)
            num_seen += 1
        note_full(alert, step, num_entries, tl.max(is_sought.to(tl.int32), axis=0) > 0)
    return entry


@device_function
def note_full(
    alert: tl.tensor, step: tl.tensor, num_entries: tl.tensor, is_full: tl.tensor
) -> None:
    """Says in `State.alert` that the index is full, if nothing is said there yet."""
    is_new = is_full & (tl.load(alert) == 0)
    tl.store(alert + 1, step.to(tl.int64), mask=is_new)
    tl.store(alert + 2, num_entries.to(tl.int64), mask=is_new)
    tl.store(alert, _INDEX_FULL, mask=is_new)


def rebuild(state: State, old: State) -> None:
    """See `row_index.rebuild`."""
    if state.keys is None or old.keys is None:
        row_index.rebuild(state, old)
        return
    window, device = state.window, state.keys.device
    max_near = window.max_near(old.capacity.max_uniques)

    def ints(dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(max_near, dtype=dtype, device=device)

    rows, slots, places = ints(torch.int64), ints(), ints()
    num_near = torch.zeros(1, dtype=torch.int32, device=device)
    with on_device_of(num_near):
        _keep.launch(
            _TILE.count(old.num_entries),
            (
                old.keys,
                old.slots_of_rows,
                old.places_of_rows,
                old.unique_rows,
                old.batches,
                old.planned,
                rows,
                slots,
                places,
                num_near,
                state.forgotten,
                state.alert,
                old.num_entries,
                max_near,
                old.capacity.max_uniques,
                state.capacity.max_uniques,
            ),
            {"TILE": _TILE.rows, "PLANS": window.num_plans},
            _TILE.num_warps,
        )
        state.keys.fill_(NO_KEY)
        state.places_of_rows.fill_(-1)
        state.slots_of_rows.copy_((-2 - state.forgotten).expand(len(state.slots_of_rows)))
        _insert.launch(
            _INSERTED.count(max_near),
            (
                rows,
                slots,
                places,
                num_near,
                state.keys,
                state.slots_of_rows,
                state.places_of_rows,
                state.planned,
                state.alert,
                state.num_entries,
            ),
            {"TILE": _INSERTED.rows},
            _INSERTED.num_warps,
        )


@element_kernel
def _keep(
    keys: tl.tensor,
    slots_of_rows: tl.tensor,
    places_of_rows: tl.tensor,
    unique_rows: tl.tensor,
    batches: tl.tensor,
    planned: tl.tensor,
    near_rows: tl.tensor,
    near_slots: tl.tensor,
    near_places: tl.tensor,
    num_near: tl.tensor,
    forgotten: tl.tensor,
    alert: tl.tensor,
    num_entries: tl.tensor,
    max_near: tl.tensor,
    old_room: tl.tensor,
    room: tl.tensor,
    TILE: tl.constexpr,
    PLANS: tl.constexpr,
) -> None:
    """See `row_index.is_near`."""
    entry = tl.program_id(0) * TILE + tl.arange(0, TILE)
    key = tl.load(keys + entry, mask=entry < num_entries, other=_NO_KEY)
    has_key = key != _NO_KEY
    slot = tl.load(slots_of_rows + entry, mask=has_key, other=-1)
    place = tl.load(places_of_rows + entry, mask=has_key, other=-1)
    step = tl.load(planned)
    tick = -2 - slot
    is_near = has_key & ((slot >= 0) | (tick > step - PLANS))
    # only of those whose place must tell
    is_asked = has_key & (is_near == 0) & (place >= 0)
    is_there = tl.load(unique_rows + place, mask=is_asked, other=0).to(tl.int64) == key
    batch = tl.load(batches + place // old_room, mask=is_asked, other=-1)
    is_near = is_near | (is_asked & is_there & (batch >= step))
    count = is_near.to(tl.int32)
    to = tl.atomic_add(num_near, tl.sum(count, axis=0), sem="relaxed")
    to += tl.cumsum(count, axis=0) - count
    note_full(alert, step, num_entries, tl.max(tl.where(is_near, to, 0), axis=0) >= max_near)
    is_near = is_near & (to < max_near)
    tl.store(near_rows + to, key, mask=is_near)
    tl.store(near_slots + to, slot, mask=is_near)
    moved = place // old_room * room + place % old_room
    tl.store(near_places + to, tl.where(place < 0, -1, moved), mask=is_near)
    latest = tl.max(tl.where(has_key & (is_near == 0), tick, -1), axis=0)
    tl.atomic_max(forgotten, latest, mask=latest >= 0, sem="relaxed")


@element_kernel
def _insert(
    near_rows: tl.tensor,
    near_slots: tl.tensor,
    near_places: tl.tensor,
    num_near: tl.tensor,
    keys: tl.tensor,
    slots_of_rows: tl.tensor,
    places_of_rows: tl.tensor,
    planned: tl.tensor,
    alert: tl.tensor,
    num_entries: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    near = tl.program_id(0) * TILE + tl.arange(0, TILE)
    is_near = near < tl.load(num_near)
    row = tl.load(near_rows + near, mask=is_near, other=0)
    entry = claim_entry(keys, row, is_near, num_entries, alert, tl.load(planned))
    tl.store(slots_of_rows + entry, tl.load(near_slots + near, mask=is_near), mask=is_near)
    tl.store(places_of_rows + entry, tl.load(near_places + near, mask=is_near), mask=is_near)
