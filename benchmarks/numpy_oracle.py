"""The oracle as one would write it with numpy: the arm that the compiled one is measured against.
Its plans are valid plans.

De-duplication is `np.unique` table by table (faster here than over all tables, or than one stable
argsort that gives order and inverse at once), and the order of the backward sums is a stable
argsort of the inverse, which is a radix sort as long as it fits 16 bits. Slot assignment is fancy
indexing on flat arrays, and a victim the largest of one key for each slot, by `np.argpartition`.

It differs from `bagpipe.oracle` only where numpy would be slower still: distinct rows come in
ascending order, not shard by shard, and among equally good victims any may go, so that the rows
fetched agree in number but for a few.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bagpipe.jagged import group_lookups, group_rows
from bagpipe.oracle.dedup import DedupedGroup
from bagpipe.types import (
    MAX_PIECE_LENGTH,
    GradientSchedule,
    Group,
    GroupPlan,
    Int32Array,
    Int64Array,
    Jagged,
    Transfers,
)

_NEVER = np.iinfo(np.int64).max // 2
"""Key of a row without a known next use, less the step of its last one: the longest unused has the
largest key."""
_UNSETTLED, _NEEDED = -1, -2
_NO_SLOT = -1


def dedup(group: Group, batch: Jagged) -> DedupedGroup:
    """`bagpipe.oracle.dedup`, with numpy."""
    lookups = group_lookups(group, batch)
    rows = group_rows(group, batch, lookups)
    output_rows = _output_rows(len(group.features), batch.batch_size, lookups.bag_offsets)
    table_lookups = np.bincount(
        group.feature_tables, lookups.feature_lengths, len(group.tables)
    ).astype(np.int64)
    uniques, counts, inverses, bags = [], [], [], []
    begin = num_uniques = 0
    for length in table_lookups.tolist():
        found, inverse, count = np.unique(
            rows[begin : begin + length], return_inverse=True, return_counts=True
        )
        small = inverse.astype(np.uint16) if len(found) < 1 << 16 else inverse
        bags.append(output_rows[begin : begin + length][np.argsort(small, kind="stable")])
        inverses.append((inverse + num_uniques).astype(np.int32))
        uniques.append(found)
        counts.append(count)
        begin += length
        num_uniques += len(found)
    schedule = _cut_pieces(np.concatenate(counts), np.concatenate(bags))
    return DedupedGroup(
        unique_rows=np.concatenate(uniques),
        inverse=np.concatenate(inverses),
        bag_offsets=lookups.bag_offsets,
        bag_scales=lookups.bag_scales,
        bags=schedule[0],
        piece_offsets=schedule[1],
        long_uniques=schedule[2],
        long_offsets=schedule[3],
    )


def _output_rows(num_features: int, batch_size: int, bag_offsets: Int32Array | None) -> Int32Array:
    """The output row b * F + f of each lookup: (L,)."""
    by_bag = (
        np.arange(num_features * batch_size, dtype=np.int32)
        .reshape(batch_size, num_features)
        .T.reshape(-1)
    )
    return by_bag.copy() if bag_offsets is None else np.repeat(by_bag, np.diff(bag_offsets))


def _cut_pieces(
    counts: Int64Array, bags: Int32Array
) -> tuple[Int32Array, Int32Array, Int32Array, Int32Array]:
    """bags, piece_offsets, long_uniques and long_offsets of `GradientSchedule` from bags (L,) that
    are sorted by row.
    """
    long_uniques = np.flatnonzero(counts > MAX_PIECE_LENGTH)
    lengths = np.minimum(counts, MAX_PIECE_LENGTH)
    if len(long_uniques) == 0:
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        return bags, offsets.astype(np.int32), long_uniques.astype(np.int32), np.zeros(1, np.int32)
    starts = np.cumsum(counts) - counts
    is_further = np.zeros(len(bags), np.bool_)
    for unique in long_uniques.tolist():
        is_further[starts[unique] + MAX_PIECE_LENGTH : starts[unique] + counts[unique]] = True
    rest = counts[long_uniques] - MAX_PIECE_LENGTH
    pieces = -(-rest // MAX_PIECE_LENGTH)
    long_offsets = np.concatenate([[0], np.cumsum(pieces)])
    further = np.full(long_offsets[-1], MAX_PIECE_LENGTH)
    further[long_offsets[1:] - 1] = rest - (pieces - 1) * MAX_PIECE_LENGTH
    offsets = np.concatenate([[0], np.cumsum(np.concatenate([lengths, further]))])
    bags = np.concatenate([bags[~is_further], bags[is_further]])
    return (
        bags,
        offsets.astype(np.int32),
        long_uniques.astype(np.int32),
        long_offsets.astype(np.int32),
    )


@dataclass(frozen=True, kw_only=True)
class _Planned:
    step: int
    slots: Int32Array
    rows: Int64Array
    occurrences: Int64Array


class NumpyCacher:
    """`bagpipe.oracle.Cacher`, with numpy. Admit batches in order, then plan them in the same
    order.
    """

    def __init__(self, group: Group, *, num_slots: int, prefetch_depth: int) -> None:
        self.num_slots, self.prefetch_depth = num_slots, prefetch_depth
        self._slots_of_rows = np.full(group.num_rows, _NO_SLOT, np.int32)
        self._evicted_at = np.full(group.num_rows, -1, np.int32)
        self._last_uses = np.full(group.num_rows, -1, np.int64)
        self._rows_of_slots = np.full(num_slots, -1, np.int64)
        # next use, or _NEVER - last use; negative: must stay
        self._keys = np.full(num_slots, _NEEDED, np.int64)
        self._next_uses = np.empty(1 << 16, np.int64)  # ring, by occurrence
        self._num_used = self._next_step = self._next_admitted = self._next_occurrence = (
            self._oldest_occurrence
        ) = 0
        self._admitted: deque[tuple[DedupedGroup, Int64Array]] = deque()
        self._unsettled: deque[_Planned] = deque()

    @property
    def num_used_slots(self) -> int:
        """Slots ever filled."""
        return self._num_used

    def admit(self, batch: DedupedGroup) -> None:
        """Lets the window see one more batch."""
        rows, step = batch.unique_rows, self._next_admitted
        occurrences = np.arange(self._next_occurrence, self._next_occurrence + len(rows))
        self._reserve(self._next_occurrence + len(rows) - self._oldest_occurrence)
        last_uses = self._last_uses[rows]
        in_window = last_uses >= 0
        mask = len(self._next_uses) - 1
        self._next_uses[last_uses[in_window] & mask] = step
        self._next_uses[occurrences & mask] = _NEVER
        slots = self._slots_of_rows[rows[~in_window]]
        self._keys[slots[slots >= 0]] = step
        self._last_uses[rows] = occurrences
        self._admitted.append((batch, occurrences))
        self._next_occurrence += len(rows)
        self._next_admitted += 1

    def plan(self) -> GroupPlan:
        """Plans the oldest admitted batch that is not planned yet."""
        batch, occurrences = self._admitted.popleft()
        rows, step = batch.unique_rows, self._next_step
        self._next_step += 1
        while self._unsettled and self._unsettled[0].step < step - self.prefetch_depth:
            self._settle(self._unsettled.popleft(), step)
        slots = self._slots_of_rows[rows]
        self._keys[slots[slots >= 0]] = _NEEDED
        missing = np.flatnonzero(slots < 0)
        freed, num_fresh, num_settled = self._free_slots(len(missing))
        early, late = self._transfers(rows[missing], freed, num_fresh, num_settled, step)
        slots[missing] = freed
        self._slots_of_rows[rows[missing]] = freed
        self._rows_of_slots[freed] = rows[missing]
        self._keys[slots] = _UNSETTLED
        self._unsettled.append(_Planned(step=step, slots=slots, rows=rows, occurrences=occurrences))
        return GroupPlan(
            inverse=batch.inverse,
            bag_offsets=batch.bag_offsets,
            bag_scales=batch.bag_scales,
            schedule=GradientSchedule(
                unique_slots=slots,
                bags=batch.bags,
                piece_offsets=batch.piece_offsets,
                long_uniques=batch.long_uniques,
                long_offsets=batch.long_offsets,
            ),
            early=early,
            late=late,
        )

    def _reserve(self, num_kept: int) -> None:
        if num_kept <= len(self._next_uses):
            return
        kept = np.arange(self._oldest_occurrence, self._next_occurrence)
        grown = np.empty(2 * len(self._next_uses), np.int64)
        grown[kept & (len(grown) - 1)] = self._next_uses[kept & (len(self._next_uses) - 1)]
        self._next_uses = grown
        self._reserve(num_kept)

    def _settle(self, planned: _Planned, step: int) -> None:
        """Gives the slots of a batch their keys, but for rows that were used again since or have
        left.
        """
        next_uses = self._next_uses[planned.occurrences & (len(self._next_uses) - 1)]
        is_last = next_uses == _NEVER
        self._last_uses[planned.rows[is_last]] = -1
        settled = (next_uses >= step) & (self._rows_of_slots[planned.slots] == planned.rows)
        keys = np.where(is_last, _NEVER - planned.step, next_uses)
        self._keys[planned.slots[settled]] = keys[settled]
        self._oldest_occurrence = (
            int(planned.occurrences[-1]) + 1
            if len(planned.occurrences)
            else self._oldest_occurrence
        )

    def _free_slots(self, num_missing: int) -> tuple[Int32Array, int, int]:
        """Slots for the missing rows, never used ones first; how many were never used, and how many
        are free early.
        """
        num_fresh = min(num_missing, self.num_slots - self._num_used)
        fresh = np.arange(self._num_used, self._num_used + num_fresh, dtype=np.int32)
        self._num_used += num_fresh
        num_victims = num_missing - num_fresh
        if num_victims == 0:
            return fresh, num_fresh, num_fresh
        victims = np.argpartition(self._keys, self.num_slots - num_victims)[-num_victims:].astype(
            np.int32
        )
        is_settled = self._keys[victims] >= 0
        freed = np.concatenate([fresh, victims[is_settled], victims[~is_settled]])
        return freed, num_fresh, num_fresh + int(np.count_nonzero(is_settled))

    def _transfers(
        self, fetch_rows: Int64Array, freed: Int32Array, num_fresh: int, num_settled: int, step: int
    ) -> tuple[Transfers, Transfers]:
        early_tick = max(0, step - self.prefetch_depth)
        victims = self._rows_of_slots[freed[num_fresh:]]
        evicted_at = self._evicted_at[fetch_rows]
        is_early = (np.arange(len(freed)) < num_settled) & (evicted_at <= early_tick)
        num_early = num_settled - num_fresh
        self._slots_of_rows[victims] = _NO_SLOT
        self._evicted_at[victims[:num_early]] = early_tick
        self._evicted_at[victims[num_early:]] = step
        early, late = (
            Transfers(
                evict_rows=victims[part],
                evict_slots=freed[num_fresh:][part],
                fetch_rows=fetch_rows[chosen],
                fetch_slots=freed[chosen],
                fence_tick=_latest(evicted_at[chosen]),
            )
            for part, chosen in (
                (slice(None, num_early), is_early),
                (slice(num_early, None), ~is_early),
            )
        )
        return early, late


def _latest(ticks: npt.NDArray[np.int32]) -> int:
    return int(ticks.max()) if len(ticks) else -1
