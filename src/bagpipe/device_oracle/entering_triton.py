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

from dataclasses import dataclass
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
_TILED: dict[str, Any] = {"TILE": _TILE.rows}
_LONGEST: dict[str, Any] = {"LONGEST": MAX_PIECE_LENGTH}
_SHARDS: dict[str, Any] = {
    "LINE_BITS": LINE_BITS,
    "SHARD_BITS": _SHARD_BITS,
    "MULTIPLIER": _MULTIPLIER,
}
_SUMS = 4
"""Running sums over unique rows: lookups in first pieces, lookups beyond, further pieces, long
rows."""


@dataclass(frozen=True, kw_only=True)
class _Lookups:
    """The batch's lookups, sorted by row: (max_lookups,) each."""

    sorted_rows: Tensor  # as `State.unique_rows`; num_rows behind the last one
    order: Tensor  # int64, which lookup it is
    runs: Tensor  # int32, how many different rows there are up to here
    is_first: Tensor  # int32, whether it is the first one of its row
    outputs: Tensor  # int32, by lookup: the output row of its bag
    first_bad: Tensor  # (1,) int64, the first lookup outside its table, or max_lookups


@dataclass(frozen=True, kw_only=True)
class _Uniques:
    """The batch's unique rows, and runs of equal rows among the sorted lookups."""

    rows: Tensor  # (max_uniques,)
    starts: Tensor  # (max_uniques + 1,) int32, by run
    of_run: Tensor  # (max_uniques,) int32, the unique row of each run
    counts: Tensor  # (_SUMS, max_uniques) int32
    sums: Tensor  # (_SUMS, max_uniques) int32
    admitted: Tensor  # (3,) int64: whether the batch enters, its unique rows, its ring position


def enter(state: State) -> None:
    """See `entering.enter`."""
    with on_device_of(state.ids):
        lookups, numbers = _sort_lookups(state)
        found = _find_uniques(state, lookups, numbers)
        _write_lookups(state, lookups, found)
        _write_uniques(state, found)


def _sort_lookups(state: State) -> tuple[_Lookups, Tensor]:
    """Returns the lookups, and at (shard, lookup) how many first lookups there are up to there."""
    capacity, size = state.capacity, state.capacity.max_lookups
    rows = _empty(state, size, dtype=state.unique_rows.dtype)
    outputs, is_first = _empty(state, size), _empty(state, size)
    first_bad = torch.full((1,), size, device=rows.device)
    kernels.rows.launch(
        _TILE.count(size),
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
        _TILED | {"IS_JAGGED": capacity.is_jagged, "STEPS": capacity.max_bags.bit_length() + 1},
        _TILE.num_warps,
    )
    sorted_rows, order = torch.sort(rows, stable=True)
    marks = torch.zeros(NUM_SHARDS * size, dtype=torch.int32, device=rows.device)
    kernels.firsts.launch(
        _TILE.count(size),
        (sorted_rows, order, marks, is_first, size, state.num_rows),
        _TILED | _SHARDS,
        _TILE.num_warps,
    )
    lookups = _Lookups(
        sorted_rows=sorted_rows,
        order=order,
        runs=torch.cumsum(is_first, 0, dtype=torch.int32),
        is_first=is_first,
        outputs=outputs,
        first_bad=first_bad,
    )
    return lookups, torch.cumsum(marks, 0, dtype=torch.int32)


def _find_uniques(state: State, lookups: _Lookups, numbers: Tensor) -> _Uniques:
    """Numbers the unique rows, and says whether the batch may enter."""
    size, room = state.capacity.max_lookups, state.capacity.max_uniques
    starts, of_run = _empty(state, room + 1), _empty(state, room)
    rows = _empty(state, room, dtype=state.unique_rows.dtype)
    kernels.runs.launch(
        _TILE.count(size),
        (
            lookups.sorted_rows,
            lookups.order,
            lookups.is_first,
            lookups.runs,
            numbers,
            starts,
            of_run,
            rows,
            size,
            room,
            state.num_rows,
        ),
        _TILED | _SHARDS,
        _TILE.num_warps,
    )
    admitted = _empty(state, 3, dtype=torch.int64)
    kernels.admit.launch(
        1,
        (lookups.runs, lookups.first_bad, state.alert, state.entered, admitted, size, room),
        {
            "NUM_SLOTS": state.window.num_slots,
            "RING": state.window.ring_length,
            "BAD_ID": BAD_ID,
            "NO_ROOM": NO_ROOM,
            "TOO_MANY_ROWS": TOO_MANY_ROWS,
        },
        1,
    )
    counts = torch.zeros((_SUMS, room), dtype=torch.int32, device=rows.device)
    kernels.counts.launch(
        _TILE.count(room),
        (lookups.runs, starts, of_run, counts, size, room),
        _TILED | _LONGEST,
        _TILE.num_warps,
    )
    return _Uniques(
        rows=rows,
        starts=starts,
        of_run=of_run,
        counts=counts,
        sums=running_sums(counts),
        admitted=admitted,
    )


def _write_lookups(state: State, lookups: _Lookups, found: _Uniques) -> None:
    """Writes inverse, bags and further pieces, and what is kept of the bags."""
    capacity = state.capacity
    size, room = capacity.max_lookups, capacity.max_uniques
    kernels.lookups.launch(
        _TILE.count(size),
        (
            lookups.sorted_rows,
            lookups.order,
            lookups.runs,
            found.starts,
            found.of_run,
            found.counts,
            found.sums,
            lookups.outputs,
            found.admitted,
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
        _TILED | _LONGEST,
        _TILE.num_warps,
    )
    if capacity.is_jagged:
        has_scales = state.bag_scales.shape[1] > 0
        kernels.bags.launch(
            _TILE.count(len(state.bag_offsets)),
            (
                state.bag_offsets,
                state.sizes,
                state.is_mean.to(torch.int32) if has_scales else None,
                found.admitted,
                state.kept_offsets,
                state.bag_scales if has_scales else None,
                len(state.bag_offsets),
                state.num_features,
            ),
            _TILED,
            _TILE.num_warps,
        )


def _write_uniques(state: State, found: _Uniques) -> None:
    """Writes first pieces, long rows, links and the header."""
    capacity, room = state.capacity, state.capacity.max_uniques
    kernels.uniques.launch(
        _TILE.count(room),
        (
            found.rows,
            found.counts,
            found.sums,
            found.admitted,
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
        _TILED | {"NEVER": NEVER},
        _TILE.num_warps,
    )
    kernels.finish.launch(
        1,
        (
            found.sums,
            state.sizes,
            found.admitted,
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


def _empty(state: State, length: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(length, dtype=dtype, device=state.ids.device)
