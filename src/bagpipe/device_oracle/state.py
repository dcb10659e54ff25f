"""What the oracle on the device knows, as tensors at fixed addresses.

Batches lie in a ring: batch e at position e % `Window.ring_length`. A *place* is a position times
`max_uniques` plus the index of a unique row. Plans lie in a ring of their own, of
`Window.num_plans`. Where a masked write must go nowhere, it goes to one of the spare elements that
arrays of entries, slots and places have.

Memory: 12 bytes a slot, and per batch of the ring 8 a lookup, 12 a unique row, 8 more a lookup with
per-sample weights, 4 a bag where bags are jagged, 4 more with mean pooling. Per plan 4 a lookup and
28 a unique row. Where there are 2**31 rows or more, 4 more a slot and a unique row of the ring.
The index of rows takes 8 bytes a row of the tables, or as a map 24 a row that there is room for:
as many as there are slots and places, and those of the batches until it is rebuilt. Rebuilding
takes 16 bytes a slot and a place. So a map takes 40 bytes a slot and 52 a place.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from bagpipe.errors import ConfigError
from bagpipe.plan import MAX_PIECE_LENGTH
from bagpipe.types import Group

SPARE = 1024
"""Elements behind those of entries, slots and places: where masked writes go. One element would do,
but writes of thousands of threads to one address take turns."""
NEVER = 2**30
"""A next use that nobody knows."""
NO_KEY = 2**63 - 1
"""The key of an entry that no row has."""
_MAX_PLACES = 2**31 - 1 - SPARE
PLANS_BEYOND = 6
"""Plans that are kept besides those of the prefetch depth: of steps that the device computes, and
of those that wait for the trainer."""

(
    STEP,
    NUM_LOOKUPS,
    BATCH_SIZE,
    NUM_UNIQUES,
    NUM_PIECES,
    NUM_LONG,
    EVICTED_OVERLAPPED,
    EVICTED,
    FETCHED_OVERLAPPED,
    FETCHED,
    OVERLAPPED_FENCE,
    URGENT_FENCE,
    EVICTED_BLINDLY,
    NUM_USED_SLOTS,
) = range(14)
"""What the header of a plan holds; that of a batch has those up to NUM_LONG."""
HEADER_LENGTH = 16
BATCH_HEADER_LENGTH = NUM_LONG + 1
ALERT_LENGTH = 4
SIZES_WORDS = 4
"""Words of 4 bytes in front of a batch's ids: two int64."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """The cache and how far the oracle sees."""

    num_slots: int
    lookahead: int
    prefetch_depth: int
    first_step: int = 0
    knows_all_rows: bool = True
    """Whether something is kept of each row of the tables, else only of those that are near:
    `row_index`."""

    @property
    def num_plans(self) -> int:
        """Plans that stay readable, the last one included."""
        return self.prefetch_depth + PLANS_BEYOND

    @property
    def ring_length(self) -> int:
        """Batches that are kept: those in the window, and those whose plans are."""
        return self.lookahead + 1 + self.num_plans

    @property
    def batches_between(self) -> int:
        """Batches that enter between two times that rows are forgotten."""
        return max(1, self.ring_length // 2)

    def max_near(self, max_uniques: int) -> int:
        """The most rows that are not forgotten, where batches have up to `max_uniques`.

        A batch of the ring is in the window, or its plan is among those that stay readable. The
        latter counts for the rows that it evicted, no more than it has.
        """
        return self.num_slots + self.ring_length * max_uniques

    def max_entries(self, max_uniques: int) -> int:
        """How many entries a map has: half as many again as it may have rows."""
        return 3 * (self.max_near(max_uniques) + self.batches_between * max_uniques) // 2


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """The largest batch that there is room for. Graphs are captured for it."""

    max_lookups: int
    max_bags: int
    max_uniques: int
    is_jagged: bool
    is_weighted: bool
    is_wide: bool
    """Whether ids have 64 bits, else 32."""

    @property
    def max_further(self) -> int:
        """The most pieces of a batch that are not the first ones of their rows."""
        return self.max_lookups // MAX_PIECE_LENGTH

    @property
    def max_pieces(self) -> int:
        """The most pieces of a batch."""
        return self.max_uniques + self.max_further


@dataclass(frozen=True, kw_only=True)
class State:
    """All tensors of one group. R positions in the ring, K plans."""

    window: Window
    capacity: Capacity
    num_rows: int
    num_features: int
    # of the group
    first_rows: Tensor  # (F,) int64, the first row of each feature's table
    table_sizes: Tensor  # (F,) int64
    is_mean: Tensor  # (F,) bool
    # what the host writes before a batch enters
    given: Tensor  # int32 words: sizes, and ids behind them
    sizes: Tensor  # (2,) int64, of `given`: the numbers of lookups and of samples
    ids: Tensor  # (max_lookups,) int32, or int64 where wide, feature-major; of `given`
    bag_offsets: Tensor  # (max_bags + 1,) int32; one element where bags hold one id each
    lookup_weights: Tensor  # (max_lookups,) float32; empty without weights
    # the clock
    alert: Tensor  # (4,) int64, see `alerts`; the first one is 0 while all is well
    entered: Tensor  # (1,) int64, the next batch to enter
    planned: Tensor  # (1,) int64, the next step to plan
    settled: Tensor  # (1,) int64, uses before this step are settled
    num_used_slots: Tensor  # (1,) int64
    # the index of rows, by entry
    keys: Tensor | None  # (num_entries + SPARE,) int64 rows, or NO_KEY; None if all have an entry
    slots_of_rows: Tensor  # (num_entries + SPARE,) int32: a slot, -1 for never, -2 - tick evicted
    places_of_rows: Tensor  # (num_entries + SPARE,) int32, of the last use; -1 for none or unknown
    forgotten: Tensor  # (1,) int32, the latest tick at which a row that has no entry was evicted
    # slots
    rows_of_slots: Tensor  # (num_slots + SPARE,) rows; num_rows in an empty slot
    next_uses: Tensor  # (num_slots + SPARE,) int32, a step or NEVER
    last_uses: Tensor  # (num_slots + SPARE,) int32
    # the ring of batches
    batches: Tensor  # (R,) int64, the number of the batch, -1 for none
    headers: Tensor  # (R, BATCH_HEADER_LENGTH) int64
    unique_rows: Tensor  # (R, max_uniques) rows; num_rows behind the last one
    next_of_places: Tensor  # (R * max_uniques + SPARE,) int32, a step or NEVER
    inverse: Tensor  # (R, max_lookups) int32
    bags: Tensor  # (R, max_lookups) int32
    piece_offsets: Tensor  # (R, max_pieces + 1) int32
    long_uniques: Tensor  # (R, max_further) int32
    long_offsets: Tensor  # (R, max_further + 1) int32
    kept_offsets: Tensor  # (R, max_bags + 1) int32; (R, 1) where bags hold one id each
    bag_scales: Tensor  # (R, max_bags) float32; (R, 0) without mean pooling
    kept_weights: Tensor  # (R, max_lookups) float32; (R, 0) without weights
    bag_weights: Tensor  # (R, max_lookups) float32; (R, 0) without weights
    # the ring of plans
    plan_headers: Tensor  # (K, HEADER_LENGTH) int64
    unique_slots: Tensor  # (K, max_uniques) int32
    lookup_slots: Tensor  # (K, max_lookups) int32
    evict_rows: Tensor  # (K, max_uniques) int64, the overlapped ones first; and so on
    evict_slots: Tensor  # (K, max_uniques) int32
    fetch_rows: Tensor  # (K, max_uniques) int64
    fetch_slots: Tensor  # (K, max_uniques) int32

    @property
    def num_entries(self) -> int:
        """How many entries the index of rows has."""
        return len(self.slots_of_rows) - SPARE

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors; what a running graph uses besides is not included."""
        tensors = self.tensors()
        return sum(tensors[name].nbytes for name in tensors.keys() - {"ids", "sizes"})

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}


_OF_GROUP_AND_CACHE = (
    "first_rows table_sizes is_mean alert entered planned settled num_used_slots forgotten "
    "rows_of_slots next_uses last_uses batches headers plan_headers"
).split()
"""What stays as it is when capacities grow."""
_OF_ROWS = ("keys", "slots_of_rows", "places_of_rows")
_OF_BATCHES = (
    "inverse bags piece_offsets long_uniques long_offsets kept_offsets bag_scales kept_weights "
    "bag_weights unique_slots lookup_slots evict_rows evict_slots fetch_rows fetch_slots"
).split()


def row_type(group: Group) -> torch.dtype:
    """The type of rows on the device."""
    return torch.int32 if group.num_rows < 2**31 - SPARE else torch.int64


def make_state(
    group: Group, window: Window, capacity: Capacity, device: torch.device, old: State | None = None
) -> State:
    """Makes an empty state, or one that goes on from `old`, whose rings keep what they hold.

    Args:
        group: The tables.
        window: The cache and the lookahead.
        capacity: The largest batch; no less than that of `old`.
        device: Where the tensors are.
        old: What to go on from. It must not be used any more, but for `row_index.rebuild`, which
            must take over what is known of rows.

    Raises:
        ConfigError: So many batches of so many rows have more places than there are numbers, or
            more entries, with so many slots.
    """
    num_places = window.ring_length * capacity.max_uniques
    if num_places > _MAX_PLACES:
        raise ConfigError(
            f"{group.name}: a lookahead of {window.lookahead:,} batches, of up to "
            f"{capacity.max_uniques:,} unique rows each, takes {num_places:,} places, and the "
            f"oracle on the device has {_MAX_PLACES:,}: take a shorter lookahead"
        )
    num_entries = 0 if window.knows_all_rows else window.max_entries(capacity.max_uniques)
    if num_entries > _MAX_PLACES:
        raise ConfigError(
            f"{group.name}: a cache of {window.num_slots:,} slots and a lookahead of "
            f"{window.lookahead:,} batches, of up to {capacity.max_uniques:,} unique rows each, "
            f"take {num_entries:,} entries in the index of rows of the oracle on the device, which "
            f"has {_MAX_PLACES:,}: take a smaller cache or a shorter lookahead"
        )
    made = _Maker(group, window, capacity, device)
    tensors = made.fixed() if old is None else {n: getattr(old, n) for n in _OF_GROUP_AND_CACHE}
    tensors |= made.of_capacity()
    if old is not None and window.knows_all_rows:
        tensors |= {name: getattr(old, name) for name in _OF_ROWS}
    else:
        tensors |= made.of_rows()
    state = State(
        window=window,
        capacity=capacity,
        num_rows=group.num_rows,
        num_features=len(group.features),
        **tensors,
    )
    if old is not None:
        _take_over(old, state)
    return state


class _Maker:
    """Makes the tensors of a state."""

    def __init__(
        self, group: Group, window: Window, capacity: Capacity, device: torch.device
    ) -> None:
        self._group, self._window, self._capacity = group, window, capacity
        self._device, self._row = device, row_type(group)

    def fixed(self) -> dict[str, Tensor]:
        """What does not depend on the capacity."""
        group, window = self._group, self._window
        tables = group.feature_tables
        first = window.first_step
        return {
            "first_rows": self._of([int(group.row_offsets[table]) for table in tables]),
            "table_sizes": self._of([group.tables[table].num_embeddings for table in tables]),
            "is_mean": self._of([group.tables[table].pooling == "mean" for table in tables]),
            "alert": self._of([0] * ALERT_LENGTH),
            "entered": self._of([first]),
            "planned": self._of([first]),
            "settled": self._of([first - window.prefetch_depth]),
            "num_used_slots": self._of([0]),
            "forgotten": self._full(1, -1),
            "rows_of_slots": self._full(window.num_slots + SPARE, group.num_rows, self._row),
            "next_uses": self._full(window.num_slots + SPARE, NEVER),
            "last_uses": self._full(window.num_slots + SPARE, -1),
            "batches": self._full(window.ring_length, -1, torch.int64),
            "headers": self._full((window.ring_length, BATCH_HEADER_LENGTH), 0, torch.int64),
            "plan_headers": self._full((window.num_plans, HEADER_LENGTH), -1, torch.int64),
        }

    def of_rows(self) -> dict[str, Tensor | None]:
        """The index of rows."""
        window, size = self._window, self._group.num_rows
        if not window.knows_all_rows:
            size = window.max_entries(self._capacity.max_uniques)
        return {
            "keys": None
            if window.knows_all_rows
            else self._full(size + SPARE, NO_KEY, torch.int64),
            "slots_of_rows": self._full(size + SPARE, -1),
            "places_of_rows": self._full(size + SPARE, -1),
        }

    def of_capacity(self) -> dict[str, Tensor]:
        """What holds batches and plans."""
        capacity, ring, plans = self._capacity, self._window.ring_length, self._window.num_plans
        lookups, uniques, bags = capacity.max_lookups, capacity.max_uniques, capacity.max_bags
        num_weights = lookups if capacity.is_weighted else 0
        num_offsets = bags + 1 if capacity.is_jagged else 1
        has_scales = any(table.pooling == "mean" for table in self._group.tables)
        num_scales = bags if capacity.is_jagged and has_scales else 0
        real = torch.float32
        given = self._full(SIZES_WORDS + lookups * (1 + capacity.is_wide), 0)
        ids = given[SIZES_WORDS:]
        return {
            "given": given,
            "sizes": given[:SIZES_WORDS].view(torch.int64),
            "ids": ids.view(torch.int64) if capacity.is_wide else ids,
            "bag_offsets": self._full(num_offsets, 0),
            "lookup_weights": self._full(num_weights, 0, real),
            "unique_rows": self._full((ring, uniques), self._group.num_rows, self._row),
            "next_of_places": self._full(ring * uniques + SPARE, NEVER),
            "inverse": self._full((ring, lookups), 0),
            "bags": self._full((ring, lookups), 0),
            "piece_offsets": self._full((ring, capacity.max_pieces + 1), 0),
            "long_uniques": self._full((ring, capacity.max_further), 0),
            "long_offsets": self._full((ring, capacity.max_further + 1), 0),
            "kept_offsets": self._full((ring, num_offsets), 0),
            "bag_scales": self._full((ring, num_scales), 0, real),
            "kept_weights": self._full((ring, num_weights), 0, real),
            "bag_weights": self._full((ring, num_weights), 0, real),
            "unique_slots": self._full((plans, uniques), 0),
            "lookup_slots": self._full((plans, lookups), 0),
            "evict_rows": self._full((plans, uniques), 0, torch.int64),
            "evict_slots": self._full((plans, uniques), 0),
            "fetch_rows": self._full((plans, uniques), 0, torch.int64),
            "fetch_slots": self._full((plans, uniques), 0),
        }

    def _of(self, values: list[int] | list[bool]) -> Tensor:
        return torch.tensor(values, device=self._device)

    def _full(
        self, shape: int | tuple[int, ...], value: int, dtype: torch.dtype = torch.int32
    ) -> Tensor:
        return torch.full(
            (shape,) if isinstance(shape, int) else shape, value, dtype=dtype, device=self._device
        )


def _take_over(old: State, new: State) -> None:
    """Copies the rings of `old`."""
    for name in _OF_BATCHES:
        source, target = getattr(old, name), getattr(new, name)
        target[:, : source.shape[1]] = source
    ring, room = old.unique_rows.shape
    uniques = new.capacity.max_uniques
    new.unique_rows[:, :room] = old.unique_rows
    before = old.next_of_places[: ring * room].view(ring, room)
    new.next_of_places[: ring * uniques].view(ring, uniques)[:, :room] = before
