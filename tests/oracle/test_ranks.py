"""Plans for several trainers, replayed by a naive executor of all ranks that moves versions of rows between dicts.

A row's version is how many steps have updated it; what a lookup finds must be the row in the version of all steps before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests import reference, strategies

from bagpipe.jagged import share_of
from bagpipe.oracle import DedupedBatch, Oracle, dedup
from bagpipe.oracle.merge import merge
from bagpipe.oracle.window import Trainers
from bagpipe.types import SGD, Group, GroupExchange, GroupPlan, Jagged, RowExchange, StepPlan, TableConfig, Transfers, group_tables

Plans = list[tuple[StepPlan, ...]]
Uses = list[list[list[int]]]  # by step and rank: the distinct rows, in the order of the rank's plan


class Wrong(AssertionError):
    """What the replay says of a plan that breaks a rule."""


def expect(condition: bool, what: str) -> None:
    if not condition:
        raise Wrong(what)


def exchange_of(plan: StepPlan) -> GroupExchange:
    exchange = plan.groups[0].exchange
    assert exchange is not None
    return exchange


def messages(plans: Sequence[StepPlan], name: str) -> Iterator[tuple[int, int, list[int]]]:
    """(sender, receiver, what is sent) of one exchange, in the order in which each receiver gets them: by sender."""
    exchanges: list[RowExchange] = [getattr(exchange_of(plan), name) for plan in plans]
    for receiver, theirs in enumerate(exchanges):
        for sender, mine in enumerate(exchanges):
            ends = np.cumsum(mine.send_counts)
            sent = mine.send[ends[receiver] - mine.send_counts[receiver] : ends[receiver]].tolist()
            expect(
                len(sent) == theirs.receive_counts[sender], f"{name}: {sender} sends another number of rows than {receiver} expects"
            )
            expect(sender != receiver or not sent, f"{name}: rank {sender} sends to itself")
            yield sender, receiver, sent


class Replay:
    """All ranks' caches and the store of one group, as dicts."""

    def __init__(self, plans: Plans, uses: Uses, num_slots: int) -> None:
        self.plans, self.uses, self.num_slots = plans, uses, num_slots
        self.slots: list[dict[int, list[int]]] = [{} for _ in plans[0]]  # slot -> [row, version]
        self.store: dict[int, int] = {}
        self.evicted_at: dict[int, int] = {}
        self.num_uses: dict[int, int] = {}  # by all steps so far
        self.num_issued = 0  # steps whose early transfers are
        self.num_applied_later = 0  # steps whose later gradients are

    def run(self) -> None:
        for step in range(len(self.plans)):
            self.tick(step)
            self.compute(step)
        self.apply_later(len(self.plans) - 1)
        for row, count in self.num_uses.items():
            resident = [version for slots in self.slots for found, version in slots.values() if found == row]
            expect(resident == [count] if resident else self.store[row] == count, f"row {row} has lost an update")

    def tick(self, step: int) -> None:
        plans = self.plans[step]
        has_late = any(len(plan.groups[0].late.evict_rows) + len(plan.groups[0].late.fetch_rows) for plan in plans)
        expect(all(plan.has_late == bool(has_late) for plan in plans), "has_late differs from what there is")
        if has_late:
            self.apply_later(step - 1)
        self.issue_early(until=step, tick=step, must=True)
        for rank, plan in enumerate(plans):
            self.transfer(rank, plan.groups[0].late, step, step)
        self.issue_early(until=len(self.plans) - 1, tick=step, must=False)

    def issue_early(self, until: int, tick: int, *, must: bool) -> None:
        while self.num_issued <= until and (must or self.plans[self.num_issued][0].early_tick <= tick):
            for rank, plan in enumerate(self.plans[self.num_issued]):
                self.transfer(rank, plan.groups[0].early, plan.early_tick, self.num_issued)
            self.num_issued += 1

    def transfer(self, rank: int, moved: Transfers, label: int, step: int) -> None:
        slots = self.slots[rank]
        for row, slot in zip(moved.evict_rows.tolist(), moved.evict_slots.tolist(), strict=True):
            found = slots.pop(slot, None)
            expect(found == [row, self.num_uses.get(row, 0)], f"step {step}: row {row} leaves slot {slot}, which holds {found}")
            self.store[row], self.evicted_at[row] = self.num_uses.get(row, 0), label
        for row, slot in zip(moved.fetch_rows.tolist(), moved.fetch_slots.tolist(), strict=True):
            owners = [other for other, theirs in enumerate(self.slots) if any(found == row for found, _ in theirs.values())]
            expect(not owners, f"step {step}: row {row} is fetched while ranks {owners} own it")
            expect(slot not in slots and 0 <= slot < self.num_slots, f"step {step}: slot {slot} is filled while it is in use")
            expect(self.evicted_at.get(row, -1) <= moved.fence_tick, f"step {step}: row {row} is fetched before it is written")
            slots[slot] = [row, self.store.get(row, 0)]

    def compute(self, step: int) -> None:
        plans, before = self.plans[step], {row for rows in self.uses[step - 1] for row in rows} if step else set()
        late = {row for plan in plans for row in plan.groups[0].late.fetch_rows.tolist()}
        replicas: list[dict[int, list[int]]] = [{} for _ in plans]
        for name in ("replicas_later", "replicas_now"):
            for sender, receiver, sent in messages(plans, name):
                for slot in sent:
                    expect(slot in self.slots[sender], f"step {step}: an empty slot is sent")
                    row, version = self.slots[sender][slot]
                    expect(
                        row in self.uses[step][receiver], f"step {step}: rank {receiver} is sent row {row}, which it does not use"
                    )
                    if name == "replicas_later":
                        expect(row not in before, f"step {step}: row {row} is sent while the step before updates it")
                        expect(row not in late, f"step {step}: row {row} is sent before it is fetched")
                    place = exchange_of(plans[receiver]).first_replica + len(replicas[receiver])
                    replicas[receiver][place] = [row, version]
        for rank, plan in enumerate(plans):
            found = [
                (self.slots[rank] if slot < self.num_slots else replicas[rank]).get(slot)
                for slot in plan.groups[0].schedule.unique_slots.tolist()
            ]
            expected = [[row, self.num_uses.get(row, 0)] for row in self.uses[step][rank]]
            expect(found == expected, f"step {step}, rank {rank}: a lookup finds another row or version")
        used = {row for rows in self.uses[step] for row in rows}
        later = {row for _, row in self.apply(step, "now")}
        expect(not later & self.rows_applied(step, "later"), f"step {step}: a row is applied now and later")
        for row in used:
            self.num_uses[row] = self.num_uses.get(row, 0) + 1
        self.apply_later(step - 1)

    def apply_later(self, step: int) -> None:
        while self.num_applied_later <= step:
            self.apply(self.num_applied_later, "later")
            for rows in self.uses[self.num_applied_later]:
                for row in rows:
                    versions = [version for slots in self.slots for found, version in slots.values() if found == row]
                    expect(versions != [] and versions[0] >= 1, f"step {self.num_applied_later}: row {row} is not updated")
            self.num_applied_later += 1

    def rows_applied(self, step: int, when: str) -> set[int]:
        return {
            self.slots[rank][slot][0]
            for rank, plan in enumerate(self.plans[step])
            for slot in getattr(exchange_of(plan), f"apply_{when}").unique_slots.tolist()
        }

    def apply(self, step: int, when: str) -> list[tuple[int, int]]:
        """Updates rows on their owners; (rank, row) of each. All its users' gradients must be there, in the order of ranks."""
        plans, uses = self.plans[step], self.uses[step]
        arrived: list[list[tuple[int, int]]] = [[(rank, row) for row in uses[rank]] for rank in range(len(plans))]
        for sender, receiver, sent in messages(plans, f"sync_{when}"):
            arrived[receiver] += [(sender, uses[sender][index]) for index in sent]
        applied = []
        for rank, plan in enumerate(plans):
            schedule = getattr(exchange_of(plan), f"apply_{when}")
            taken = 0
            for index, slot in enumerate(schedule.unique_slots.tolist()):
                row = self.slots[rank][slot][0]
                begin, end = schedule.piece_offsets[index : index + 2].tolist()
                users = [other for other in range(len(plans)) if row in uses[other]]
                found = [arrived[rank][place] for place in schedule.bags[begin:end].tolist()]
                expect(found == [(user, row) for user in users], f"step {step}: row {row} gets {found} of ranks {users}")
                taken += sum(user != rank for user in users)
                self.slots[rank][slot][1] += 1
                applied.append((rank, row))
            expect(
                taken == len(arrived[rank]) - len(uses[rank]), f"step {step}: rank {rank} is sent gradients that it does not apply"
            )
        return applied


