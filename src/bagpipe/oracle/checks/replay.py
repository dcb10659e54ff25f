"""The replay of one group's plans: what happens at which moment, and what must then hold."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import numpy as np

from bagpipe.oracle.checks.gradients import Gradients, delivered
from bagpipe.oracle.checks.rows import Rows
from bagpipe.oracle.checks.rules import Rules
from bagpipe.oracle.checks.steps import Step
from bagpipe.oracle.merge import MergedGroup
from bagpipe.oracle.oracle import DedupedBatch
from bagpipe.plan import StepPlan
from bagpipe.topology import ONE_TRAINER, Topology
from bagpipe.types import Group, Int64Array

Payload = TypeVar("Payload")
_NOWHERE = -1
_OF_SCHEDULE = ("bags", "piece_offsets", "long_uniques", "long_offsets", "bag_weights")


def checked(
    groups: Sequence[Group],
    num_slots: Sequence[int],
    planned: Iterable[tuple[tuple[StepPlan, ...], DedupedBatch[Payload]]],
    topology: Topology = ONE_TRAINER,
) -> Iterator[tuple[tuple[StepPlan, ...], DedupedBatch[Payload]]]:
    """Passes the plans of all ranks on until one breaks an invariant.

    Args:
        groups: The groups that are planned for.
        num_slots: For each group the slots of one trainer.
        planned: Each batch with the plans of all ranks.
        topology: The trainers.

    Raises:
        PlanError: One breaks an invariant; it names step, group, rank and invariant.
    """
    checkers = [
        _Checker(group, index, topology, num_slots=slots, num_replicas=topology.num_replicas(index))
        for index, (group, slots) in enumerate(zip(groups, num_slots, strict=True))
    ]
    for plans, batch in planned:
        for checker, merged in zip(checkers, batch.groups, strict=True):
            checker.check(plans, merged, batch.share_sizes)
        yield plans, batch
    for checker in checkers:
        checker.finish()


class _Checker:
    """Replays one group's plans of all ranks.

    A step is judged once every plan that acts before it is known, at the latest by `finish`.
    """

    def __init__(
        self, group: Group, index: int, topology: Topology, *, num_slots: int, num_replicas: int
    ) -> None:
        """`index` is that of the group in plans; slots and replicas are those of each trainer."""
        self._index, self._num_trainers = index, topology.num_trainers
        self._num_slots, self._num_replicas = num_slots, num_replicas
        self._rules = Rules(group)
        self._rows = Rows(self._rules, group, topology, num_slots)
        self._gradients = Gradients(self._rules, group, self._rows)
        self._waiting: deque[Step] = deque()
        self._num_issued = 0  # waiting steps whose overlapped transfers have been replayed
        # rows to which overlapped gradients of the last computed step are on their way
        self._behind = np.empty(0, np.int64)
        self._first_replica = _NOWHERE  # of the step before

    def check(
        self, plans: Sequence[StepPlan], batch: MergedGroup, share_sizes: Sequence[int]
    ) -> None:
        """Takes the plans of all ranks for the next step.

        Replays all ticks before that of its overlapped transfers.
        """
        now = Step.of(plans, self._index, batch, self._num_slots)
        self._rules.step, expect, tick = now.step, self._rules.expect, now.issue_tick
        is_next = not self._waiting or now.step == self._waiting[-1].step + 1
        expect(7, "steps are not in order", is_next)
        is_ahead = 0 <= tick <= now.step
        expect(4, f"overlapped transfers at tick {tick}, after the step itself", is_ahead)
        for rank, plan in enumerate(plans):
            is_alike = (plan.step, plan.issue_tick) == (now.step, tick)
            is_alike = is_alike and plan.has_urgent == now.has_urgent
            expect(7, "its step, issue tick or has_urgent is not rank 0's", is_alike, rank)
            is_whole = plan.batch_size == share_sizes[rank]
            expect(7, "another number of samples than its share has", is_whole, rank)
        self._waiting.append(now)
        while self._waiting[0].step < tick:
            self._replay_step()

    def finish(self) -> None:
        """Replays what is left after the last plan."""
        while self._waiting:
            self._replay_step()

    def _replay_step(self) -> None:
        """Tick and compute of the oldest waiting step."""
        now, expect = self._waiting[0], self._rules.expect
        self._rules.step = now.step
        # with a prefetch depth of 0 its own overlapped transfers are due at this very tick
        if self._num_issued == 0:
            expect(4, "overlapped transfers were never issued", now.issue_tick == now.step)
            self._issue_overlapped()
        overlapped = self._replicas(now, "overlapped")
        urgent = now.moved("urgent")
        has_urgent = any(len(moved.evict_rows) + len(moved.fetch_rows) > 0 for moved in urgent)
        # a single trainer has nobody to tell
        is_told = now.has_urgent or not has_urgent or self._num_trainers == 1
        expect(5, "there are urgent transfers, but has_urgent is not set", is_told)
        if now.has_urgent:
            self._apply_overlapped()
        self._rows.transfer(urgent, now.step)
        while (
            self._num_issued < len(self._waiting)
            and self._waiting[self._num_issued].issue_tick <= now.step
        ):
            self._issue_overlapped()
        self._rules.step = now.step
        both = zip(overlapped, self._replicas(now, "urgent"), strict=True)
        for rank, replicas in enumerate(both):
            self._check_lookups(now, rank, np.concatenate(replicas))
        self._first_replica = now.exchanges[0].first_replica
        self._apply_overlapped()
        self._compute(now)
        self._waiting.popleft()
        self._num_issued -= 1

    def _issue_overlapped(self) -> None:
        """Issues the oldest overlapped transfers that are not issued yet."""
        issued = self._waiting[self._num_issued]
        self._rules.step = issued.step
        self._rows.transfer(issued.moved("overlapped"), issued.issue_tick)
        self._num_issued += 1

    def _replicas(self, now: Step, moment: str) -> list[Int64Array]:
        """The rows of the replicas that arrive, by rank, in the order of their slots.

        All must be as the step needs them.
        """
        exchanges, sent = now.sent("replicas", moment), []
        for rank, exchange in enumerate(exchanges):
            expect = partial(self._rules.expect, rank=rank)
            self._rules.expect_places(exchange.send, self._num_slots, rank, may_repeat=True)
            rows = self._rows.at(rank, exchange.send)
            is_full = (rows != _NOWHERE).all()
            expect(1, f"an empty slot is sent as a replica ({moment})", is_full)
            is_whole = not self._rows.are_behind(rows)
            expect(8, f"a replica is sent before its gradients are applied ({moment})", is_whole)
            is_old = moment == "urgent" or not self._rows.are_used_since(now.step - 1, rows)
            expect(8, "a replica travels behind the compute that updates its row", is_old)
            sent.append(rows)
        return delivered(self._rules, exchanges, sent, f"replicas_{moment}")

    def _check_lookups(self, now: Step, rank: int, replicas: Int64Array) -> None:
        """Each lookup must find its row, in a slot of the rank's own or in a replica's."""
        expect = partial(self._rules.expect, rank=rank)
        plan, slots = now.plans[rank], now.plans[rank].schedule.unique_slots
        begin, num_slots = now.exchanges[rank].first_replica, self._num_slots
        is_half = begin in (num_slots, num_slots + self._num_replicas)
        expect(3, f"replicas begin at slot {begin:,}", is_half)
        has_room = len(replicas) <= self._num_replicas
        expect(3, f"{len(replicas):,} replicas are more than there is room for", has_room)
        is_apart = begin != self._first_replica or len(replicas) == 0
        expect(5, "replicas overwrite those of the step before", is_apart)
        self._rules.expect_places(slots, begin + len(replicas), rank)
        is_replica = slots >= begin
        is_known = (is_replica | (slots < num_slots)).all()
        expect(3, "a slot lies among the replicas of another step", is_known)
        is_used = np.count_nonzero(is_replica) == len(replicas)
        expect(1, "it is sent rows that it does not use", is_used)
        found = np.empty(len(slots), np.int64)
        found[is_replica] = replicas[slots[is_replica] - begin]
        found[~is_replica] = self._rows.at(rank, slots[~is_replica])
        expect(1, "a row is not in its slot", np.array_equal(found, now.rows[rank]))
        is_whole = not self._rows.are_behind(now.rows[rank])
        expect(8, "a row is looked up before its gradients are applied", is_whole)
        share = now.shares[rank]
        is_right = np.array_equal(plan.inverse, share.inverse)
        expect(1, "a lookup reads another row's slot", is_right)
        is_pooled = _are_alike(plan, share, ("bag_offsets", "bag_scales", "lookup_weights"))
        expect(8, "lookups are pooled in another way than the batch says", is_pooled)
        is_routed = _are_alike(plan.schedule, share, _OF_SCHEDULE)
        expect(8, "a bag's gradient goes to another row than its lookup's", is_routed)

    def _compute(self, now: Step) -> None:
        """Applies what is applied now, and notes what is not."""
        self._behind = self._gradients.check(now)
        self._rows.set_behind(self._behind, True)
        for rows in now.rows:
            self._rows.use(rows, now.step)

    def _apply_overlapped(self) -> None:
        """Applies the overlapped gradients of the last computed step, unless that is done."""
        self._rows.set_behind(self._behind, False)
        self._behind = self._behind[:0]


def _are_alike(one: object, other: object, names: Sequence[str]) -> bool:
    """Whether both have equal arrays, or None, of these names."""
    pairs = ((getattr(one, name), getattr(other, name)) for name in names)
    return all(mine is theirs or np.array_equal(mine, theirs) for mine, theirs in pairs)
