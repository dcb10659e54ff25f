"""`entering.enter` in Triton, around a stable sort of torch's.

    rows      the row and the output of each lookup; the first bad id
    (sort by row)
    firsts    which sorted lookup is the first one of its row, and a bit at (shard, lookup)
    words     how many of these bits there are up to each word of them
    admit     (one program) how many there are, which says whether the batch may enter
    runs      where each run of equal rows begins, and which unique row it is of
    counts    how many lookups each unique row has
    totals    the lookups of each tile of unique rows, in first pieces and beyond
    uniques   where their pieces begin, long rows, and linking
    lookups   inverse, bags, weights, where further pieces begin, and the header
    bags      offsets and scales, where bags are jagged

It computes what the torch operations do, with an access to memory for each value instead of ten.
The number of a unique row is that of the bits before its own: 8 a lookup, which the device's cache
holds, where integers would go to its memory. Running sums within a tile are the kernels' own;
`sums_triton` adds what is before the tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bagpipe.cache.triton_launch import Tiling, on_device_of
from bagpipe.device_oracle import entering_kernels as kernels
from bagpipe.device_oracle import linking_kernels as linking
from bagpipe.device_oracle.alerts import BAD_ID, NO_ROOM, TOO_MANY_ROWS
from bagpipe.device_oracle.state import BATCH_HEADER_LENGTH, NEVER, State
from bagpipe.device_oracle.sums_triton import GROUP, TileCounts, make_counts, num_groups
from bagpipe.plan import MAX_PIECE_LENGTH
from bagpipe.topology import LINE_BITS, NUM_SHARDS

_TILE = Tiling(elements=1024, per_thread=4).of(1)
_MULTIPLIER = 0x9E3779B97F4A7C15 - (1 << 64)  # that of `topology.shard_of`, as an int64
_SHARD_BITS = 3
_SHARDS: dict[str, Any] = {
    "LINE_BITS": LINE_BITS,
    "SHARD_BITS": _SHARD_BITS,
    "MULTIPLIER": _MULTIPLIER,
}
_KINDS = 4
"""What `totals` counts: lookups in first pieces, lookups beyond, further pieces, long rows."""


@dataclass(frozen=True, kw_only=True)
class _Lookups:
    """The batch's lookups, sorted by row: (max_lookups,) each."""

    sorted_rows: Tensor  # as `State.unique_rows`; num_rows behind the last one
    order: Tensor  # int64, which lookup it is
    runs: Tensor  # int32, which run of equal rows it is in; first, the how manieth in its tile
    run_counts: TileCounts  # how many runs begin in each tile
    outputs: Tensor | None  # int32, by lookup: the output row of its bag, where bags are jagged
    first_bad: Tensor  # (1,) int32, how far before max_lookups the first bad lookup is, or 0


@dataclass(frozen=True, kw_only=True)
class _Marks:
    """A bit at (shard, lookup) for each first lookup of a row, in W words."""

    bits: Tensor  # (W,) int32
    before: Tensor  # (W,) int32, how many there are in the tile's words before
    tiles: Tensor  # (tiles,) int32, how many there are in the tiles before


@dataclass(frozen=True, kw_only=True)
class _Uniques:
    """The batch's unique rows, and runs of equal rows among the sorted lookups."""

    starts: Tensor  # (max_uniques,) int32, by run
    of_run: Tensor  # (max_uniques,) int32, the unique row of each run
    counts: Tensor  # (max_uniques,) int32, how many lookups each has
    totals: TileCounts  # of _KINDS
    rest_begins: Tensor  # (max_uniques,) int32, where the lookups beyond the first piece begin
    further_begins: Tensor  # (max_uniques,) int32, further pieces of the rows before
    admitted: Tensor  # (3,) int64: whether the batch enters, its unique rows, its ring position


def enter(state: State) -> None:
    """See `entering.enter`."""
    size, room = state.capacity.max_lookups, state.capacity.max_uniques
    num_words = -(-NUM_SHARDS * size // 32)
    lengths = [num_words, 1, num_groups(_TILE.count(size)), _KINDS * num_groups(_TILE.count(room))]
    with on_device_of(state.ids):
        zeros = torch.zeros(sum(lengths), dtype=torch.int32, device=state.ids.device)
        bits, first_bad, run_groups, groups = zeros.split_with_sizes(lengths)
        marks = _Marks(
            bits=bits, before=_ints(state, num_words), tiles=_ints(state, _TILE.count(num_words))
        )
        run_counts = make_counts(_TILE.count(size), 1, run_groups)
        lookups = _sort_lookups(state, first_bad, run_counts)
        admitted = _admit(state, lookups, marks)
        totals = make_counts(_TILE.count(room), _KINDS, groups)
        found = _find_uniques(state, lookups, marks, admitted, totals)
        _write_uniques(state, found)
        _write_lookups(state, lookups, found)


def _sort_lookups(state: State, first_bad: Tensor, run_counts: TileCounts) -> _Lookups:
    capacity, size = state.capacity, state.capacity.max_lookups
    rows = torch.empty(size, dtype=state.unique_rows.dtype, device=state.ids.device)
    outputs = _ints(state, size) if capacity.is_jagged else None
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
        _tiled(STEPS=capacity.max_bags.bit_length() + 1),
        _TILE.num_warps,
    )
    sorted_rows, order = torch.sort(rows, stable=True)
    return _Lookups(
        sorted_rows=sorted_rows,
        order=order,
        runs=_ints(state, size),
        run_counts=run_counts,
        outputs=outputs,
        first_bad=first_bad,
    )


