"""What all roles of a case share, and the comparison of each commit with an undisturbed run."""

from __future__ import annotations

from collections.abc import Callable

from tests.model.folder import Cut, Folder
from tests.model.rules import Rules
from tests.model.shard import AnyShard, Server, Shard
from tests.model.sim import Network, Sim, Wrong
from tests.model.traces import INITIAL, NUM_ROWS, run_of


class World:
    """Clock, network, servers and the run's folder."""

    def __init__(
        self,
        sim: Sim,
        network: Network,
        rules: Rules,
        *,
        trace_seed: int,
        num_shards: int,
        cut_every: int,
        make_shard: Callable[[World, int, int], AnyShard],
    ) -> None:
        """`make_shard(world, number, instance)` makes the shard of a new server."""
        self.sim, self.network, self.rules = sim, network, rules
        self.trace_seed, self.cut_every = trace_seed, cut_every
        self.folder = Folder(rules)
        self.folder.on_commit = self._check_commit
        self.progress = 0  # steps computed, by whomever
        self.run_of_folder, self.newest_commit = 0, -1
        self.newest_epoch = 0  # that has chosen its checkpoint
        self._num_instances = 0
        self._make_shard = make_shard
        self.resize(num_shards)

    def resize(self, num_shards: int) -> None:
        """From the next start on there are so many shards, all with new servers."""
        self.num_shards = num_shards
        self.addresses = [""] * num_shards
        self.known: list[list[str]] = [[] for _ in range(num_shards)]  # all addresses ever
        for number in range(num_shards):
            self.serve(number, f"shard {number} of {num_shards}, {self._num_instances}")

    def server(self, number: int) -> Server:
        """The newest one of a shard."""
        server: Server = self.network.at[self.addresses[number]]
        return server

    def serve(self, number: int, address: str) -> None:
        """Starts a server of a shard."""
        self._num_instances += 1
        shard = self._make_shard(self, number, self._num_instances)
        name = f"server {self._num_instances} of shard {number}"
        self.network.at[address] = Server(self.sim, name, self.folder, shard, self.rules)
        self.addresses[number] = address
        self.known[number].append(address)

    def _check_commit(self, cut: Cut) -> None:
        if cut.name[0] < self.newest_epoch:
            raise Wrong(f"commit of {cut.name} while epoch {self.newest_epoch} has begun")
        run = run_of(self.trace_seed, self.run_of_folder)
        found = cut.records()  # also rows that were flushed as they were initially
        for row in range(NUM_ROWS):
            value, expected = found.get(row, INITIAL), run.value(cut.step, row)
            if value != expected:
                raise Wrong(
                    f"commit of {cut.name}, step {cut.step}: row {row} is {value}, not {expected}"
                )
        if cut.dense != run.denses[cut.step]:
            raise Wrong(f"commit of {cut.name} at step {cut.step}: another dense state")
        self.newest_commit = max(self.newest_commit, cut.step)


def naive_shard(world: World, number: int, instance: int) -> AnyShard:
    return Shard(number=number, num_shards=world.num_shards, instance=instance, rules=world.rules)
