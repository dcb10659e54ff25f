"""A batch enters the window: de-duplication, gradient schedule, linking. Torch operations.

Shapes are those of the capacity. Lookups behind the batch's last one get a row that there is not,
`num_rows`, which sorts last. A stable sort by row brings the lookups of a row together, in lookup
order. A row's first lookup says where it stands among the unique rows: one running sum over (shard,
lookup) numbers them shard by shard, in each in first-use order. `bagpipe.oracle.dedup` says what
must come out, to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bagpipe.device_oracle import row_index
from bagpipe.device_oracle.alerts import BAD_ID, NO_ROOM, RUNNING, TOO_MANY_ROWS
from bagpipe.device_oracle.masked import pick, scattered, spread
from bagpipe.device_oracle.state import NEVER, SPARE, State
from bagpipe.plan import MAX_PIECE_LENGTH
from bagpipe.topology import LINE_BITS, NUM_SHARDS

_MULTIPLIER = 0x9E3779B97F4A7C15 - (1 << 64)  # that of `topology.shard_of`, as an int64
_SHARD_BITS = 3
assert 1 << _SHARD_BITS == NUM_SHARDS


@dataclass(frozen=True, kw_only=True)
class Lookups:
    """What each lookup is of: (max_lookups,) each."""

    rows: Tensor  # int64; num_rows behind the last one
    outputs: Tensor  # int64, the output row b * F + f of its bag


@dataclass(frozen=True, kw_only=True)
class Uniques:
    """The sorted lookups and the unique rows."""

    order: Tensor  # (max_lookups,) int64, lookups by row, in lookup order within a row
    is_lookup: Tensor  # (max_lookups,) whether there is such a lookup, as sorted
    uniques: Tensor  # (max_lookups,) int64, as sorted: which unique row it is of
    places: Tensor  # (max_lookups,) int64, as sorted: the how manieth lookup of its row it is
    rows: Tensor  # (max_uniques,) int64; num_rows behind the last one
    counts: Tensor  # (max_uniques,) int64, how many lookups each has
    number: Tensor  # () int64


def enter(state: State) -> None:
    """Takes the batch in `ids`, `sizes`, `bag_offsets` and `lookup_weights` into the window.

    Where it can't, it says so in `alert`, and changes nothing but the ring position of the batch.
    """
    position = state.entered % state.window.ring_length
    lookups, first_bad = read_lookups(state)
    found = number_rows(state, lookups)
    is_running = _note_alert(state, first_bad, found.number)
    number = pick(is_running, found.number.view(1), 0)
    num_pieces, num_long = schedule(state, lookups, found, position)
    header = (state.entered[0], *state.sizes, number[0], num_pieces, num_long)
    _put(state.headers, position, torch.stack(header))
    _keep_bags(state, position)
    link(state, found.rows, number, position)
    batch = torch.where(is_running, state.entered, state.batches[position])
    state.batches.index_copy_(0, position, batch)
    state.entered.add_(is_running)


def read_lookups(state: State) -> tuple[Lookups, Tensor]:
    """Returns what the lookups are of, and the first one outside its table: () int64, or more."""
    num_lookups, batch_size = state.sizes[0], state.sizes[1].clamp(min=1)
    lookup = torch.arange(len(state.ids), device=state.ids.device)
    is_lookup = lookup < num_lookups
    bag = pick(is_lookup, lookup, 0)
    if state.capacity.is_jagged:
        bag = torch.searchsorted(_whole_offsets(state).long(), bag, right=True) - 1
    feature = (bag // batch_size).clamp(0, state.num_features - 1)
    outputs = (bag - feature * batch_size) * state.num_features + feature
    is_bad = is_lookup & ((state.ids < 0) | (state.ids >= state.table_sizes[feature]))
    first_bad = pick(is_bad, lookup, len(lookup)).amin()
    rows = pick(is_lookup & ~is_bad, state.ids + state.first_rows[feature], state.num_rows)
    return Lookups(rows=rows, outputs=outputs), first_bad


def _whole_offsets(state: State) -> Tensor:
    """The bags' offsets (max_bags + 1,); all behind the last bag end at the last lookup."""
    bag = torch.arange(len(state.bag_offsets), device=state.ids.device)
    num_bags = state.sizes[1] * state.num_features
    return torch.where(bag <= num_bags, state.bag_offsets, state.sizes[0].int())


def shards_of(rows: Tensor) -> Tensor:
    """The shard of each row (n,) int64: that of `bagpipe.topology.shard_of` for NUM_SHARDS."""
    hashed = (rows >> LINE_BITS) * _MULTIPLIER
    return (hashed >> (64 - _SHARD_BITS)) & (NUM_SHARDS - 1)


