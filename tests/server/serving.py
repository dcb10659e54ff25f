"""Shard servers in this process, and trainers' clients of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeAlias

from tests.soon import TIMEOUT_S

from bagpipe.server.client import RemoteStore, ShardServers
from bagpipe.server.control import ServerControl
from bagpipe.server.flight import ShardServer
from bagpipe.server.shard import Shard
from bagpipe.store import FileStore, MemoryStore
from bagpipe.store.array import ArrayStore
from bagpipe.store.cuts import CutStore
from bagpipe.types import Group

MakeStore: TypeAlias = Callable[[Group, int, int, int], ArrayStore]


def in_memory(group: Group, seed: int, shard: int, num_shards: int) -> ArrayStore:
    return MemoryStore(group, seed, shard=shard, num_shards=num_shards)


def in_files(folder: Path) -> MakeStore:
    def make(group: Group, seed: int, shard: int, num_shards: int) -> ArrayStore:
        place = folder / f"{abs(hash((repr(group), seed)))}-{shard}-{num_shards}"
        return FileStore(
            group, seed, place, shard=shard, num_shards=num_shards, existing="overwrite"
        )

    return make


class Servers:
    """Servers of all shards of some groups, and epochs on them."""

    def __init__(
        self,
        groups: Sequence[Group],
        seed: int,
        num_shards: int,
        make: MakeStore = in_memory,
        *,
        wait_timeout_s: float = TIMEOUT_S,
        timeout_s: float = TIMEOUT_S,
        staging: bool = True,
    ) -> None:
        self.staging = staging
        self.groups, self.seed, self.epoch = tuple(groups), seed, 0
        self.servers: list[ShardServer] = []
        for number in range(num_shards):
            stores = [CutStore(make(group, seed, number, num_shards)) for group in groups]
            self.servers.append(
                ShardServer(
                    Shard(groups, seed, number, num_shards, stores, wait_timeout_s=wait_timeout_s)
                )
            )
        self.control = self.connect(timeout_s)
        self.clients: list[ShardServers] = []

    @property
    def addresses(self) -> list[str]:
        return [f"127.0.0.1:{server.port}" for server in self.servers]

    def connect(self, timeout_s: float = TIMEOUT_S) -> ServerControl:
        return ServerControl(
            self.addresses, self.groups, self.seed, timeout_s=timeout_s, start_timeout_s=TIMEOUT_S
        )

    def start(self, num_ranks: int = 1) -> list[ShardServers]:
        """A new epoch from nothing, and a client of each rank."""
        self.epoch += 1
        instances = self.control.begin(self.epoch, num_ranks)
        made = [
            ShardServers(
                self.control, self.groups, self.epoch, instances, rank=rank, staging=self.staging
            )
            for rank in range(num_ranks)
        ]
        self.clients += made
        return made

    def store(self) -> RemoteStore:
        """The first group's, in a new epoch."""
        self.end_clients()
        return self.start()[0].stores[0]

    def end_clients(self) -> None:
        while self.clients:
            self.clients.pop().close()

    def close(self) -> None:
        self.end_clients()
        self.control.close()
        for server in self.servers:
            server.close()


@contextmanager
def pool_of_servers(
    num_shards: int, make: MakeStore = in_memory, *, staging: bool = True
) -> Iterator[Callable[[Group, int], RemoteStore]]:
    """Makes stores; the same tables have the same servers."""
    made: dict[str, Servers] = {}
    with ExitStack() as stack:

        def store(group: Group, seed: int) -> RemoteStore:
            key = repr((group, seed))
            if key not in made:
                made[key] = Servers([group], seed, num_shards, make, staging=staging)
                stack.callback(made[key].close)
            return made[key].store()

        yield store
