"""The index of rows: an *entry* for each row of which the oracle knows something. Torch operations.

An entry has the row's slot (or when it was evicted) and the place of its latest use. The index has
one of two forms (`Window.knows_all_rows`):

- **An array of all rows.** A row is its own entry. 8 bytes a row of the tables.
- **A map** from rows to entries, of those in the cache, in the window, or evicted lately. Its size
  follows from cache and window, not from the tables. A batch adds its rows as it enters. After
  every `Window.batches_between` batches `rebuild` leaves out rows that have become far.

Of a row that is not in the map nothing is known but that it is in no slot, and that it was evicted
no later than the latest row that was left out: `State.forgotten`. New entries have that tick. So a
fetch may name a later fence than it must, but none later than plans before the current ones.

The map lies in `State.keys`. Here it is sorted: entries move as rows are added, and equal keys can
be found without a loop whose length depends on them. In Triton (`row_index_triton`) it is a table
of open addressing. Which entry a row has decides nothing, so plans are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bagpipe.device_oracle.alerts import INDEX_FULL, RUNNING
from bagpipe.device_oracle.masked import pick, spread
from bagpipe.device_oracle.state import NO_KEY, SPARE, State


def find(state: State, rows: Tensor, is_row: Tensor) -> Tensor:
    """The entries of rows that have one.

    Args:
        state: Is not changed.
        rows: (n,) int64.
        is_row: (n,) bool, which of them to look for.

    Returns:
        (n,) int64; a spare entry where there is no row to look for, or it has none.
    """
    if state.keys is None:
        return spread(is_row, rows, state.num_entries)
    keys = state.keys[: state.num_entries]
    entries = torch.searchsorted(keys, rows).clamp(max=len(keys) - 1)
    return spread(is_row & (keys[entries] == rows), entries, len(keys))


def claim(state: State, rows: Tensor, is_row: Tensor) -> Tensor:
    """As `find`, for different rows, which get an entry where they have none.

    If there are not enough entries, that is noted in `State.alert`.
    """
    if state.keys is None:
        return find(state, rows, is_row)
    size, new = state.num_entries, torch.ones_like(rows, dtype=torch.int32)
    is_new = is_row & (find(state, rows, is_row) >= size)
    keys = torch.cat((state.keys[:size], pick(is_new, rows, NO_KEY)))
    keys, order = torch.sort(keys)
    is_full = keys[size] != NO_KEY
    full_like = torch.full_like
    alert = (full_like(keys[0], INDEX_FULL), state.entered[0], full_like(keys[0], size))
    is_new_alert = (state.alert[0] == RUNNING) & is_full
    state.alert[:3] = torch.where(is_new_alert, torch.stack(alert), state.alert[:3])
    unknown = new * (-2 - state.forgotten)
    for values, first in ((state.slots_of_rows, unknown), (state.places_of_rows, -new)):
        values[:size] = torch.cat((values[:size], first))[order[:size]]
    state.keys[:size] = keys[:size]
    return find(state, rows, is_row)


def rebuild(state: State, old: State) -> None:
    """Takes over what is known of rows from a state that goes on, and forgets rows that are far.

    Args:
        state: Gets it. Its rings hold what those of `old` do.
        old: The state before it grew, or `state` itself.
    """
    if state.keys is None or old.keys is None:
        _renew_places(state, old)
        return
    keys, slots, places = (
        values[: old.num_entries] for values in (old.keys, old.slots_of_rows, old.places_of_rows)
    )
    is_kept = is_near(old)
    ticks = pick((keys != NO_KEY) & ~is_kept, -2 - slots, -1)
    state.forgotten.copy_(torch.maximum(old.forgotten, ticks.amax()))
    keys, order = torch.sort(pick(is_kept, keys, NO_KEY))
    is_key, slots, places = keys != NO_KEY, slots[order], places[order].long()
    room, before = state.capacity.max_uniques, old.capacity.max_uniques
    places = torch.where(places < 0, places, places // before * room + places % before)
    unknown = (-2 - state.forgotten).expand(len(state.slots_of_rows))
    state.keys.fill_(NO_KEY)
    state.places_of_rows.fill_(-1)
    state.slots_of_rows.copy_(unknown)
    state.keys[: len(keys)] = keys
    state.slots_of_rows[: len(keys)] = torch.where(is_key, slots, unknown[: len(keys)])
    state.places_of_rows[: len(keys)] = pick(is_key, places, -1).int()


def is_near(state: State) -> Tensor:
    """Which entries of a map are of rows that plans to come may depend on: (num_entries,) bool.

    Those are rows in a slot, rows of a batch that is not planned yet, and rows that were evicted
    lately: none is forgotten before its write-back has been asked for by a plan long released.
    """
    assert state.keys is not None
    size, window = state.num_entries, state.window
    keys, slots = state.keys[:size], state.slots_of_rows[:size]
    places = state.places_of_rows[:size].long()
    known = places.clamp(min=0)
    is_there = (places >= 0) & (state.unique_rows.view(-1)[known] == keys)
    is_ahead = is_there & (state.batches[known // state.capacity.max_uniques] >= state.planned)
    is_recent = -2 - slots > state.planned - window.num_plans
    return (keys != NO_KEY) & ((slots >= 0) | is_ahead | is_recent)


def _renew_places(state: State, old: State) -> None:
    """Says anew in which place each row was used last, in an array of all rows."""
    uniques = state.capacity.max_uniques
    state.places_of_rows.fill_(-1)
    for position in torch.argsort(old.batches).tolist():  # later uses overwrite earlier ones
        if int(old.batches[position]) >= 0:
            rows = state.unique_rows[position].long()
            first = position * uniques
            places = torch.arange(first, first + uniques, dtype=torch.int32, device=rows.device)
            state.places_of_rows[rows] = places
    state.places_of_rows[-SPARE:] = -1
