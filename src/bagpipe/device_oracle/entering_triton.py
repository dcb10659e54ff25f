"""`entering.enter` in Triton, around a stable sort and running sums of torch's.

    rows      the row and the output of each lookup; the first bad id
    (sort by row)
    firsts    which sorted lookup is the first one of its row, and a mark at (shard, lookup)
    (running sums of both: the number of each run of equal rows, and of each unique row)
    runs      where each run begins, and which unique row it is of
    admit     (one program) whether the batch may enter
    counts    how many lookups each unique row has, in first pieces and beyond
    (running sums of these)
    lookups   inverse, bags, weights, and where further pieces begin
    uniques   where first pieces begin, long rows, and linking
    bags      offsets and scales, where bags are jagged or weighted
    finish    (one program) the header

It computes what the torch operations do, with an access to memory for each value instead of ten.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bagpipe.cache.triton_launch import Tiling, on_device_of
from bagpipe.device_oracle import entering_kernels as kernels
from bagpipe.device_oracle.alerts import BAD_ID, NO_ROOM, TOO_MANY_ROWS
from bagpipe.device_oracle.state import BATCH_HEADER_LENGTH, NEVER, State
from bagpipe.device_oracle.victims_triton import running_sums
from bagpipe.plan import MAX_PIECE_LENGTH
from bagpipe.topology import LINE_BITS, NUM_SHARDS

_TILE = Tiling(elements=1024, per_thread=8).of(1)
_MULTIPLIER = 0x9E3779B97F4A7C15 - (1 << 64)  # that of `topology.shard_of`, as an int64
_SHARD_BITS = 3
_SUMS = 4
"""Running sums over unique rows: lookups in first pieces, lookups beyond, further pieces, long
rows."""


def enter(state: State) -> None:
    """See `entering.enter`."""
    capacity, device = state.capacity, state.ids.device
    size, room = capacity.max_lookups, capacity.max_uniques
    longest: dict[str, Any] = {"LONGEST": MAX_PIECE_LENGTH}
    tile: dict[str, Any] = {"TILE": _TILE.rows}
    by_lookup, by_unique, warps = _TILE.count(size), _TILE.count(room), _TILE.num_warps

    def ints(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    rows = torch.empty(size, dtype=state.unique_rows.dtype, device=device)
    outputs, first_bad = ints(size), torch.full((1,), size, device=device)
    with on_device_of(rows):
        kernels.rows.launch(
            by_lookup,
            (
                state.ids,
                state.sizes,
                state.bag_offsets,
                state.first_rows,
                state.table_sizes,
                rows,
                outputs,
                first_bad,
                size,
                state.num_features,
                state.num_rows,
            ),
            tile | {"IS_JAGGED": capacity.is_jagged, "STEPS": capacity.max_bags.bit_length() + 1},
            warps,
        )
        sorted_rows, order = torch.sort(rows, stable=True)
        marks = torch.zeros(NUM_SHARDS * size, dtype=torch.int32, device=device)
        is_first = ints(size)
        shards = {"LINE_BITS": LINE_BITS, "SHARD_BITS": _SHARD_BITS, "MULTIPLIER": _MULTIPLIER}
        kernels.firsts.launch(
            by_lookup,
            (sorted_rows, order, marks, is_first, size, state.num_rows),
            tile | shards,
            warps,
        )
        numbers = torch.cumsum(marks, 0, dtype=torch.int32)
        runs = torch.cumsum(is_first, 0, dtype=torch.int32)
        starts, unique_of_run = ints(room + 1), ints(room)
        unique_rows = torch.empty(room, dtype=rows.dtype, device=device)
        kernels.runs.launch(
            by_lookup,
            (
                sorted_rows,
                order,
                is_first,
                runs,
                numbers,
                starts,
                unique_of_run,
                unique_rows,
                size,
                room,
                state.num_rows,
            ),
            tile | shards,
            warps,
        )
        admitted = torch.empty(3, dtype=torch.int64, device=device)
        kernels.admit.launch(
            1,
            (runs, first_bad, state.alert, state.entered, admitted, size, room),
            {
                "NUM_SLOTS": state.window.num_slots,
                "RING": state.window.ring_length,
                "BAD_ID": BAD_ID,
                "NO_ROOM": NO_ROOM,
                "TOO_MANY_ROWS": TOO_MANY_ROWS,
            },
            1,
        )
        counts = torch.zeros((_SUMS, room), dtype=torch.int32, device=device)
        kernels.counts.launch(
            by_unique,
            (runs, starts, unique_of_run, counts, size, room),
            tile | longest,
            warps,
        )
        sums = running_sums(counts)
        kernels.lookups.launch(
            by_lookup,
            (
                sorted_rows,
                order,
                runs,
                starts,
                unique_of_run,
                counts,
                sums,
                outputs,
                admitted,
                state.lookup_weights if capacity.is_weighted else None,
                state.inverse,
                state.bags,
                state.bag_weights if capacity.is_weighted else None,
                state.kept_weights if capacity.is_weighted else None,
                state.piece_offsets,
                size,
                room,
                state.num_rows,
                capacity.max_pieces,
            ),
            tile | longest,
            warps,
        )
        kernels.uniques.launch(
            by_unique,
            (
                unique_rows,
                counts,
                sums,
                admitted,
                state.planned,
                state.entered,
                state.batches,
                state.unique_rows,
                state.piece_offsets,
                state.long_uniques,
                state.long_offsets,
                state.slots_of_rows,
                state.places_of_rows,
                state.next_of_places,
                state.next_uses,
                room,
                state.num_rows,
                capacity.max_pieces,
                capacity.max_further,
            ),
            tile | {"NEVER": NEVER},
            warps,
        )
        if capacity.is_jagged:
            has_scales = state.bag_scales.shape[1] > 0
            kernels.bags.launch(
                _TILE.count(len(state.bag_offsets)),
                (
                    state.bag_offsets,
                    state.sizes,
                    state.is_mean.to(torch.int32) if has_scales else None,
                    admitted,
                    state.kept_offsets,
                    state.bag_scales if has_scales else None,
                    len(state.bag_offsets),
                    state.num_features,
                ),
                tile,
                warps,
            )
        kernels.finish.launch(
            1,
            (
                sums,
                state.sizes,
                admitted,
                state.entered,
                state.headers,
                state.batches,
                state.piece_offsets,
                state.long_offsets,
                room,
                capacity.max_pieces,
                capacity.max_further,
            ),
            {"HEADER": BATCH_HEADER_LENGTH},
            1,
        )
