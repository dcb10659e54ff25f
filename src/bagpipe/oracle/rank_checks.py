"""As `bagpipe.oracle.checks`, for several trainers: a replay of what all executors do with a group.

Of every row it knows where it is and whether gradients of a computed step are still on their way to
it. What may happen at any of several moments happens at the worst one: overlapped gradients are
applied as late as they may be, and replicas that travel behind compute must be the same from the
earliest moment at which they may be sent to the latest.

It costs 33 bytes a row and 8 a slot, and several times as long as planning: 33 ms a step for 4
trainers with 2,048 x 26 lookups each, on one core.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from bagpipe.errors import PlanError
from bagpipe.oracle.merge import MergedGroup
from bagpipe.oracle.oracle import DedupedBatch
from bagpipe.plan import (
    GradientSchedule,
    GroupExchange,
    GroupPlan,
    RowExchange,
    StepPlan,
    Transfers,
)
from bagpipe.topology import Topology, host_of, shards_of
from bagpipe.types import Group, Int32Array, Int64Array

Payload = TypeVar("Payload")
_NOWHERE = -1
_NOBODY = np.uint64(0)


def checked_ranks(
    groups: Sequence[Group],
    num_slots: Sequence[int],
    topology: Topology,
    planned: Iterable[tuple[tuple[StepPlan, ...], DedupedBatch[Payload]]],
) -> Iterator[tuple[tuple[StepPlan, ...], DedupedBatch[Payload]]]:
    """Passes plans of all ranks on until one breaks an invariant.

    Slots are those of one trainer, for each group.

    Raises:
        PlanError: one does; it names step, group, rank and invariant.
    """
    sizes = zip(groups, num_slots, topology.num_replica_slots, strict=True)
    checkers = [
        RankChecker(group, index, topology, num_slots=slots, num_replica_slots=num_replicas)
        for index, (group, slots, num_replicas) in enumerate(sizes)
    ]
    for plans, batch in planned:
        for checker, merged in zip(checkers, batch.groups, strict=True):
            checker.check(plans, merged, batch.share_sizes)
        yield plans, batch
    for checker in checkers:
        checker.finish()


@dataclass(frozen=True, kw_only=True)
class _Step:
    """What all ranks do in one step with the group."""

    step: int
    issue_tick: int
    has_urgent: bool
    plans: tuple[GroupPlan, ...]  # by rank
    shares: tuple[Int64Array, ...]  # by rank (U_r,) the unique rows of its samples
    inverses: tuple[Int32Array, ...]

    @property
    def exchanges(self) -> list[GroupExchange]:
        found = [plan.exchange for plan in self.plans]
        assert None not in found
        return found  # type: ignore[return-value]


class RankChecker:
    """Replays one group's plans of all ranks.

    A step is judged once every plan that acts before it is known, at the latest by `finish`.
    """

    def __init__(
        self,
        group: Group,
        index: int,
        topology: Topology,
        *,
        num_slots: int,
        num_replica_slots: int,
    ) -> None:
        """`index` is that of the group in plans; slots are those of each trainer."""
        num_trainers = topology.num_trainers
        self._group, self._index, self._ranks = group, index, range(num_trainers)
        self._num_hosts, self._hosts = (
            topology.num_hosts,
            [host_of(rank, num_trainers, topology.num_hosts) for rank in self._ranks],
        )
        self._num_slots, self._num_replica_slots = num_slots, num_replica_slots
        self._rows_of_slots = np.full((num_trainers, num_slots), _NOWHERE, np.int64)
        self._owners = np.full(group.num_rows, _NOWHERE, np.int64)
        self._evicted_at = np.full(group.num_rows, -1, np.int64)
        self._last_used = np.full(group.num_rows, -2, np.int64)  # never: before any step before
        # gradients of a computed step have not been applied
        self._is_behind = np.zeros(group.num_rows, np.bool_)
        self._users = np.zeros(group.num_rows, np.uint64)  # of the step at hand, a bit a rank
        self._waiting: deque[_Step] = deque()
        self._num_issued = (
            0  # how many of the waiting steps have had their overlapped transfers replayed
        )
        self._deferred: _Step | None = (
            None  # the last computed step, until its overlapped gradients are applied
        )
        self._step = -1
        self._first_replica = _NOWHERE  # of the step before

    def check(
        self, plans: Sequence[StepPlan], batch: MergedGroup, share_sizes: Sequence[int]
    ) -> None:
        """Takes the plans of all ranks for the next step.

        Replays all ticks before that of its overlapped transfers.
        """
        first = plans[0]
        self._step = first.step
        self._expect(
            not self._waiting or first.step == self._waiting[-1].step + 1,
            7,
            "steps are not in order",
        )
        self._expect(
            0 <= first.issue_tick <= first.step,
            4,
            f"overlapped transfers at tick {first.issue_tick}, after the step itself",
        )
        for rank, plan in enumerate(plans):
            same = (plan.step, plan.issue_tick, plan.has_urgent) == (
                first.step,
                first.issue_tick,
                first.has_urgent,
            )
            self._expect(same, 7, "its step, issue tick or has_urgent is not rank 0's", rank)
            self._expect(
                plan.batch_size == share_sizes[rank],
                7,
                "another number of samples than its share has",
                rank,
            )
        self._waiting.append(
            _Step(
                step=first.step,
                issue_tick=first.issue_tick,
                has_urgent=first.has_urgent,
                plans=tuple(plan.groups[self._index] for plan in plans),
                shares=tuple(share.unique_rows for share in batch.shares),
                inverses=tuple(share.inverse for share in batch.shares),
            )
        )
        while self._waiting[0].step < first.issue_tick:
            self._replay_step()

    def finish(self) -> None:
        """Replays what is left after the last plan."""
        while self._waiting:
            self._replay_step()
        self._apply_deferred()

    def _replay_step(self) -> None:
        """Tick and compute of the oldest waiting step."""
        now = self._waiting[0]
        self._step = now.step
        # a prefetch depth of 0: its own overlapped transfers are due at this very tick
        if self._num_issued == 0:
            self._expect(now.issue_tick == now.step, 4, "overlapped transfers were never issued")
            self._issue_overlapped(now)
        overlapped = self._replicas(now, "overlapped")
        urgent = [plan.urgent for plan in now.plans]
        has_urgent = any(len(moved.evict_rows) + len(moved.fetch_rows) > 0 for moved in urgent)
        self._expect(
            now.has_urgent or not has_urgent,
            5,
            "there are urgent transfers, but has_urgent is not set",
        )
        if now.has_urgent:
            self._apply_deferred()
        self._transfer(urgent, now.step)
        while (
            self._num_issued < len(self._waiting)
            and self._waiting[self._num_issued].issue_tick <= now.step
        ):
            self._issue_overlapped(self._waiting[self._num_issued])
        self._step = now.step
        replicas = [
            np.concatenate(both)
            for both in zip(overlapped, self._replicas(now, "urgent"), strict=True)
        ]
        for rank in self._ranks:
            self._check_lookups(now, rank, replicas[rank])
        self._first_replica = now.exchanges[0].first_replica
        self._apply_deferred()
        self._compute(now)
        self._waiting.popleft()
        self._num_issued -= 1

    def _issue_overlapped(self, issued: _Step) -> None:
        self._step = issued.step
        self._transfer([plan.overlapped for plan in issued.plans], issued.issue_tick)
        self._num_issued += 1

    def _transfer(self, transfers: Sequence[Transfers], tick: int) -> None:
        """Evicts on all ranks, then fetches: a row may come back to another rank."""
        for rank, moved in enumerate(transfers):
            rows, slots = moved.evict_rows, moved.evict_slots
            self._expect_slots(rank, slots, self._num_slots)
            self._expect(
                np.array_equal(self._rows_of_slots[rank, slots], rows),
                6,
                "an evicted row is not in its slot",
                rank,
            )
            self._expect(
                not self._is_behind[rows].any(),
                5,
                "a row is evicted before its gradients are applied",
                rank,
            )
            self._expect(
                bool((self._last_used[rows] < tick).all()),
                5,
                "a row is evicted before its last use",
                rank,
            )
            self._rows_of_slots[rank, slots] = _NOWHERE
            self._owners[rows] = _NOWHERE
            self._evicted_at[rows] = tick
        for rank, moved in enumerate(transfers):
            rows, slots = moved.fetch_rows, moved.fetch_slots
            self._expect_slots(rank, slots, self._num_slots)
            self._expect(
                bool((self._rows_of_slots[rank, slots] == _NOWHERE).all()),
                5,
                "a fetch fills a slot in use",
                rank,
            )
            self._expect(
                bool((self._owners[rows] == _NOWHERE).all()),
                2,
                "a row is fetched that a rank owns",
                rank,
            )
            is_home = shards_of(rows, self._num_hosts) == self._hosts[rank]
            self._expect(
                bool(is_home.all()), 6, "a row is fetched whose record another host has", rank
            )
            latest = int(self._evicted_at[rows].max(initial=-1))
            self._expect(
                latest <= moved.fence_tick,
                4,
                f"a fetch does not wait for the write-back of tick {latest}",
                rank,
            )
            self._expect(
                moved.fence_tick <= tick,
                4,
                f"a fetch waits for the later tick {moved.fence_tick}",
                rank,
            )
            self._rows_of_slots[rank, slots] = rows
            self._owners[rows] = rank
            self._expect(
                np.array_equal(self._rows_of_slots[rank, slots], rows),
                2,
                "a slot is filled twice",
                rank,
            )
            self._expect(len(np.unique(rows)) == len(rows), 2, "a row is fetched twice", rank)

    def _replicas(self, now: _Step, moment: str) -> list[Int64Array]:
        """The rows of the replicas that arrive, by rank, in the order of their slots.

        All must be as the step needs them.
        """
        exchanges = [getattr(exchange, f"replicas_{moment}") for exchange in now.exchanges]
        sent = []
        for rank, exchange in enumerate(exchanges):
            self._expect_slots(rank, exchange.send, self._num_slots, may_repeat=True)
            rows = self._rows_of_slots[rank, exchange.send]
            self._expect(
                bool((rows != _NOWHERE).all()),
                1,
                f"an empty slot is sent as a replica ({moment})",
                rank,
            )
            self._expect(
                not self._is_behind[rows].any(),
                8,
                f"a replica is sent before its gradients are applied ({moment})",
                rank,
            )
            if moment == "overlapped":
                is_old = bool((self._last_used[rows] < now.step - 1).all())
                self._expect(
                    is_old,
                    8,
                    "a replica that travels behind compute is of a row which that compute updates",
                    rank,
                )
            sent.append(rows)
        return self._delivered(exchanges, sent, f"replicas_{moment}")

    def _check_lookups(self, now: _Step, rank: int, replicas: Int64Array) -> None:
        plan, rows, exchange = now.plans[rank], now.shares[rank], now.exchanges[rank]
        slots, begin = plan.schedule.unique_slots, exchange.first_replica
        begins = (self._num_slots, self._num_slots + self._num_replica_slots)
        self._expect(begin in begins, 3, f"replicas begin at slot {begin:,}", rank)
        self._expect(
            len(replicas) <= self._num_replica_slots,
            3,
            f"{len(replicas):,} replicas are more than there is room for",
            rank,
        )
        is_apart = begin != self._first_replica or self._num_replica_slots == 0
        self._expect(is_apart, 5, "replicas overwrite those of the step before", rank)
        self._expect_slots(rank, slots, begin + len(replicas))
        is_replica = slots >= begin
        self._expect(
            bool((is_replica | (slots < self._num_slots)).all()),
            3,
            "a slot lies among the replicas of another step",
            rank,
        )
        self._expect(
            int(is_replica.sum()) == len(replicas), 1, "it is sent rows that it does not use", rank
        )
        found = np.empty(len(slots), np.int64)
        found[is_replica] = replicas[slots[is_replica] - begin]
        found[~is_replica] = self._rows_of_slots[rank, slots[~is_replica]]
        self._expect(np.array_equal(found, rows), 1, "a row is not in its slot", rank)
        self._expect(
            not self._is_behind[rows].any(),
            8,
            "a row is looked up before its gradients are applied",
            rank,
        )
        self._expect(
            np.array_equal(plan.inverse, now.inverses[rank]),
            1,
            "a lookup reads another row's slot",
            rank,
        )

    def _compute(self, now: _Step) -> None:
        """Applies what is applied now, and notes what is not."""
        for rank, rows in enumerate(now.shares):
            self._users[rows] |= np.uint64(1) << np.uint64(rank)
        soon, urgent = (self._updated(now, moment) for moment in ("urgent", "overlapped"))
        updated = np.concatenate([soon, urgent])
        num_used = int(np.count_nonzero(self._users[updated]))
        self._expect(
            len(np.unique(updated)) == len(updated) == num_used,
            8,
            "a row is updated twice, or unused",
        )
        self._users[updated] = _NOBODY
        for rank, rows in enumerate(now.shares):
            self._expect(not self._users[rows].any(), 8, "a row that it uses is not updated", rank)
            self._last_used[rows] = now.step
        self._is_behind[urgent] = True
        self._deferred = now

    def _apply_deferred(self) -> None:
        """Applies the overlapped gradients of the last computed step, unless that is done."""
        if self._deferred is not None:
            for rank, exchange in enumerate(self._deferred.exchanges):
                rows = self._rows_of_slots[rank, exchange.apply_overlapped.unique_slots]
                self._is_behind[rows] = False
            self._deferred = None

    def _updated(self, now: _Step, moment: str) -> Int64Array:
        """The rows that all ranks update at one moment.

        Each must get the gradients of all its users, in the order of ranks.
        """
        exchanges = [getattr(exchange, f"sync_{moment}") for exchange in now.exchanges]
        for rank, exchange in enumerate(exchanges):
            self._expect_slots(rank, exchange.send, len(now.shares[rank]))
        rows_received = self._delivered(
            exchanges,
            [now.shares[rank][each.send] for rank, each in enumerate(exchanges)],
            f"sync_{moment}",
        )
        found = []
        for rank in self._ranks:
            received = exchanges[rank].receive_counts
            schedule: GradientSchedule = getattr(now.exchanges[rank], f"apply_{moment}")
            senders = np.concatenate(
                [np.full(len(now.shares[rank]), rank), np.repeat(self._ranks, received)]
            )
            rows = np.concatenate([now.shares[rank], rows_received[rank]])
            found.append(self._check_schedule(rank, schedule, rows, senders, len(now.shares[rank])))
        return np.concatenate(found)

    def _check_schedule(
        self,
        rank: int,
        schedule: GradientSchedule,
        rows: Int64Array,
        senders: Int64Array,
        num_own: int,
    ) -> Int64Array:
        """The rows that a rank updates.

        Its gradients are of `rows` (n,), by `senders` (n,); the first `num_own` are its own.
        """
        slots, places, ends = schedule.unique_slots, schedule.bags, schedule.piece_offsets
        self._expect_slots(rank, slots, self._num_slots)
        self._expect_slots(rank, places, len(rows))
        counts = np.diff(ends)
        is_whole = (
            len(ends) == len(slots) + 1
            and ends[0] == 0
            and ends[-1] == len(places)
            and bool((counts > 0).all())
        )
        self._expect(
            is_whole and len(schedule.long_uniques) == 0,
            8,
            "gradients and the rows that they are for do not fit",
            rank,
        )
        self._expect(
            int((places >= num_own).sum()) == len(rows) - num_own,
            8,
            "a gradient sent to it is not applied",
            rank,
        )
        updated: Int64Array = self._rows_of_slots[rank, slots]
        self._expect(
            np.array_equal(rows[places], np.repeat(updated, counts)),
            8,
            "a row gets the gradient of another",
            rank,
        )
        by = senders[places]
        is_ascending = np.ones(len(by), np.bool_)
        is_ascending[1:] = by[1:] > by[:-1]
        is_ascending[ends[:-1]] = True
        self._expect(
            bool(is_ascending.all()), 8, "gradients are not added in the order of ranks", rank
        )
        if len(slots):
            users = np.bitwise_or.reduceat(np.uint64(1) << by.astype(np.uint64), ends[:-1])
            self._expect(
                np.array_equal(users, self._users[updated]),
                8,
                "a row does not get the gradients of all its users",
                rank,
            )
        return updated

    def _delivered(
        self, exchanges: Sequence[RowExchange], sent: Sequence[Int64Array], name: str
    ) -> list[Int64Array]:
        """By receiver what has been sent to it, by sender; both must count alike."""
        parts = []
        for rank, exchange in enumerate(exchanges):
            counts = exchange.send_counts
            self._expect(
                int(counts.sum()) == len(exchange.send),
                8,
                f"{name} has other counts than rows",
                rank,
            )
            self._expect(int(counts[rank]) == 0, 8, f"{name} sends rows to itself", rank)
            expected = [int(theirs.receive_counts[rank]) for theirs in exchanges]
            self._expect(
                counts.tolist() == expected,
                8,
                f"{name} sends other numbers of rows than are expected",
                rank,
            )
            parts.append(np.split(sent[rank], np.cumsum(counts)[:-1]))
        return [np.concatenate([part[rank] for part in parts]) for rank in self._ranks]

    def _expect_slots(
        self, rank: int, slots: Int32Array, end: int, *, may_repeat: bool = False
    ) -> None:
        in_range = len(slots) == 0 or (slots.min() >= 0 and slots.max() < end)
        self._expect(bool(in_range), 3, f"a place lies outside the {end:,} that there are", rank)
        self._expect(
            may_repeat or len(np.unique(slots)) == len(slots), 2, "a place is named twice", rank
        )

    def _expect(self, condition: bool, invariant: int, what: str, rank: int | None = None) -> None:
        if not condition:
            where = "" if rank is None else f", rank {rank}"
            raise PlanError(
                f"step {self._step}, {self._group.name}{where}: {what} (invariant {invariant} of "
                "docs/design.md)"
            )
