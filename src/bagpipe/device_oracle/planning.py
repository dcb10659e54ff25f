"""A step is planned: its rows' slots, what leaves and what is fetched. Torch operations.

The oldest batch of the window that is not planned is. It keeps the invariants of docs/design.md;
`bagpipe.oracle.checks` replays the plans in tests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bagpipe.device_oracle import row_index
from bagpipe.device_oracle.masked import pick, scattered, spread
from bagpipe.device_oracle.state import (
    BATCH_HEADER_LENGTH,
    HEADER_LENGTH,
    NEVER,
    NUM_UNIQUES,
    State,
)
from bagpipe.device_oracle.victims import choose_victims


def plan(state: State) -> None:
    """Plans the next step; changes nothing if its batch has not entered.

    An alert does not stop it: the batches before the one that could not enter are trained.
    """
    window, step = state.window, state.planned
    position, target = step % window.ring_length, step % window.num_plans
    is_running = step < state.entered
    header = state.headers.index_select(0, position)[0]
    number = pick(is_running, header[NUM_UNIQUES].view(1), 0)
    _settle(state, is_running)
    rows, entries, slots, next_uses, is_unique = _find_rows(state, position, number)
    is_missing = is_unique & (slots < 0)
    number = is_missing.sum()
    victims = choose_victims(state, number)
    rank = torch.cumsum(is_missing, 0) - 1
    slots = torch.where(is_missing, victims[rank.clamp(min=0)], slots)
    moved = _assign(state, rows, entries, slots, next_uses, is_missing, target)
    state.unique_slots.index_copy_(0, target, slots.int().unsqueeze(0))
    # What an inverse holds of a batch that did not enter must stay within bounds.
    inverse = state.inverse.index_select(0, position)[0].clamp(0, len(slots) - 1)
    lookup_slots = slots.int().index_select(0, inverse)
    state.lookup_slots.index_copy_(0, target, lookup_slots.unsqueeze(0))
    spare = torch.zeros(HEADER_LENGTH - BATCH_HEADER_LENGTH - len(moved) - 1, device=rows.device)
    header = torch.cat((header, moved, state.num_used_slots, spare.long()))
    header = torch.where(is_running, header, state.plan_headers[target][0])
    state.plan_headers.index_copy_(0, target, header.unsqueeze(0))
    state.planned.add_(is_running)


def _settle(state: State, is_running: Tensor) -> None:
    """Settles the uses that are old enough, and in a tight cache all before this step."""
    window, step = state.window, state.planned
    oldest = (step - window.prefetch_depth).clamp(min=window.first_step)
    is_recent = (state.batches >= oldest) & (state.batches <= step)
    num_held = pick(is_recent, state.headers[:, NUM_UNIQUES], 0).sum()
    settled = torch.where(num_held > window.num_slots, step, step - window.prefetch_depth)
    settled = torch.where(is_running, settled, state.settled)
    state.settled.copy_(torch.maximum(state.settled, settled))


def _find_rows(
    state: State, position: Tensor, number: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Finds the slots of the batch's rows, and notes their uses.

    Returns:
        Rows and their entries (int64), slots (int64, negative where a row has none), next uses
        (int32), and whether there is such a row: (max_uniques,) each.
    """
    room, spare = state.capacity.max_uniques, state.window.num_slots
    index = torch.arange(room, device=position.device)
    is_unique = index < number
    rows = state.unique_rows.index_select(0, position)[0].long()
    entries = row_index.find(state, rows, is_unique)
    next_uses = state.next_of_places[position * room + index]
    slots = state.slots_of_rows[entries].long()
    used = spread(is_unique & (slots >= 0), slots, spare)
    state.last_uses.scatter_(0, used, state.planned.int().expand(room))
    state.next_uses.scatter_(0, used, next_uses)
    return rows, entries, slots, next_uses, is_unique


def _assign(
    state: State,
    rows: Tensor,
    entries: Tensor,
    slots: Tensor,
    next_uses: Tensor,
    is_missing: Tensor,
    target: Tensor,
) -> Tensor:
    """Gives the missing rows their slots, and writes down what moves.

    A slot whose row was used too recently can't be filled ahead, and a row that was evicted too
    recently can't be fetched ahead: these transfers are urgent.

    Returns:
        What the header says of it, from EVICTED_OVERLAPPED to EVICTED_BLINDLY: (7,).
    """
    window, step, spare = state.window, state.planned, state.window.num_slots
    ahead = (step - window.prefetch_depth).clamp(min=window.first_step)
    taken = spread(is_missing, slots, spare)
    evicted = state.rows_of_slots[taken].long()
    is_evicted = is_missing & (evicted < state.num_rows)
    is_old = state.last_uses[taken] < step - window.prefetch_depth
    is_old |= ~is_evicted
    is_blind = is_evicted & (state.next_uses[taken] == NEVER)
    evicted_at = (-2 - state.slots_of_rows[entries].long()).clamp(min=-1)
    is_ahead = is_missing & is_old & (evicted_at <= ahead)
    is_urgent = is_missing & ~is_ahead

    gone = row_index.find(state, evicted, is_evicted)
    state.slots_of_rows.scatter_(0, gone, (-2 - torch.where(is_old, ahead, step)).int())
    come = spread(is_missing, entries, state.num_entries)
    state.slots_of_rows.scatter_(0, come, taken.int())
    state.rows_of_slots.scatter_(0, taken, rows.to(state.rows_of_slots.dtype))
    state.next_uses.scatter_(0, taken, next_uses)
    state.last_uses.scatter_(0, taken, step.int().expand(len(rows)))
    state.num_used_slots.add_((is_missing & ~is_evicted).sum())

    out = _write_moved(is_evicted & is_old, is_evicted & ~is_old, evicted, taken)
    state.evict_rows.index_copy_(0, target, out[0].to(state.evict_rows.dtype))
    state.evict_slots.index_copy_(0, target, out[1].int())
    into = _write_moved(is_ahead, is_urgent, rows, taken)
    state.fetch_rows.index_copy_(0, target, into[0].to(state.fetch_rows.dtype))
    state.fetch_slots.index_copy_(0, target, into[1].int())
    return torch.stack(
        [
            (is_evicted & is_old).sum(),
            is_evicted.sum(),
            is_ahead.sum(),
            is_missing.sum(),
            pick(is_ahead, evicted_at, -1).amax(),
            pick(is_urgent, evicted_at, -1).amax(),
            is_blind.sum(),
        ]
    )


def _write_moved(
    is_overlapped: Tensor, is_urgent: Tensor, rows: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor]:
    """Puts the rows that move, and their slots, side by side: the overlapped ones first.

    Returns:
        (1, max_uniques) int64 each.
    """
    room = len(rows)
    is_moved = torch.cat((is_overlapped, is_urgent))
    place = torch.cumsum(is_moved, 0) - 1
    moved_rows, moved_slots = (
        scattered(room, is_moved, place, values.repeat(2)) for values in (rows, slots)
    )
    return moved_rows.unsqueeze(0), moved_slots.unsqueeze(0)