def number_rows(state: State, lookups: Lookups) -> Uniques:
    """Finds the unique rows and their order."""
    size, room, device = len(lookups.rows), state.capacity.max_uniques, state.ids.device
    sorted_rows, order = torch.sort(lookups.rows.to(state.unique_rows.dtype), stable=True)
    rows = sorted_rows.long()
    is_lookup = rows < state.num_rows
    is_first = torch.ones(size, dtype=torch.bool, device=device)
    torch.ne(rows[1:], rows[:-1], out=is_first[1:])
    is_first &= is_lookup
    run = torch.cumsum(is_first, 0) - 1
    number = is_first.sum()
    # The number of each row's first lookup, among all first ones by (shard, lookup).
    mark = shards_of(rows) * size + order
    marks = scattered(NUM_SHARDS * size, is_first, mark, 1)
    numbers = torch.cumsum(marks, 0, dtype=torch.int32)[mark].long() - 1
    # Runs, of which there may be more than there is room for; what is beyond goes nowhere.
    run_at = spread(is_first & (run < room), run, room + 1)
    lookup = torch.arange(size, device=device)
    starts = is_lookup.sum().expand(room + 1 + SPARE).scatter(0, run_at, lookup)
    unique_of_run = torch.zeros(room + 1 + SPARE, dtype=torch.int64, device=device)
    unique_of_run.scatter_(0, run_at, numbers.clamp(max=room))
    run = run.clamp(0, room)
    uniques = unique_of_run[run]
    places = lookup - starts[run]
    unique_at = spread(is_first & (numbers < room), numbers, room)
    unique_rows = torch.full((room + SPARE,), state.num_rows, device=device)
    unique_rows.scatter_(0, unique_at, rows)
    counts = torch.zeros(room + SPARE, dtype=torch.int64, device=device)
    counts.scatter_(0, unique_at, starts[(run + 1).clamp(max=room)] - starts[run])
    return Uniques(
        order=order,
        is_lookup=is_lookup,
        uniques=uniques,
        places=places,
        rows=unique_rows[:room],
        counts=counts[:room],
        number=number,
    )


def _note_alert(state: State, first_bad: Tensor, number: Tensor) -> Tensor:
    """Says in `alert` why the batch can't be taken in; returns whether it can: (1,) bool."""
    is_bad = first_bad < len(state.ids)
    reason = (number > state.capacity.max_uniques) * NO_ROOM
    reason = reason.masked_fill(number > state.window.num_slots, TOO_MANY_ROWS)
    reason = reason.masked_fill(is_bad, BAD_ID)
    detail = torch.where(is_bad, first_bad, number)
    alert = torch.stack((reason, state.entered[0], detail, torch.zeros_like(detail)))
    is_new = (state.alert[0] == RUNNING) & (reason != RUNNING)
    state.alert.copy_(torch.where(is_new, alert, state.alert))
    return state.alert[:1] == RUNNING


def schedule(
    state: State, lookups: Lookups, found: Uniques, position: Tensor
) -> tuple[Tensor, Tensor]:
    """Lays out inverse, bags and pieces; see `bagpipe.oracle.pieces`.

    Returns:
        How many pieces and how many long rows there are: () int64 each.
    """
    capacity, device, longest = state.capacity, state.ids.device, MAX_PIECE_LENGTH
    size = capacity.max_lookups
    first, rest = found.counts.clamp(max=longest), (found.counts - longest).clamp(min=0)
    first_ends, rest_ends = torch.cumsum(first, 0), torch.cumsum(rest, 0)
    first_begins, rest_begins = first_ends - first, first_ends[-1] + rest_ends - rest
    further = (rest + longest - 1) // longest
    further_ends = torch.cumsum(further, 0)
    is_long = rest > 0
    num_long, num_pieces = is_long.sum(), found.number + further_ends[-1]
    # by lookup, as sorted
    unique_at = found.uniques.clamp(max=capacity.max_uniques - 1)
    beyond = found.places - longest
    target = torch.where(
        beyond < 0,
        first_begins[unique_at] + found.places,
        rest_begins[unique_at] + beyond,
    )
    # Of a batch for which there is no room nothing is right, but all must stay within bounds.
    target, is_lookup = target.clamp(0, size - 1), found.is_lookup
    bags = scattered(size, is_lookup, target, lookups.outputs[found.order].int())
    _put(state.bags, position, bags)
    inverse = torch.empty(size, dtype=torch.int32, device=device)
    inverse.scatter_(0, found.order, found.uniques.int())
    _put(state.inverse, position, inverse)
    if capacity.is_weighted:
        weights = scattered(size, is_lookup, target, state.lookup_weights[found.order])
        _put(state.bag_weights, position, weights)
    # Where pieces begin: first ones by unique row, further ones by their first lookup.
    last = capacity.max_pieces
    unique = torch.arange(capacity.max_uniques, device=device)
    offsets = torch.zeros(last + 1 + SPARE, dtype=torch.int32, device=device)
    offsets.scatter_(0, spread(unique < found.number, unique, last + 1), first_begins.int())
    begins_piece = is_lookup & (beyond >= 0) & (beyond % longest == 0)
    piece = found.number + (further_ends - further)[unique_at] + beyond // longest
    offsets.scatter_(0, spread(begins_piece & (piece <= last), piece, last + 1), target.int())
    offsets.scatter_(0, num_pieces.clamp(max=last).view(1), is_lookup.sum().int().view(1))
    _put(state.piece_offsets, position, offsets[: last + 1])
    _put_long_rows(state, is_long, further_ends, position)
    return num_pieces, num_long


