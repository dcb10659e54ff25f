"""Plans for several trainers, replayed by naive executors that move the histories of rows.

There is an executor for each rank, made of dicts. A row's history is which steps have updated it,
each with the ranks whose gradients went in, in the order in which they were added. A lookup must
find the right row with the history of all steps before. What may happen at any of several moments
is replayed at the worst one: overlapped gradients are applied as late as they may be, overlapped
replicas are sent both as soon and as late as they may be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tests import reference

from bagpipe.jagged import share_of
from bagpipe.oracle import DedupedBatch, Oracle, checked, dedup
from bagpipe.oracle.merge import merge
from bagpipe.plan import GradientSchedule, GroupExchange, RowExchange, StepPlan, Transfers
from bagpipe.topology import Topology
from bagpipe.types import Group, Jagged

History = tuple[tuple[int, tuple[int, ...]], ...]  # (step, ranks) of each update
Held = tuple[int, History]  # a row in a slot
Messages = dict[tuple[int, int], list[int]]  # by (sender, receiver)
EMPTY: Held = (-1, ())


class Wrong(AssertionError):
    """What the replay says of plans that break a rule."""


def expect(condition: bool, what: str) -> None:
    if not condition:
        raise Wrong(what)


@dataclass(frozen=True, kw_only=True)
class Planned:
    """The plans of all ranks for a trace, and what the trace asks for."""

    group: Group
    num_slots: int
    topology: Topology
    batches: list[DedupedBatch[None]]
    plans: list[tuple[StepPlan, ...]]  # by step, by rank
    lookups: list[list[list[int]]]  # by step, by rank: the row of each lookup
    batch_sizes: list[list[int]]

    @property
    def num_replica_slots(self) -> int:
        return self.topology.num_replica_slots[0]

    def rows(self, index: int, rank: int) -> list[int]:
        """A rank's unique rows in one step, as it numbers them."""
        return reference.in_order(self.lookups[index][rank])


def plan_all(
    group: Group,
    batches: Sequence[Jagged],
    num_trainers: int,
    num_slots: int,
    *,
    lookahead: int = 6,
    depth: int = 2,
    first_step: int = 0,
    ranks: tuple[int, ...] | None = None,
    num_replica_slots: int | None = None,
    overlap: bool = True,
) -> Planned:
    shares = [
        [share_of(batch, rank, num_trainers) for rank in range(num_trainers)] for batch in batches
    ]
    num_replicas = group.num_rows if num_replica_slots is None else num_replica_slots
    ranks = ranks or tuple(range(num_trainers))
    topology = Topology(
        num_trainers=num_trainers,
        ranks=ranks,
        num_replica_slots=(num_replicas,),
        overlap=overlap,
    )
    oracle = Oracle(
        [group],
        num_slots=[num_slots],
        lookahead=lookahead,
        prefetch_depth=depth,
        first_step=first_step,
        topology=topology,
    )
    merged = [
        DedupedBatch(
            payload=None,
            groups=(merge(group, [dedup(group, share) for share in step]),),
            share_sizes=tuple(share.batch_size for share in step),
        )
        for step in shares
    ]
    return Planned(
        group=group,
        num_slots=num_slots,
        topology=topology,
        batches=merged,
        plans=[plans for plans, _ in oracle.plan(oracle.link(merged))],
        lookups=[
            [[row for row, _, _ in reference.lookups(group, share)] for share in step]
            for step in shares
        ],
        batch_sizes=[[share.batch_size for share in step] for step in shares],
    )


def check(planned: Planned) -> None:
    """Runs the package's own replay, which raises PlanError if the plans break a rule."""
    pairs = zip(planned.plans, planned.batches, strict=True)
    for _ in checked([planned.group], [planned.num_slots], pairs, planned.topology):
        pass


