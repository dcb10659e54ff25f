"""A case: a seed that decides trace, network, faults and launcher; run until all is trained."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.model.rules import ALL, Rules
from tests.model.shard import AnyShard, Server
from tests.model.sim import Failed, Network, Process, Sim, Wrong
from tests.model.traces import MAX_RANKS, MAX_SHARDS, run_of, trace
from tests.model.trainers import Start
from tests.model.world import World, naive_shard

LIMIT = 60_000.0
STUCK = 400.0  # without a step until the launcher loses patience
LABELS = (
    ("listed", 2), ("claimed", 3), ("fenced", 4), ("chosen", 3), ("begun", 4), ("opened", 3),
    ("step", 12), ("written", 150), ("flush", 6), ("cut", 4), ("taken", 6), ("all taken", 3),
    ("piece", 20), ("all written", 4), ("linked", 4), ("early", 3), ("manifest", 4),
    ("renamed", 4), ("told", 4), ("removed", 3), ("abandoned", 2),
)  # fmt: skip
KINDS = (
    *("kill", "stop", "full") * 6,
    *("alarm", "unreadable") * 3,
    "overwrite",
    "resize",
)  # fmt: skip
"""The points at which faults strike, and up to which occurrence."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens to a role when a point is passed for the n-th time."""

    label: str
    count: int
    role: str  # "rank 0", "oracle", "server 1", "folder", "launcher"
    kind: str  # one of KINDS
    lasts: float = 0.0