def _admit(state: State, lookups: _Lookups, marks: _Marks) -> Tensor:
    """Marks first lookups, and says whether the batch may enter: see `_Uniques.admitted`."""
    size, num_words = state.capacity.max_lookups, len(marks.bits)
    kernels.firsts.launch(
        _TILE.count(size),
        (
            lookups.sorted_rows,
            lookups.order,
            marks.bits,
            lookups.runs,
            lookups.run_counts.tiles,
            lookups.run_counts.groups,
            size,
            state.num_rows,
            _TILE.count(size),
        ),
        _tiled(GROUP=GROUP, **_SHARDS),
        _TILE.num_warps,
    )
    kernels.words.launch(
        _TILE.count(num_words),
        (marks.bits, marks.before, marks.tiles, num_words),
        _tiled(),
        _TILE.num_warps,
    )
    admitted = torch.empty(3, dtype=torch.int64, device=state.ids.device)
    kernels.admit.launch(
        1,
        (
            marks.tiles,
            lookups.first_bad,
            state.alert,
            state.entered,
            admitted,
            size,
            state.capacity.max_uniques,
            len(marks.tiles),
        ),
        _tiled(
            NUM_SLOTS=state.window.num_slots,
            RING=state.window.ring_length,
            BAD_ID=BAD_ID,
            NO_ROOM=NO_ROOM,
            TOO_MANY_ROWS=TOO_MANY_ROWS,
        ),
        _TILE.num_warps,
    )
    return admitted


def _find_uniques(
    state: State, lookups: _Lookups, marks: _Marks, admitted: Tensor, totals: TileCounts
) -> _Uniques:
    """Numbers the unique rows, writes them, and counts their lookups."""
    size, room = state.capacity.max_lookups, state.capacity.max_uniques
    found = _Uniques(
        starts=_ints(state, room),
        of_run=_ints(state, room),
        counts=_ints(state, room),
        totals=totals,
        rest_begins=_ints(state, room),
        further_begins=_ints(state, room),
        admitted=admitted,
    )
    kernels.runs.launch(
        _TILE.count(size),
        (
            lookups.sorted_rows,
            lookups.order,
            marks.bits,
            marks.before,
            marks.tiles,
            lookups.runs,
            lookups.run_counts.tiles,
            lookups.run_counts.groups,
            admitted,
            found.starts,
            found.of_run,
            state.unique_rows,
            size,
            room,
            state.num_rows,
            _TILE.count(size),
        ),
        _tiled(GROUP=GROUP, **_SHARDS),
        _TILE.num_warps,
    )
    kernels.counts.launch(
        _TILE.count(room),
        (found.starts, found.of_run, admitted, state.sizes, found.counts),
        _tiled(),
        _TILE.num_warps,
    )
    linking.totals.launch(
        _TILE.count(room),
        (found.counts, admitted, totals.tiles, totals.groups, _TILE.count(room)),
        _tiled(LONGEST=MAX_PIECE_LENGTH, GROUP=GROUP),
        _TILE.num_warps,
    )
    return found


def _write_uniques(state: State, found: _Uniques) -> None:
    """Writes first pieces, long rows and links."""
    capacity, room = state.capacity, state.capacity.max_uniques
    linking.uniques.launch(
        _TILE.count(room),
        (
            found.counts,
            found.totals.tiles,
            found.totals.groups,
            found.admitted,
            state.planned,
            state.entered,
            state.batches,
            state.unique_rows,
            state.piece_offsets,
            state.long_uniques,
            state.long_offsets,
            found.rest_begins,
            found.further_begins,
            state.keys,
            state.slots_of_rows,
            state.places_of_rows,
            state.next_of_places,
            state.next_uses,
            state.alert,
            room,
            state.num_rows,
            state.num_entries,
            _TILE.count(room),
            capacity.max_pieces,
            capacity.max_further,
        ),
        _tiled(LONGEST=MAX_PIECE_LENGTH, NEVER=NEVER, GROUP=GROUP),
        _TILE.num_warps,
    )


def _write_lookups(state: State, lookups: _Lookups, found: _Uniques) -> None:
    """Writes inverse, bags and further pieces, what is kept of the bags, and the header."""
    capacity, size = state.capacity, state.capacity.max_lookups
    linking.lookups.launch(
        _TILE.count(size),
        (
            lookups.order,
            lookups.runs,
            found.starts,
            found.of_run,
            found.rest_begins,
            found.further_begins,
            lookups.outputs,
            found.admitted,
            state.sizes,
            found.totals.tiles,
            found.totals.groups,
            state.lookup_weights if capacity.is_weighted else None,
            state.inverse,
            state.bags,
            state.bag_weights if capacity.is_weighted else None,
            state.kept_weights if capacity.is_weighted else None,
            state.piece_offsets,
            state.long_offsets,
            state.headers,
            state.batches,
            state.entered,
            size,
            state.num_features,
            _TILE.count(capacity.max_uniques),
            capacity.max_pieces,
            capacity.max_further,
        ),
        _tiled(LONGEST=MAX_PIECE_LENGTH, GROUP=GROUP, HEADER=BATCH_HEADER_LENGTH),
        _TILE.num_warps,
    )
    if capacity.is_jagged:
        has_scales = state.bag_scales.shape[1] > 0
        linking.bags.launch(
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
            _tiled(),
            _TILE.num_warps,
        )


def _tiled(**constants: object) -> dict[str, object]:
    """A kernel's constants, the first of which is its tile."""
    return {"TILE": _TILE.rows, **constants}


def _ints(state: State, length: int) -> Tensor:
    return torch.empty(length, dtype=torch.int32, device=state.ids.device)