def smallest_cache(group: Group, batches: Sequence[Jagged], num_trainers: int) -> int:
    """The fewest slots with which each trainer can do."""
    return max(
        1, *(-(-len(reference.unique_rows(group, batch)) // num_trainers) for batch in batches)
    )


def exchange_of(plan: StepPlan) -> GroupExchange:
    exchange = plan.groups[0].exchange
    assert exchange is not None
    return exchange


def applied(plan: StepPlan, when: str) -> GradientSchedule:
    """What a rank applies, "urgent" or "overlapped"."""
    exchange = exchange_of(plan)
    return exchange.apply_urgent if when == "urgent" else exchange.apply_overlapped


def moved_by(plan: StepPlan) -> tuple[Transfers, Transfers]:
    return plan.groups[0].overlapped, plan.groups[0].urgent


def messages(plans: Sequence[StepPlan], name: str) -> Messages:
    """What each rank sends each other one, by sender, as its receiver gets it.

    Both sides must agree.
    """
    found: Messages = {}
    exchanges: list[RowExchange] = [getattr(exchange_of(plan), name) for plan in plans]
    for sender, mine in enumerate(exchanges):
        expect(
            int(mine.send_counts.sum()) == len(mine.send),
            f"{name}: rank {sender} counts other rows than it sends",
        )
        begin = 0
        for receiver, theirs in enumerate(exchanges):
            end = begin + int(mine.send_counts[receiver])
            expect(
                end - begin == theirs.receive_counts[sender],
                f"{name}: {receiver} expects another number than {sender} sends",
            )
            expect(sender != receiver or begin == end, f"{name}: rank {sender} sends to itself")
            found[sender, receiver] = mine.send[begin:end].tolist()
            begin = end
    return found


class Replay:
    """All ranks' caches and the store of one group.

    Plans reach the executors `ahead` steps ahead.
    """

    def __init__(self, planned: Planned, ahead: int = 100) -> None:
        self.planned, self.plans, self.ahead = planned, planned.plans, ahead
        self.ranks = range(len(self.plans[0]))
        self.slots: list[dict[int, Held]] = [{} for _ in self.ranks]
        self.owners: dict[int, int] = {}
        self.store: dict[int, History] = {}
        self.evicted_at: dict[int, int] = {}
        # of each row used so far, with the updates of all steps computed so far
        self.complete: dict[int, History] = {}
        self.num_issued = self.num_overlapped_done = 0  # steps
        # None: nothing could be sent before the tick
        self.sent_earliest: dict[tuple[int, int, int], Held] | None = None
        self.arrived: dict[tuple[int, int, int], Held] = {}

    def run(self) -> None:
        for index in range(len(self.plans)):
            self.tick(index)
            self.look_up(index)
            self.apply_overlapped(index - 1)
            self.send_ahead(index + 1)
            self.apply_urgent(index)
        self.apply_overlapped(len(self.plans) - 1)
        for slots in self.slots:
            self.store.update(dict(slots.values()))
        expect(self.store == self.complete, "after a flush the store lacks an update")

    def tick(self, index: int) -> None:
        """Moves all rows of a tick.

        Rows are evicted before the overlapped gradients of the step before are applied, except
        where a transfer is urgent.
        """
        plans = self.plans[index]
        urgent = [plan.groups[0].urgent for plan in plans]
        has_urgent = any(len(moved.evict_rows) + len(moved.fetch_rows) > 0 for moved in urgent)
        expect(
            all(plan.has_urgent == has_urgent for plan in plans), "has_urgent is not what there is"
        )
        expect(
            len({(plan.step, plan.issue_tick) for plan in plans}) == 1,
            "ranks differ in a step's number or tick",
        )
        expect(plans[0].issue_tick <= plans[0].step, "overlapped transfers come after their step")
        if self.num_issued == index:
            self.issue_overlapped(index)
        self.arrived = self.sent(index, "replicas_overlapped")
        if self.sent_earliest is not None:
            expect(
                self.arrived == self.sent_earliest,
                f"step {index}: what is sent behind compute changes meanwhile",
            )
        if has_urgent:
            self.apply_overlapped(index - 1)
        self.transfer(urgent, plans[0].step)
        while self.num_issued < len(self.plans) and self.is_due(self.num_issued, plans[0].step):
            self.issue_overlapped(self.num_issued)

    def is_due(self, index: int, tick: int) -> bool:
        plan = self.plans[index][0]
        return max(plan.issue_tick, plan.step - self.ahead) <= tick

    def issue_overlapped(self, index: int) -> None:
        plans = self.plans[index]
        self.transfer([plan.groups[0].overlapped for plan in plans], plans[0].issue_tick)
        self.num_issued += 1

    def transfer(self, moved: list[Transfers], tick: int) -> None:
        """Evicts on all ranks, then fetches: a row may come back to another rank."""
        for rank in self.ranks:
            for row, slot in zip(
                moved[rank].evict_rows.tolist(), moved[rank].evict_slots.tolist(), strict=True
            ):
                found, history = self.slots[rank].pop(slot, EMPTY)
                expect(found == row, f"tick {tick}: row {row} is evicted from where it is not")
                expect(
                    history == self.complete[row],
                    f"tick {tick}: row {row} is evicted before its gradients are applied",
                )
                self.store[row], self.evicted_at[row] = history, tick
                del self.owners[row]
        for rank in self.ranks:
            fence = moved[rank].fence_tick
            expect(fence <= tick, f"tick {tick}: a fetch waits for a tick to come")
            for row, slot in zip(
                moved[rank].fetch_rows.tolist(), moved[rank].fetch_slots.tolist(), strict=True
            ):
                fetch, fill = f"tick {tick}: row {row} is fetched", f"tick {tick}: slot {slot} is"
                expect(row not in self.owners, f"{fetch} while a rank owns it")
                expect(0 <= slot < self.planned.num_slots, f"{fill} outside the cache")
                expect(slot not in self.slots[rank], f"{fill} filled while it is in use")
                expect(self.evicted_at.get(row, -1) <= fence, f"{fetch} before it is written")
                self.slots[rank][slot], self.owners[row] = (row, self.store.get(row, ())), rank

    def sent(self, index: int, name: str) -> dict[tuple[int, int, int], Held]:
        """What the slots to send hold, by (receiver, sender, place in the message)."""
        found = messages(self.plans[index], name)
        return {
            (to, by, at): self.slots[by].get(slot, EMPTY)
            for (by, to), sent in found.items()
            for at, slot in enumerate(sent)
        }

    def send_ahead(self, index: int) -> None:
        """Notes what a step's overlapped replicas hold if they are sent as soon as may be.

        That is behind the compute of the step before, if their fetches have been issued.
        """
        is_sent = index < len(self.plans) and self.num_issued > index
        self.sent_earliest = self.sent(index, "replicas_overlapped") if is_sent else None

    def replicas(self, index: int, rank: int) -> dict[int, Held]:
        """What a rank's replica slots hold in the compute of a step."""
        parts = self.arrived, self.sent(index, "replicas_urgent")
        in_order = [part[key] for part in parts for key in sorted(part) if key[0] == rank]
        first = exchange_of(self.plans[index][rank]).first_replica
        size = self.planned.num_replica_slots
        expect(
            len(in_order) <= size,
            f"step {index}: rank {rank} gets more replicas than it has room for",
        )
        begins = (self.planned.num_slots, self.planned.num_slots + size)
        expect(first in begins, f"step {index}: rank {rank}'s replicas lie elsewhere")
        if index and size:
            expect(
                first != exchange_of(self.plans[index - 1][rank]).first_replica,
                "replicas overwrite those in use",
            )
        return {first + place: held for place, held in enumerate(in_order)}

    def look_up(self, index: int) -> None:
        for rank, plan in enumerate(self.plans[index]):
            where, rows = f"step {index}, rank {rank}", self.planned.rows(index, rank)
            expect(
                plan.batch_size == self.planned.batch_sizes[index][rank],
                f"{where}: another number of samples",
            )
            replicas = self.replicas(index, rank)
            held = {**self.slots[rank], **replicas}
            unique_slots = plan.groups[0].schedule.unique_slots.tolist()
            for slot, row in [
                *zip(
                    plan.groups[0].lookup_slots.tolist(),
                    self.planned.lookups[index][rank],
                    strict=True,
                ),
                *zip(unique_slots, rows, strict=True),
            ]:
                found, history = held.get(slot, EMPTY)
                expect(found == row, f"{where}: a lookup of row {row} finds another in slot {slot}")
                expect(
                    history == self.complete.get(row, ()),
                    f"{where}: a lookup of row {row} finds {history}",
                )
            expect(
                set(replicas) <= set(unique_slots), f"{where}: it is sent rows that it does not use"
            )

    def apply_urgent(self, index: int) -> None:
        users: dict[int, tuple[int, ...]] = {}
        for rank in self.ranks:
            for row in self.planned.rows(index, rank):
                users[row] = (*users.get(row, ()), rank)
        updated = [
            row
            for rank in self.ranks
            for when in ("urgent", "overlapped")
            for row in self.rows_updated(index, rank, when)
        ]
        expect(sorted(updated) == sorted(users), f"step {index}: a row is not updated once")
        self.apply(index, "urgent")
        for row, ranks in users.items():
            self.complete[row] = (*self.complete.get(row, ()), (self.plans[index][0].step, ranks))

    def apply_overlapped(self, index: int) -> None:
        while self.num_overlapped_done <= index:
            self.apply(self.num_overlapped_done, "overlapped")
            self.num_overlapped_done += 1

    def rows_updated(self, index: int, rank: int, when: str) -> list[int]:
        slots = applied(self.plans[index][rank], when).unique_slots.tolist()
        return [self.slots[rank].get(slot, EMPTY)[0] for slot in slots]

    def apply(self, index: int, when: str) -> None:
        """Updates rows on their owners with the gradients that are there, by the schedule."""
        sums = [[(rank, row) for row in self.planned.rows(index, rank)] for rank in self.ranks]
        received: list[list[tuple[int, int]]] = [[] for _ in self.ranks]
        for (sender, receiver), sent in sorted(messages(self.plans[index], f"sync_{when}").items()):
            received[receiver] += [sums[sender][unique] for unique in sent]
        for rank, plan in enumerate(self.plans[index]):
            schedule = applied(plan, when)
            gradients, taken = sums[rank] + received[rank], schedule.bags.tolist()
            expect(len(set(taken)) == len(taken), f"step {index}: a gradient is applied twice")
            expect(
                {*taken} >= {*range(len(sums[rank]), len(gradients))},
                f"step {index}: a gradient sent is not applied",
            )
            expect(
                schedule.piece_offsets[-1] == len(taken) and len(schedule.long_uniques) == 0,
                "pieces and bags differ",
            )
            ends = schedule.piece_offsets.tolist()
            for slot, begin, end in zip(
                schedule.unique_slots.tolist(), ends[:-1], ends[1:], strict=True
            ):
                row, history = self.slots[rank].get(slot, EMPTY)
                parts = [gradients[place] for place in taken[begin:end]]
                expect(
                    {of for _, of in parts} == {row},
                    f"step {index}: row {row} gets the gradient of another",
                )
                ranks = tuple(by for by, _ in parts)
                all_users = tuple(by for by in self.ranks if row in self.planned.lookups[index][by])
                expect(
                    ranks == all_users,
                    f"step {index}: row {row} gets gradients of ranks {ranks}, not {all_users}",
                )
                self.slots[rank][slot] = row, (*history, (plan.step, ranks))