class Case:
    """One simulated run, disturbed by faults."""

    def __init__(
        self,
        seed: int,
        rules: Rules = ALL,
        *,
        num_traces: int = 40,
        faults: list[Fault] | None = None,
        make_shard: Callable[[World, int, int], AnyShard] = naive_shard,
    ) -> None:
        """`faults` are those of the seed, if none are given."""
        rng = random.Random(f"case {seed}")
        trace_seed = rng.randrange(num_traces)
        self.sim = Sim(rng.randrange(1 << 30))
        self.network = Network(
            self.sim, late=rng.choice((0.0, 0.01, 0.05)), lost=rng.choice((0.0, 0.0, 0.001, 0.003))
        )
        self.world = World(
            self.sim,
            self.network,
            rules,
            trace_seed=trace_seed,
            num_shards=rng.randint(1, MAX_SHARDS),
            cut_every=rng.randint(1, 4),
            make_shard=make_shard,
        )
        self._num_runs = self._num_starts = 0
        self._num_ranks = trace(trace_seed).num_ranks
        self._is_restarting = False
        self._seen = (-1, -1)
        self._haste = rng.choice((1.0, 5.0, 20.0))  # until the launcher notices
        self.faults = random_faults(rng, self) if faults is None else faults
        for fault in self.faults:
            strikes = self.sim.faults.setdefault((fault.label, fault.count), [])
            strikes.append(lambda fault=fault: self._strike(fault))
        self.start: Start
        self._begin_start()
        self._watch()

    def run(self) -> None:
        """Raises Wrong if anything is not as in an undisturbed run."""
        self.sim.run(LIMIT, lambda: self.start.is_saved)
        if not self.start.is_saved:
            raise Wrong(f"the run does not end: step {self.start.step} of start {self._num_starts}")
        self.sim.run(self.sim.now + 3 * STUCK)  # what zombies still do
        self._check_end()

    def _check_end(self) -> None:
        run = run_of(self.world.trace_seed, self._num_runs)
        newest = max(self.world.folder.checkpoints)
        if newest != run.trace.num_steps:
            raise Wrong(f"the newest checkpoint is of step {newest}")
        for number, address in enumerate(self.start.addresses):
            server = self.network.at[address]
            rows = self.start.ranks[0].rows_of(number)
            try:
                values = server.shard.fetch(self.start.ranks[0].header(number), rows)
            except Failed:  # it has been started again
                continue
            if values != [run.value(newest, row) for row in rows]:
                raise Wrong(f"shard {number} differs at the end")

    def _begin_start(self) -> None:
        self._is_restarting = False
        for number in range(len(self.world.addresses)):
            self._ensure_server(number)
        self._num_starts += 1
        run = run_of(self.world.trace_seed, self._num_runs)
        start = self.start = Start(self.world, self._num_starts, run, self._num_ranks)
        for process in start.processes:
            process.at_end.append(lambda: self._notice(start))

    def _ensure_server(self, number: int) -> None:
        """A dead server is started again at its address, a stopped one elsewhere.

        Sometimes an older one of the shard, which was given up and goes on, is taken again.
        """
        world, rng = self.world, self.sim.rng
        server = world.server(number)
        running = [
            address
            for address in world.known[number]
            if self.network.at[address].state == "running" and address != world.addresses[number]
        ]
        if running and rng.random() < 0.5:
            world.addresses[number] = rng.choice(running)
        elif server.state == "dead":
            world.serve(number, world.addresses[number])
        elif server.state == "stopped" and rng.random() < 0.7:
            world.serve(number, f"shard {number}, {server.name} replaced")

    def _notice(self, start: Start) -> None:
        if start is self.start and not self._is_restarting and not start.is_saved:
            self._is_restarting = True
            self.sim.after(self.sim.delay(self._haste), self._restart)

    def _restart(self) -> None:
        """Ends the processes of the start as far as the launcher reaches them."""
        rng = self.sim.rng
        reach = rng.choice((1.0, 1.0, 0.5, 0.0))
        for process in self.start.processes:
            if rng.random() < reach:
                process.kill("by the launcher")
            elif rng.random() < 0.3:
                self._stop(process, self.sim.delay(100.0))
        self.sim.after(self.sim.delay(self._haste / 2), self._begin_start)

    def _watch(self) -> None:
        seen = (self.world.progress, self._num_starts)
        if seen == self._seen:
            self._notice(self.start)
        self._seen = seen
        self.sim.after(STUCK, self._watch)

    def _stop(self, process: Process, lasts: float) -> None:
        process.stop()
        self.sim.after(lasts, process.go_on)

    def _strike(self, fault: Fault) -> None:
        if fault.kind == "alarm":
            self._notice(self.start)
        elif fault.kind == "resize":
            self.world.resize(self.sim.rng.randint(1, MAX_SHARDS))
            self._num_ranks = self.sim.rng.randint(1, MAX_RANKS)
            self._notice(self.start)
        elif fault.kind == "overwrite":
            self._num_runs += 1
            self._notice(self.start)
        elif fault.kind in ("full", "unreadable"):
            name, folder = self._role(fault.role).name, self.world.folder
            names = folder.full_for if fault.kind == "full" else folder.unreadable_for
            names.add(name)
            self.sim.after(fault.lasts, lambda: names.discard(name))
        elif fault.kind == "kill":
            self._role(fault.role).kill()
        else:
            self._stop(self._role(fault.role), fault.lasts)

    def _role(self, role: str) -> Process:
        kind, _, number = role.partition(" ")
        if kind == "oracle":
            return self.start.oracle
        if kind == "rank":
            return self.start.ranks[int(number) % len(self.start.ranks)]
        server: Server = self.world.server(int(number) % len(self.world.addresses))
        return server


def random_faults(rng: random.Random, case: Case) -> list[Fault]:
    """One to five faults; some strike two roles at once."""
    faults: list[Fault] = []
    for _ in range(rng.randint(1, 5)):
        label, most = rng.choice(LABELS)
        count = rng.randint(1, most)
        for _ in range(rng.choice((1, 1, 1, 2))):
            kind = rng.choice(KINDS)
            role = rng.choice(
                ("rank 0", "rank 0", "rank 1", "rank 2", "oracle", "server 0", "server 1")
            )
            lasts = rng.expovariate(1 / rng.choice((20.0, 200.0, 600.0)))
            faults.append(Fault(label=label, count=count, role=role, kind=kind, lasts=lasts))
    return faults


def first_wrong(seeds: range, rules: Rules = ALL, **options: Any) -> tuple[int, str] | None:
    """The first seed whose case goes wrong, and how."""
    for seed in seeds:
        try:
            Case(seed, rules, **options).run()
        except Wrong as wrong:
            return seed, str(wrong)
    return None