def make_plans(
    group: Group, batches: Sequence[Jagged], num_trainers: int, num_slots: int, lookahead: int, depth: int
) -> tuple[Plans, Uses]:
    uses: Uses = []

    def deduped() -> Iterator[DedupedBatch[None]]:
        for batch in batches:
            shares = [share_of(batch, rank, num_trainers) for rank in range(num_trainers)]
            uses.append([reference.unique_rows(group, share) for share in shares])
            sizes = tuple(share.batch_size for share in shares)
            merged = merge([dedup(group, share) for share in shares])
            yield DedupedBatch(payload=None, batch_size=batch.batch_size, groups=(merged,), share_sizes=sizes)

    trainers = Trainers(num_trainers=num_trainers, ranks=tuple(range(num_trainers)), num_replica_slots=(group.num_rows,))
    oracle = Oracle([group], num_slots=[num_slots], lookahead=lookahead, prefetch_depth=depth, trainers=trainers)
    plans = [plans for plans, _ in oracle.plan_ranks(oracle.link(deduped()))]
    return plans, uses


@given(strategies.group_traces(), st.sampled_from([2, 3, 4, 8]), st.integers(0, 10), st.integers(1, 20), st.integers(0, 4))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_rank_finds_current_rows_and_every_gradient_is_applied_once(
    trace: tuple[Group, list[Jagged]], num_trainers: int, extra: int, lookahead: int, depth: int
) -> None:
    group, batches = trace
    smallest = max(1, *(len(reference.unique_rows(group, batch)) for batch in batches))
    num_slots = -(-smallest // num_trainers) + extra
    plans, uses = make_plans(group, batches, num_trainers, num_slots, lookahead, depth)
    Replay(plans, uses, num_slots).run()


def zipf_trace(num_batches: int, batch_size: int, num_rows: int = 3000) -> tuple[Group, list[Jagged]]:
    (group,) = group_tables([TableConfig(name="t", num_embeddings=num_rows, embedding_dim=4, feature_names=["f"])], SGD(lr=1.0))
    rng = np.random.default_rng(7)
    ids = [(num_rows * rng.random(batch_size) ** 4).astype(np.int64) for _ in range(num_batches)]
    return group, [Jagged(keys=("f",), values=values, batch_size=batch_size) for values in ids]


def test_plans_are_deterministic_and_evict_from_all_caches_as_from_one() -> None:
    group, batches = zipf_trace(30, 120)
    first, _ = make_plans(group, batches, 3, 150, 6, 2)
    again, _ = make_plans(group, batches, 3, 150, 6, 2)
    one = Oracle([group], num_slots=[450], lookahead=6, prefetch_depth=3)  # rows of several trainers are settled a step later
    single = one.plan(DedupedBatch(payload=None, batch_size=120, groups=(dedup(group, batch),)) for batch in batches)
    for plans, others, (alone, _) in zip(first, again, single, strict=True):
        for plan, other in zip(plans, others, strict=True):
            np.testing.assert_array_equal(plan.groups[0].schedule.unique_slots, other.groups[0].schedule.unique_slots)
            np.testing.assert_array_equal(exchange_of(plan).sync_now.send, exchange_of(other).sync_now.send)
        moved = [(plan.groups[0].early, plan.groups[0].late) for plan in plans]
        fetched = sorted(row for pair in moved for part in pair for row in part.fetch_rows.tolist())
        parts = alone.groups[0].early, alone.groups[0].late
        assert fetched == sorted(row for part in parts for row in part.fetch_rows.tolist())


def test_ranks_own_and_send_equally_many_rows() -> None:
    group, batches = zipf_trace(60, 4000, num_rows=30_000)
    plans, _ = make_plans(group, batches, 4, 4500, 10, 2)
    owned, sent = np.zeros(4), np.zeros(4)  # a cache that is full from about step 15 on
    for step in plans[20:]:
        for rank, plan in enumerate(step):
            exchange = exchange_of(plan)
            owned[rank] += len(exchange.apply_now.unique_slots) + len(exchange.apply_later.unique_slots)
            sent[rank] += sum(len(part.send) for part in (exchange.replicas_now, exchange.replicas_later))
            sent[rank] += sum(len(part.send) for part in (exchange.sync_now, exchange.sync_later))
    assert owned.max() / owned.min() < 1.1
    assert sent.max() / sent.min() < 1.1


def with_exchange(plan: StepPlan, exchange: GroupExchange) -> StepPlan:
    group: GroupPlan = replace(plan.groups[0], exchange=exchange)
    return replace(plan, groups=(group,))


def send_replicas_too_early(plans: tuple[StepPlan, ...]) -> tuple[StepPlan, ...]:
    """All that travels now travels later, a step early."""
    none = RowExchange(send=np.empty(0, np.int32), send_counts=np.zeros(3, np.int64), receive_counts=np.zeros(3, np.int64))
    return tuple(
        with_exchange(plan, replace(exchange_of(plan), replicas_later=exchange_of(plan).replicas_now, replicas_now=none))
        for plan in plans
    )


def apply_too_late(plans: tuple[StepPlan, ...]) -> tuple[StepPlan, ...]:
    """Gradients that the next step needs come with those that it does not, and the other way round."""
    return tuple(
        with_exchange(
            plan,
            replace(
                exchange_of(plan),
                sync_now=exchange_of(plan).sync_later,
                sync_later=exchange_of(plan).sync_now,
                apply_now=exchange_of(plan).apply_later,
                apply_later=exchange_of(plan).apply_now,
            ),
        )
        for plan in plans
    )


def drop_a_contribution(plans: tuple[StepPlan, ...]) -> tuple[StepPlan, ...]:
    """The last contribution to the last row of rank 0 is left out."""
    exchange = exchange_of(plans[0])
    offsets = exchange.apply_now.piece_offsets.copy()
    offsets[-1] -= 1
    return (with_exchange(plans[0], replace(exchange, apply_now=replace(exchange.apply_now, piece_offsets=offsets))), *plans[1:])


def test_a_planted_fault_is_found() -> None:
    group, batches = zipf_trace(12, 90, num_rows=400)
    plans, uses = make_plans(group, batches, 3, 60, 4, 2)
    Replay(plans, uses, 60).run()
    for fault in (send_replicas_too_early, apply_too_late, drop_a_contribution):
        faulty = list(plans)
        faulty[5] = fault(faulty[5])
        with pytest.raises(Wrong):
            Replay(faulty, uses, 60).run()
