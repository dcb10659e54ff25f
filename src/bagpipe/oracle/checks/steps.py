"""A step of one group as the replay sees it: what all ranks do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bagpipe.oracle.dedup import DedupedGroup
from bagpipe.oracle.merge import MergedGroup
from bagpipe.plan import (
    GradientSchedule,
    GroupExchange,
    GroupPlan,
    RowExchange,
    StepPlan,
    Transfers,
)
from bagpipe.types import Int32Array, Int64Array

_NONE = np.empty(0, np.int32)


@dataclass(frozen=True, kw_only=True)
class Step:
    """What all ranks do in one step with the group, and what of it they use."""

    step: int
    issue_tick: int
    has_urgent: bool
    plans: tuple[GroupPlan, ...]  # by rank
    exchanges: tuple[GroupExchange, ...]
    shares: tuple[DedupedGroup, ...]  # what a rank's samples ask for

    @property
    def rows(self) -> list[Int64Array]:
        """By rank (U_r,) the unique rows of its samples."""
        return [share.unique_rows for share in self.shares]

    @classmethod
    def of(cls, plans: Sequence[StepPlan], index: int, batch: MergedGroup, num_slots: int) -> Step:
        """Takes from the plans of all ranks what they say of the group at `index`."""
        own = tuple(plan.groups[index] for plan in plans)
        return cls(
            step=plans[0].step,
            issue_tick=plans[0].issue_tick,
            has_urgent=plans[0].has_urgent,
            plans=own,
            exchanges=tuple(plan.exchange or _nothing(plan, num_slots) for plan in own),
            shares=batch.shares,
        )

    def moved(self, moment: str) -> list[Transfers]:
        """The transfers of all ranks, "overlapped" or "urgent"."""
        return [getattr(plan, moment) for plan in self.plans]

    def sent(self, what: str, moment: str) -> list[RowExchange]:
        """The "replicas" or the gradients ("sync") of all ranks, "overlapped" or "urgent"."""
        return [getattr(exchange, f"{what}_{moment}") for exchange in self.exchanges]


def _nothing(plan: GroupPlan, num_slots: int) -> GroupExchange:
    """The exchange of a single trainer, which updates all rows at once with its own sums."""
    slots = plan.schedule.unique_slots
    places = np.arange(len(slots) + 1, dtype=np.int32)
    nobody = np.zeros(1, np.int64)
    nothing = RowExchange(send=_NONE, send_counts=nobody, receive_counts=nobody)
    return GroupExchange(
        first_replica=num_slots,
        replicas_overlapped=nothing,
        replicas_urgent=nothing,
        sync_urgent=nothing,
        sync_overlapped=nothing,
        apply_urgent=_applied(slots, places[:-1], places),
        apply_overlapped=_applied(_NONE, _NONE, places[:1]),
    )


def _applied(slots: Int32Array, bags: Int32Array, offsets: Int32Array) -> GradientSchedule:
    return GradientSchedule(
        unique_slots=slots,
        bags=bags,
        piece_offsets=offsets,
        long_uniques=_NONE,
        long_offsets=np.zeros(1, np.int32),
    )
