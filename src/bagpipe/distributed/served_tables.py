"""Tables of several trainers with shard servers that the trainers start: one on each host.

The first rank of a host starts its server, and the others find it. Where there are several hosts,
each has a shard, and what its trainers show it is told to all ranks by torch.distributed.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from functools import partial
from typing import Any

from bagpipe.config.servers import ServersConfig
from bagpipe.distributed.communicator import Communicator, SharedTables
from bagpipe.distributed.trainers import Trainers
from bagpipe.errors import StoreError
from bagpipe.server.client import ShardServers
from bagpipe.server.control import ServerControl
from bagpipe.server.local import local_server
from bagpipe.server.start import Served
from bagpipe.server.told import StartedServer, ToldServer
from bagpipe.store.base import OrderedStore
from bagpipe.types import Group

_MOST_SECONDS = 86_400.0
"""That a server's limits take."""


def servers_of_hosts(
    trainers: Trainers, served: Served, *, key: str, lives_with: int | None
) -> tuple[StartedServer, ...]:
    """One server a host, started there unless it still runs: where they are, and what to show.

    All ranks must call it.

    Args:
        trainers: All ranks.
        served: What the servers serve, as many shards as hosts.
        key: See `local_server`; the same on all ranks of a host.
        lives_with: See `local_server`; a process of this host.

    Raises:
        ConfigError, StoreError: As for `local_server`, on all ranks.
    """
    peers, found = trainers.peers, list[StartedServer]()

    def find(*, is_first: bool) -> dict[str, Any] | None:
        if peers.hosts.is_first != is_first:
            return None
        listen = ("127.0.0.1" if peers.hosts.num_hosts == 1 else "0.0.0.0", 0)
        found.append(
            local_server(served, peers.hosts.own, key=key, lives_with=lives_with, listen=listen)
        )
        return asdict(found[0].told()) if peers.hosts.num_hosts > 1 else {}

    # first who may have to start one: a process for each rank would be too much for its host
    what = "the shard servers of all hosts"
    told = trainers.all_do(what, partial(find, is_first=True), StoreError)
    trainers.all_do(what, partial(find, is_first=False), StoreError)
    (own,) = found
    return tuple(
        own if host == peers.hosts.own else ToldServer(**each).started(served.servers)
        for host, each in enumerate(each for each in told if each is not None)
    )


class ServedTables:
    """Tables that live as long as trainers of their hosts have them open.

    Attributes:
        stores: One `RemoteStore` a group.
        holds: Connections that hold this host's server.
    """

    def __init__(self, peers: Communicator, groups: Sequence[Group], seed: int) -> None:
        """Starts the servers, and opens this rank's streams to them; all ranks must call it.

        Raises:
            StoreError: A server can't be started, or does not answer.
        """
        trainers = Trainers(peers)
        timeout_s = min(peers.timeout.total_seconds(), _MOST_SECONDS)
        name = secrets.token_hex(16) if peers.hosts.is_first else None
        key = peers.share_text("the name of the tables' server", name)
        settings = ServersConfig(
            num_shards=peers.hosts.num_hosts, timeout_s=timeout_s, start_timeout_s=timeout_s
        )
        served = Served(groups=tuple(groups), seed=seed, servers=settings)
        with ExitStack() as stack:
            servers = servers_of_hosts(trainers, served, key=key, lives_with=None)
            self.holds = [server.hold for server in servers if server.hold is not None]
            for hold in self.holds:
                stack.enter_context(hold)
            control = ServerControl(
                [server.address for server in servers],
                groups,
                seed,
                [server.credentials for server in servers],
                timeout_s=timeout_s,
                start_timeout_s=timeout_s,
            )
            stack.enter_context(closing(control))

            def begin() -> Sequence[str] | None:
                return control.begin(1, peers.num_trainers) if peers.rank == 0 else None

            instances = trainers.all_do("shard servers to begin", begin, StoreError)[0]
            own = stack.enter_context(ShardServers(control, groups, 1, instances, rank=peers.rank))
            self.stores: Sequence[OrderedStore] = own.stores
            self._open, self._pid = stack.pop_all(), os.getpid()

    def close(self) -> None:
        """See `SharedTables.close`. A forked child leaves its parent's connections alone."""
        if os.getpid() == self._pid:
            self._open.close()


def open_tables(peers: Communicator, groups: Sequence[Group], seed: int) -> SharedTables:
    """New tables of trainers, which all must open: by their own way, or with servers."""
    return (peers.open_tables or ServedTables)(peers, groups, seed)
