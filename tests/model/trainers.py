"""One start of all trainers: what every rank does, and the oracle process that hands out plans.

What ranks send each other is not simulated: a step is computed at once when all have come to it.
`tests/oracle/rank_replay.py` replays that part.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

from tests.model.coordinator import Coordinator
from tests.model.shard import Header
from tests.model.sim import Failed, Future, Process, Stream, Work, Wrong, all_of
from tests.model.traces import NUM_ROWS, SHARDS, Run
from tests.model.world import World

from bagpipe.plan import StepPlan
from bagpipe.store.base import NO_STEPS, Steps

NUM_FETCH_STREAMS = 2


class Meeting:
    """Where all ranks of a start wait for each other, again and again."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._came: list[Future] = []

    def come(self, last: Any = None) -> Future:
        """The future comes when all have come; `last` is called just before."""
        come = Future()
        self._came.append(come)
        if len(self._came) == self._num_ranks:
            came, self._came = self._came, []
            if last is not None:
                last()
            for each in came:
                each.set()
        return come


class Start:
    """All processes of one start, and what they share."""

    def __init__(self, world: World, number: int, run: Run, num_ranks: int) -> None:
        self.world, self.number, self.run = world, number, run
        sim, self.num_ranks = world.sim, num_ranks
        self.meeting = Meeting(num_ranks)
        self.epoch, self.first, self.step = -1, -1, -1
        self.dense = 0
        self.instances: list[Any] = []
        self.addresses = list(world.addresses)
        self.is_saved = self.is_cut_due = False
        self.plans: list[tuple[StepPlan, ...]] = []
        self.num_planned = 0
        self.planned: deque[Future] = deque()
        self.ranks = [Rank(self, rank) for rank in range(num_ranks)]
        self.oracle = Process(sim, f"oracle of start {number}")
        self.processes: list[Process] = [*self.ranks, self.oracle]
        self.coordinator = Coordinator(self, self.ranks[0])
        for process in self.processes:
            process.at_end.append(self._tell_others)
        for rank in self.ranks:
            rank.spawn(rank.main())

    @property
    def is_over(self) -> bool:
        return not all(process.is_alive for process in self.processes)

    def begin_training(self) -> None:
        """Called once every server has begun."""
        self.step = self.first
        self.plans = self.run.trace.plans_from(self.first, self.num_ranks)
        self.oracle.spawn(self._plan())

    def plans_up_to(self, step: int) -> Future:
        """Comes when the oracle has handed out the plans of all steps up to one."""
        future = Future()
        self.planned.append(future)
        future.step = step  # type: ignore[attr-defined]
        self._hand_out()
        return future

    def plans_of(self, step: int) -> tuple[StepPlan, ...]:
        return self.plans[step - self.first]

    def compute(self) -> None:
        """Looks up and updates all rows of a step, on the ranks that own them."""
        step = self.step
        where = {
            row: (rank.slots, slot) for rank in self.ranks for slot, (row, _) in rank.slots.items()
        }
        for row in self.run.trace.rows(step):
            if row not in where:
                raise Wrong(f"step {step}: row {row} is in no cache")
            slots, slot = where[row]
            value = slots[slot][1]
            if value != self.run.value(step, row):
                raise Wrong(
                    f"start {self.number}, epoch {self.epoch}, step {step}: a lookup of row {row} "
                    f"finds {value}, not {self.run.value(step, row)}"
                )
            self.dense += value
            slots[slot] = row, value + self.run.delta(step, row)
        self.step = step + 1
        self.world.progress += 1
        self.is_cut_due = self.coordinator.is_cut_due(self.step)
        self.world.sim.point("step")

    def _plan(self) -> Work:
        for _ in self.plans:
            yield self.world.sim.delay(0.3)
            self.num_planned += 1
            self._hand_out()

    def _hand_out(self) -> None:
        due = [f for f in self.planned if f.step < self.first + self.num_planned]  # type: ignore[attr-defined]
        self.planned = deque(f for f in self.planned if f not in due)
        for future in due:
            future.set()

    def _tell_others(self) -> None:
        """Who is left sees after a while that one has ended, and ends, too."""
        sim = self.world.sim
        for process in self.processes:
            mean = 100.0 if sim.rng.random() < 0.1 else 5.0
            process.after(sim.delay(mean), lambda process=process: process.kill("another ended"))