def _put_long_rows(state: State, is_long: Tensor, further_ends: Tensor, position: Tensor) -> None:
    room, device = state.capacity.max_further, state.ids.device
    place = torch.cumsum(is_long, 0) - 1
    is_long = is_long & (place < room)
    unique = torch.arange(len(is_long), dtype=torch.int32, device=device)
    _put(state.long_uniques, position, scattered(room, is_long, place, unique))
    ends = scattered(room + 1, is_long, place + 1, further_ends.int())
    _put(state.long_offsets, position, ends)


def _keep_bags(state: State, position: Tensor) -> None:
    """Keeps what the step needs of the bags: offsets, scales, weights."""
    if state.capacity.is_jagged:
        offsets = _whole_offsets(state)
        _put(state.kept_offsets, position, offsets.int())
        if state.bag_scales.shape[1]:
            _put(state.bag_scales, position, _scales(state, offsets))
    if state.capacity.is_weighted:
        _put(state.kept_weights, position, state.lookup_weights)


def _scales(state: State, offsets: Tensor) -> Tensor:
    """What each bag's sum is multiplied by, by output row (max_bags,)."""
    # In float64 and then rounded, as on the host.
    batch_size = state.sizes[1].clamp(min=1)
    output = torch.arange(state.bag_scales.shape[1], device=state.ids.device)
    sample = output // state.num_features
    feature = output - sample * state.num_features
    bag = (feature * batch_size + sample).clamp(max=len(output) - 1)
    length = (offsets[bag + 1] - offsets[bag]).clamp(min=1)
    return pick(state.is_mean[feature], 1.0 / length.double(), 1.0).float()


def link(state: State, unique_rows: Tensor, number: Tensor, position: Tensor) -> None:
    """Tells the last use of each unique row, or its slot, that this batch uses it next.

    Args:
        state: Is changed.
        unique_rows: (max_uniques,) int64; num_rows behind the last one.
        number: (1,) how many there are; 0 for a batch that is not taken in.
        position: (1,) the batch's in the ring.
    """
    room, num_places = len(unique_rows), len(state.next_of_places) - SPARE
    index = torch.arange(room, device=unique_rows.device)
    is_unique = index < number
    stored = pick(is_unique, unique_rows, state.num_rows)
    _put(state.unique_rows, position, stored.to(state.unique_rows.dtype))
    entries = row_index.claim(state, unique_rows, is_unique)
    previous = state.places_of_rows[entries].long()
    known = previous.clamp(min=0)
    # An old place may have been taken by a newer batch since; that is found by its row.
    is_kept = (state.unique_rows.view(-1)[known] == unique_rows) & (known // room != position)
    is_kept &= is_unique & (previous >= 0)
    is_planned = state.batches[known // room] < state.planned
    places = position * room + index
    state.next_of_places.scatter_(0, places, torch.full_like(entries, NEVER).int())
    step = state.entered.int().expand(room)
    state.next_of_places.scatter_(0, spread(is_kept, known, num_places), step)
    slots = state.slots_of_rows[entries].long()
    is_cached = is_unique & (slots >= 0) & (is_planned | ~is_kept)
    state.next_uses.scatter_(0, spread(is_cached, slots, state.window.num_slots), step)
    state.places_of_rows.scatter_(0, entries, places.int())


def _put(ring: Tensor, position: Tensor, values: Tensor) -> None:
    """Writes `values` (n,) to a position (1,) of a ring (R, n)."""
    ring.index_copy_(0, position, values.to(ring.dtype).unsqueeze(0))
