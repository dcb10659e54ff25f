"""From one step of the joint cache to each trainer's plan: own slots, replicas, what travels when.

It is stateless. A single trainer has the whole cache and exchanges nothing.

Logically replicated, physically partitioned (LRPP; Agarwal et al., BagPipe, SOSP 2023, section
3.4): each cached row has one owner, and a rank that uses another's row gets a replica for that step
and sends back its gradient, which the owner adds to the others' in the order of ranks. Only what
the step before has changed, or the step after needs, is exchanged on the critical path.
"""

from __future__ import annotations

import numpy as np

from bagpipe.errors import ConfigError
from bagpipe.oracle.cache_plan import CachePlan
from bagpipe.oracle.rank_loops import Exchanges, plan_exchanges, sort_by_rank
from bagpipe.plan import GradientSchedule, GroupExchange, GroupPlan, RowExchange, Transfers
from bagpipe.types import Group, Int64Array

OVERLAPPED, URGENT = 0, 1


class RankPlanner:
    """Plans one step of one group for any of its trainers."""

    def __init__(
        self,
        group: Group,
        planned: CachePlan,
        *,
        step: int,
        num_slots: int,
        num_replicas: int,
        overlap: bool = True,
    ) -> None:
        """Plans the step for all ranks together.

        Args:
            group: The group to plan for.
            planned: The step of the joint cache.
            step: The step's number.
            num_slots: Each trainer's own slots.
            num_replicas: Replicas that one step may need on a trainer. There are twice as many
                slots for them: those of the next step arrive while one is computed.
            overlap: Without it all that travels does so on the critical path.

        Raises:
            ConfigError: A rank needs more replicas than it has slots for.
        """
        self._merged = merged = planned.batch
        # A single trainer has the whole cache: nothing to cut, and nothing to exchange.
        self._is_alone = len(merged.shares) == 1
        if self._is_alone:
            self._unique_slots = [planned.unique_slots]
            self._overlapped, self._urgent = [planned.overlapped], [planned.urgent]
            return
        self._first_replica = num_slots + step % 2 * num_replicas
        ends = np.cumsum([len(places) for places in merged.places])
        comes_urgent, goes_urgent = planned.was_used_before, planned.is_used_next
        # A row that its owner fetches urgently can't be sent ahead either.
        if len(planned.urgent.fetch_slots):
            comes_urgent = comes_urgent | np.isin(planned.unique_slots, planned.urgent.fetch_slots)
        if not overlap:
            comes_urgent = goes_urgent = np.ones(len(goes_urgent), np.bool_)
        self._all = Exchanges(
            *plan_exchanges(
                planned.unique_slots,
                merged.users,
                comes_urgent,
                goes_urgent,
                np.concatenate(merged.places),
                ends,
                self._first_replica,
            )
        )
        self._unique_slots = np.split(self._all.unique_slots, ends[:-1])
        # of all, so that every rank refuses the step
        for rank, counts in enumerate(self._all.replica_counts):
            if counts.sum() > num_replicas:
                raise ConfigError(
                    f"step {step}: rank {rank} needs {counts.sum():,} rows of {group.name} that "
                    "other ranks own, but has "
                    f"room for {num_replicas:,} replicas: allow more replicas or train "
                    "with smaller batches"
                )
        num_trainers = len(merged.shares)
        self._overlapped, self._urgent = (
            _split(transfers, num_trainers) for transfers in (planned.overlapped, planned.urgent)
        )

    def plan(self, rank: int) -> GroupPlan:
        """One rank's plan."""
        share = self._merged.shares[rank]
        return GroupPlan(
            inverse=share.inverse,
            bag_offsets=share.bag_offsets,
            bag_scales=share.bag_scales,
            lookup_weights=share.lookup_weights,
            schedule=share.schedule(self._unique_slots[rank]),
            overlapped=self._overlapped[rank],
            urgent=self._urgent[rank],
            exchange=None if self._is_alone else self._exchange(rank),
        )

    def _exchange(self, rank: int) -> GroupExchange:
        return GroupExchange(
            first_replica=self._first_replica,
            replicas_overlapped=self._replica_exchange(rank, OVERLAPPED),
            replicas_urgent=self._replica_exchange(rank, URGENT),
            sync_urgent=self._grad_exchange(rank, URGENT),
            sync_overlapped=self._grad_exchange(rank, OVERLAPPED),
            apply_urgent=self._apply(rank, URGENT),
            apply_overlapped=self._apply(rank, OVERLAPPED),
        )

    def _replica_exchange(self, rank: int, moment: int) -> RowExchange:
        counts = self._all.replica_counts
        # Columns are copied, since only what is contiguous is sent to trainers as it lies.
        return RowExchange(
            send=self._all.replicas[_span(counts.sum(0).T, rank, moment)],
            send_counts=counts[:, moment, rank].copy(),
            receive_counts=counts[rank, moment],
        )

    def _grad_exchange(self, rank: int, moment: int) -> RowExchange:
        counts = self._all.grad_counts
        return RowExchange(
            send=self._all.grads[_span(counts.sum(2), rank, moment)],
            send_counts=counts[rank, moment],
            receive_counts=counts[:, moment, rank].copy(),
        )

    def _apply(self, rank: int, moment: int) -> GradientSchedule:
        """What the rank applies to its own rows, contributions in the order of ranks."""
        rows = _span(self._all.row_counts, rank, moment)
        number = 2 * rank + moment
        return GradientSchedule(
            unique_slots=self._all.rows[rows],
            bags=self._all.contributions[_span(self._all.contribution_counts, rank, moment)],
            piece_offsets=self._all.offsets[rows.start + number : rows.stop + number + 1],
            # A row has a sum from each rank at most, fewer than a piece holds.
            long_uniques=np.empty(0, np.int32),
            long_offsets=np.zeros(1, np.int32),
        )


def _span(counts: Int64Array, rank: int, moment: int) -> slice:
    """Where those of a rank and a moment lie among so many (N, 2), one after the other."""
    before = int(counts[:rank].sum() + counts[rank, :moment].sum())
    return slice(before, before + int(counts[rank, moment]))


def _split(transfers: Transfers, num_trainers: int) -> list[Transfers]:
    """By rank those in its own slots."""
    # The fence is that of all ranks: a row may come back to another one.
    evict_counts, evict_rows, evict_slots = sort_by_rank(
        transfers.evict_rows, transfers.evict_slots, num_trainers
    )
    fetch_counts, fetch_rows, fetch_slots = sort_by_rank(
        transfers.fetch_rows, transfers.fetch_slots, num_trainers
    )
    evict_ends, fetch_ends = np.cumsum(evict_counts), np.cumsum(fetch_counts)
    parts = []
    for rank in range(num_trainers):
        evicts = slice(evict_ends[rank] - evict_counts[rank], evict_ends[rank])
        fetches = slice(fetch_ends[rank] - fetch_counts[rank], fetch_ends[rank])
        parts.append(
            Transfers(
                evict_rows=evict_rows[evicts],
                evict_slots=evict_slots[evicts],
                fetch_rows=fetch_rows[fetches],
                fetch_slots=fetch_slots[fetches],
                fence_tick=transfers.fence_tick,
            )
        )
    return parts
