"""`planning.plan` in Triton, around the choice of victims.

find      which step it is; the slots of the batch's rows, and which rows have none
(`victims_triton`)
assign    slots for the missing rows; which transfers can be issued ahead
lists     rows and slots that move, side by side, and the header
lookups   the slot of each lookup

A kernel that counts says how many there are in each tile, and the next one adds what is before its
own (`sums_triton`). What one program does for all is done by the first one, in passing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bagpipe.cache.triton_launch import Tiling, on_device_of
from bagpipe.device_oracle import planning_kernels as kernels
from bagpipe.device_oracle.state import BATCH_HEADER_LENGTH, HEADER_LENGTH, NEVER, State
from bagpipe.device_oracle.sums_triton import GROUP, make_counts, num_groups
from bagpipe.device_oracle.victims_triton import choose_victims

_TILE = Tiling(elements=1024, per_thread=4).of(1)
_KINDS = 4
"""Kinds of transfers: evicted ahead, evicted urgently, fetched ahead, fetched urgently."""

_NOTED = 7
"""What is noted for the header: how many there are of each kind, then as from OVERLAPPED_FENCE on,
with 1 added to fences."""


def plan(state: State) -> None:
    """See `planning.plan`."""
    window, room, device = state.window, state.capacity.max_uniques, state.planned.device
    num_tiles, warps = _TILE.count(room), _TILE.num_warps
    tiled: dict[str, object] = {"TILE": _TILE.rows, "GROUP": GROUP}

    def ints(length: int) -> Tensor:
        return torch.empty(length, dtype=torch.int32, device=device)

    now = torch.empty(5, dtype=torch.int64, device=device)
    slots, next_uses, ranks, kinds = ints(room), ints(room), ints(room), ints(room)
    evicted = state.rows_of_slots.new_empty(room)
    lengths = [1, _NOTED, num_groups(num_tiles), _KINDS * num_groups(num_tiles)]
    zeros = torch.zeros(sum(lengths), dtype=torch.int32, device=device)
    num_missing, noted, missing_groups, moved_groups = zeros.split_with_sizes(lengths)
    missing = make_counts(num_tiles, 1, missing_groups)
    moved = make_counts(num_tiles, _KINDS, moved_groups)
    with on_device_of(now):
        kernels.find.launch(
            num_tiles,
            (
                state.planned,
                state.entered,
                state.settled,
                state.batches,
                state.headers,
                now,
                state.unique_rows,
                state.next_of_places,
                state.keys,
                state.slots_of_rows,
                state.last_uses,
                state.next_uses,
                slots,
                next_uses,
                ranks,
                missing.tiles,
                missing.groups,
                num_missing,
                room,
                num_tiles,
                state.num_entries,
            ),
            tiled
            | {
                "RING": window.ring_length,
                "PLANS": window.num_plans,
                "DEPTH": window.prefetch_depth,
                "FIRST": window.first_step,
                "NUM_SLOTS": window.num_slots,
                "HEADER": BATCH_HEADER_LENGTH,
            },
            warps,
        )
        victims = choose_victims(state, num_missing)
        kernels.assign.launch(
            num_tiles,
            (
                now,
                state.unique_rows,
                slots,
                next_uses,
                ranks,
                missing.tiles,
                missing.groups,
                victims,
                state.rows_of_slots,
                state.keys,
                state.slots_of_rows,
                state.last_uses,
                state.next_uses,
                state.unique_slots,
                state.num_used_slots,
                kinds,
                moved.tiles,
                moved.groups,
                evicted,
                noted,
                room,
                num_tiles,
                state.num_rows,
                state.num_entries,
            ),
            tiled | {"DEPTH": window.prefetch_depth, "FIRST": window.first_step, "NEVER": NEVER},
            warps,
        )
        kernels.lists.launch(
            num_tiles,
            (
                now,
                state.unique_rows,
                state.unique_slots,
                kinds,
                moved.tiles,
                moved.groups,
                evicted,
                noted,
                state.evict_rows,
                state.evict_slots,
                state.fetch_rows,
                state.fetch_slots,
                state.headers,
                state.plan_headers,
                state.num_used_slots,
                state.planned,
                room,
                num_tiles,
            ),
            tiled | {"BATCH_HEADER": BATCH_HEADER_LENGTH, "HEADER": HEADER_LENGTH},
            warps,
        )
        size = state.capacity.max_lookups
        kernels.lookups.launch(
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
            {"TILE": _TILE.rows, "HEADER": BATCH_HEADER_LENGTH},
            warps,
        )
