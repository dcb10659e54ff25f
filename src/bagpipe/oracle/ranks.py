"""From one step of the joint cache to the plan of each trainer: own slots, replicas, and what travels when. Stateless.

Logically replicated, physically partitioned (LRPP; Agarwal et al., BagPipe, SOSP 2023, section 3.4): each cached row has one owner,
and a rank that uses another's row gets a replica for that step and sends back its gradient, which the owner adds to the others'
in the order of ranks. Only what the step before has changed, or the step after needs, is exchanged on the critical path.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bagpipe._jit import jit
from bagpipe.errors import ConfigError
from bagpipe.oracle.cacher import CachePlan
from bagpipe.oracle.merge import MergedGroup
from bagpipe.types import (
    BoolArray,
    GradientSchedule,
    Group,
    GroupExchange,
    GroupPlan,
    Int32Array,
    Int64Array,
    RowExchange,
    Transfers,
)


@dataclass(frozen=True, kw_only=True)
class TrainerCache:
    """The cache of one group on each of several trainers."""

    num_slots: int
    num_replica_slots: int
    """Replicas that one step may need; there are twice as many slots, for those of the next step arrive while one is computed."""


@dataclass(frozen=True, kw_only=True)
class _Travellers:
    """The rows of one share that others own: their indices in the share, by when they travel and then by owner."""

    indices: Int32Array  # (n,)
    counts: Int64Array  # (2, num_trainers) later, now

    def of(self, now: bool, owner: int) -> Int32Array:
        """Those of one moment and one owner."""
        ends = np.cumsum(self.counts.ravel())
        number = int(now) * self.counts.shape[1] + owner
        return self.indices[ends[number] - self.counts.ravel()[number] : ends[number]]

    def at(self, now: bool) -> Int32Array:
        """Those of one moment."""
        num_later = self.counts[0].sum()
        return self.indices[num_later:] if now else self.indices[:num_later]


class RankPlanner:
    """Plans one step of one group for any of its trainers."""

    def __init__(self, group: Group, planned: CachePlan, cache: TrainerCache, *, step: int, overlap: bool = True) -> None:
        """Without `overlap` all that travels does so now.

        Raises ConfigError when a rank needs more replicas than it has slots for.
        """
        assert isinstance(planned.batch, MergedGroup)
        self._planned, self._cache, self._step, self._merged = planned, cache, step, planned.batch
        self._num_trainers = num_trainers = len(self._merged.shares)
        self._owners, self._slots = planned.unique_slots % num_trainers, planned.unique_slots // num_trainers
        comes_now = planned.was_used_before | _are_among(planned.late.fetch_slots, planned.unique_slots) | (not overlap)
        goes_now = planned.is_used_next | (not overlap)
        self._replicas = self._travellers(comes_now)
        self._grads = self._travellers(goes_now)
        # A row that its owner alone uses waits for nobody.
        self._is_applied_now = goes_now | (self._merged.users == np.uint64(1) << self._owners.astype(np.uint64))
        for rank, replicas in enumerate(self._replicas):  # of all, so that every rank refuses the step
            if len(replicas.indices) > cache.num_replica_slots:
                raise ConfigError(
                    f"step {step}: rank {rank} needs {len(replicas.indices):,} rows of {group.name} that other ranks own, but has "
                    f"room for {cache.num_replica_slots:,} replicas: allow more replicas or train with smaller batches"
                )

    def plan(self, rank: int) -> GroupPlan:
        """One rank's plan."""
        share, places, replicas = self._merged.shares[rank], self._merged.places[rank], self._replicas[rank].indices
        first_replica = self._cache.num_slots + self._step % 2 * self._cache.num_replica_slots
        unique_slots = self._slots[places]
        unique_slots[replicas] = np.arange(first_replica, first_replica + len(replicas), dtype=np.int32)
        return GroupPlan(
            inverse=share.inverse,
            bag_offsets=share.bag_offsets,
            bag_scales=share.bag_scales,
            lookup_weights=share.lookup_weights,
            schedule=share.schedule(unique_slots),
            early=_transfers_of(self._planned.early, rank, self._num_trainers),
            late=_transfers_of(self._planned.late, rank, self._num_trainers),
            exchange=GroupExchange(
                first_replica=first_replica,
                replicas_later=self._replica_exchange(rank, now=False),
                replicas_now=self._replica_exchange(rank, now=True),
                sync_now=self._grad_exchange(rank, now=True),
                sync_later=self._grad_exchange(rank, now=False),
                apply_now=self._apply(rank, now=True),
                apply_later=self._apply(rank, now=False),
            ),
        )

    def _travellers(self, goes_now: BoolArray) -> list[_Travellers]:
        """By rank which of its rows others own, and when they travel."""
        found = []
        for rank, places in enumerate(self._merged.places):
            indices, counts = _sort_by_owner(self._owners[places], goes_now[places], rank, self._num_trainers)
            found.append(_Travellers(indices=indices, counts=counts.reshape(2, self._num_trainers)))
        return found

    def _replica_exchange(self, rank: int, *, now: bool) -> RowExchange:
        sent = [
            self._slots[places[theirs.of(now, rank)]] for places, theirs in zip(self._merged.places, self._replicas, strict=True)
        ]
        return RowExchange(
            send=np.concatenate(sent),
            send_counts=np.array([len(slots) for slots in sent], np.int64),
            receive_counts=self._replicas[rank].counts[int(now)],
        )

    def _grad_exchange(self, rank: int, *, now: bool) -> RowExchange:
        return RowExchange(
            send=self._grads[rank].at(now),
            send_counts=self._grads[rank].counts[int(now)],
            receive_counts=np.array([theirs.counts[int(now), rank] for theirs in self._grads], np.int64),
        )

    def _apply(self, rank: int, *, now: bool) -> GradientSchedule:
        """What the rank applies to its own rows, its own contributions among those that it receives, in the order of ranks."""
        own = self._merged.places[rank]
        received = len(own)
        rows, contributions = [], []
        for other, (places, grads) in enumerate(zip(self._merged.places, self._grads, strict=True)):
            if other == rank:
                indices = np.flatnonzero((self._owners[own] == rank) & (self._is_applied_now[own] == now)).astype(np.int32)
                contributions.append(indices)
            else:
                indices = grads.of(now, rank)
                contributions.append(np.arange(received, received + len(indices), dtype=np.int32))
                received += len(indices)
            rows.append(places[indices])
        found, offsets, bags = _group_by_row(np.concatenate(rows), np.concatenate(contributions), len(self._slots))
        return GradientSchedule(
            unique_slots=self._slots[found],
            bags=bags,
            piece_offsets=offsets,
            long_uniques=np.empty(0, np.int32),
            long_offsets=np.zeros(1, np.int32),
        )