class Rank(Process):
    """One trainer."""

    def __init__(self, start: Start, rank: int) -> None:
        super().__init__(start.world.sim, f"rank {rank} of start {start.number}")
        self.start, self.rank, self.rules = start, rank, start.world.rules
        self.slots: dict[int, tuple[int, int]] = {}
        self._issued: dict[tuple[int, str], list[Future]] = {}  # fetches
        self._unanswered: list[Future] = []

    def main(self) -> Work:
        start = self.start
        yield self.sim.delay(3.0)
        yield start.meeting.come()
        if self.rank == 0:
            yield from start.coordinator.open()
        yield start.meeting.come(start.begin_training)
        self._connect()
        while start.step < start.run.trace.num_steps:
            yield from self._train(start.step)
            if start.is_cut_due:
                yield from self._cut()
        while True:
            if self.rank == 0:
                yield from start.coordinator.finish()
            yield start.meeting.come()
            if start.is_saved:
                return
            yield from self._cut()

    def _connect(self) -> None:
        network, addresses = self.start.world.network, self.start.addresses
        self._writes = [
            [Stream(network, self, address) for _ in range(1 if self.rules.one_write_stream else 2)]
            for address in addresses
        ]
        self._fetches = [
            [Stream(network, self, address) for _ in range(NUM_FETCH_STREAMS)]
            for address in addresses
        ]

    def _train(self, step: int) -> Work:
        start, depth = self.start, self.start.run.trace.depth
        last = min(step + depth, start.run.trace.num_steps - 1)
        yield start.plans_up_to(last)
        self._issue(step, "overlapped")  # which came too late, if it has not been
        self._issue(step, "urgent")
        for later in range(step + 1, last + 1):
            if start.plans_of(later)[self.rank].issue_tick <= step:
                self._issue(later, "overlapped")
        for kind in ("overlapped", "urgent"):
            yield all_of(self._issued.pop((step, kind)))
        yield start.meeting.come(start.compute)
        yield self.sim.delay(1.0)

    def _issue(self, step: int, kind: str) -> None:
        """Writes what a step's transfers evict, with the mark, and asks for what they fetch."""
        if (step, kind) in self._issued:
            return
        plan = self.start.plans_of(step)[self.rank]
        moved = getattr(plan.groups[0], kind)
        evicted = [self.slots.pop(slot) for slot in moved.evict_slots.tolist()]
        self._write(evicted, Steps(**{kind: step}), always=True)
        fence, depth = moved.fence_tick, plan.step - plan.issue_tick
        behind = (
            Steps(overlapped=min(fence + depth, step - 1), urgent=fence) if fence >= 0 else Steps()
        )
        places = dict(zip(moved.fetch_rows.tolist(), moved.fetch_slots.tolist(), strict=True))
        self._issued[step, kind] = [
            self._fetch(shard, rows, places, behind)
            for shard, rows in self._by_shard(places)
            if rows
        ]

    def _write(self, held: list[tuple[int, int]], mark: Steps, *, always: bool) -> None:
        values = dict(held)
        for shard, rows in self._by_shard(values):
            if rows or always:
                stream = self.sim.rng.choice(self._writes[shard])
                answer = stream.call(
                    "write",
                    self.header(shard, mark),
                    stream.number,
                    rows,
                    [values[row] for row in rows],
                )
                answer.then(self._check)
                self._unanswered.append(answer)

    def _fetch(self, shard: int, rows: list[int], places: dict[int, int], fence: Steps) -> Future:
        def fill(answer: Future) -> None:
            if not answer.error:
                for row, value in zip(rows, answer.value, strict=True):
                    self.slots[places[row]] = row, value

        stream = self.sim.rng.choice(self._fetches[shard])
        answer = stream.call("fetch", self.header(shard, fence), rows)
        answer.then(fill)
        return answer

    def _cut(self) -> Work:
        """Flushes. Nobody gets beyond the next step before rank 0 goes on."""
        start = self.start
        for fetches in self._issued.values():
            yield all_of(fetches)
        self._write(list(self.slots.values()), Steps(), always=False)
        self.sim.point("flush")
        if self.rules.flush_answered:
            yield all_of(self._unanswered)
        self._unanswered.clear()
        yield start.meeting.come()
        if self.rank == 0:
            taken = self.spawn(start.coordinator.cut(start.step))
            if self.rules.taken_first:
                yield taken

    def header(self, shard: int, steps: Steps = NO_STEPS) -> Header:
        return Header(
            epoch=self.start.epoch,
            instance=self.start.instances[shard],
            rank=self.rank,
            steps=steps,
        )

    def rows_of(self, shard: int) -> list[int]:
        return dict(self._by_shard(range(NUM_ROWS)))[shard]

    def _by_shard(self, rows: Iterable[int]) -> list[tuple[int, list[int]]]:
        shards = SHARDS[len(self.start.addresses)]
        parts: list[list[int]] = [[] for _ in self.start.addresses]
        for row in rows:
            parts[shards[row]].append(row)
        return list(enumerate(parts))

    def _check(self, answer: Future) -> None:
        if answer.error:
            raise Failed(answer.error)