def _transfers_of(transfers: Transfers, rank: int, num_trainers: int) -> Transfers:
    """Those of one rank, in its own slots. The fence is that of all ranks: a row may come back to another one."""
    evicts, fetches = transfers.evict_slots % num_trainers == rank, transfers.fetch_slots % num_trainers == rank
    return Transfers(
        evict_rows=transfers.evict_rows[evicts],
        evict_slots=transfers.evict_slots[evicts] // num_trainers,
        fetch_rows=transfers.fetch_rows[fetches],
        fetch_slots=transfers.fetch_slots[fetches] // num_trainers,
        fence_tick=transfers.fence_tick,
    )


def _are_among(few: Int32Array, slots: Int32Array) -> BoolArray:
    """For each of `slots` whether it is one of the `few`, mostly none."""
    return np.isin(slots, few) if len(few) else np.zeros(len(slots), np.bool_)


@jit
def _sort_by_owner(owners: Int32Array, goes_now: BoolArray, rank: int, num_trainers: int) -> tuple[Int32Array, Int64Array]:
    """Indices of the rows that others own, by (now, owner) and then in order, and how many there are of each."""
    counts = np.zeros(2 * num_trainers, np.int64)
    for index in range(len(owners)):
        counts[goes_now[index] * num_trainers + owners[index]] += owners[index] != rank
    nexts, indices = np.cumsum(counts) - counts, np.empty(counts.sum(), np.int32)
    for index in range(len(owners)):
        if owners[index] != rank:
            bucket = goes_now[index] * num_trainers + owners[index]
            indices[nexts[bucket]] = index
            nexts[bucket] += 1
    return indices, counts


@jit
def _group_by_row(rows: Int32Array, contributions: Int32Array, num_rows: int) -> tuple[Int32Array, Int32Array, Int32Array]:
    counts = np.zeros(num_rows + 1, np.int32)
    for row in rows:
        counts[row + 1] += 1
    num_found = (counts > 0).sum()
    found, offsets = np.empty(num_found, np.int32), np.zeros(num_found + 1, np.int32)
    place = 0
    for row in range(num_rows):
        if counts[row + 1] > 0:
            found[place] = row
            offsets[place + 1] = offsets[place] + counts[row + 1]
            place += 1
        counts[row + 1] += counts[row]
    bags = np.empty(len(rows), np.int32)
    for index in range(len(rows)):
        row = rows[index]
        bags[counts[row]] = contributions[index]
        counts[row] += 1
    return found, offsets, bags
