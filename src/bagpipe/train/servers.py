"""A run's shard servers, as its trainers use them: found, begun and joined."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypeAlias

from bagpipe.checkpoint.checkpoints import SavedRun
from bagpipe.checkpoint.epochs import RunFolder, name_of_run
from bagpipe.config.run import RunConfig
from bagpipe.config.servers import ServersConfig
from bagpipe.distributed.served_tables import servers_of_hosts
from bagpipe.distributed.trainers import Trainers
from bagpipe.errors import ConfigError, StoreError
from bagpipe.server.client import ShardServers
from bagpipe.server.control import ServerControl
from bagpipe.server.credentials import Credentials, client_credentials
from bagpipe.server.shard import Checkpoint
from bagpipe.server.start import Served
from bagpipe.server.told import StartedServer
from bagpipe.store.base import EmbeddingStore
from bagpipe.train.start import Start
from bagpipe.types import Group


@dataclass(frozen=True, kw_only=True)
class Joined:
    """Shard servers that serve this trainer's epoch."""

    start: Start
    control: ServerControl
    stores: Sequence[EmbeddingStore]
    """Each group's store."""


Join: TypeAlias = Callable[[Sequence[Group]], AbstractContextManager[Joined]]


@contextmanager
def joined_servers(
    config: RunConfig,
    groups: Sequence[Group],
    *,
    claim: Callable[[], Start],
    trainers: Trainers,
    started: Sequence[StartedServer] = (),
) -> Iterator[Joined]:
    """Begins this start's epoch on all servers, and opens this rank's streams to them.

    All ranks must call it. Afterwards the servers hold the records of the start's checkpoint.

    Args:
        config: The run's. Where it has no addresses each host's trainers start one server there.
        groups: All groups of the run.
        claim: Claims the run's folder, once the servers are known to be those of this run.
        trainers: All ranks.
        started: The servers that the trainers' launcher has started, shard by shard.

    Raises:
        ConfigError: A secret is missing or open to others, or there are not as many shards as
            hosts where trainers start the servers.
        StoreError: A server does not answer, has other tables or another run's, or refuses the
            epoch.
    """
    where = config.servers or ServersConfig()
    addresses: Sequence[str] = where.addresses
    credentials: Credentials | Sequence[Credentials] = client_credentials(where)
    with ExitStack() as stack:
        if not addresses:
            started = started or _started(config, groups, where, trainers)
            for server in started:
                stack.enter_context(server.hold or nullcontext())
            addresses = [server.address for server in started]
            credentials = [server.credentials for server in started]

        def connect() -> ServerControl:
            control = ServerControl(
                addresses,
                groups,
                config.train.seed,
                credentials,
                timeout_s=where.timeout_s,
                start_timeout_s=where.start_timeout_s,
                begin_timeout_s=where.begin_timeout_s,
            )
            stack.enter_context(closing(control))
            if trainers.is_first:
                control.check_run(name_of_run(config.log.folder))
            return control

        control: ServerControl = trainers.all_get("shard servers to answer", connect, StoreError)
        start = claim()
        run, saved = start.folder, start.saved

        def begin() -> Sequence[str] | None:
            if not trainers.is_first:
                return None
            checkpoint = None if saved is None else _as_checkpoint(saved, run)
            num_ranks = trainers.peers.num_trainers
            return control.begin(run.epoch, num_ranks, checkpoint, run=run.identity)

        instances = trainers.all_do("shard servers to begin", begin, StoreError)[0]
        servers = ShardServers(control, groups, run.epoch, instances, rank=trainers.peers.rank)
        with closing(servers):
            yield Joined(start=start, control=control, stores=servers.stores)


def _started(
    config: RunConfig, groups: Sequence[Group], servers: ServersConfig, trainers: Trainers
) -> Sequence[StartedServer]:
    """One server a host, which lives as long as the process that started the trainers.

    A trainer alone, which nothing starts again, has one for itself, as long as it holds it.
    """
    peers = trainers.peers
    if servers.num_shards not in (None, peers.hosts.num_hosts):
        raise ConfigError(
            f"servers.num_shards = {servers.num_shards} without addresses: trainers start one "
            f"server on each of {peers.hosts.num_hosts} hosts: leave it out, or start servers with "
            "`bagpipe serve` and give their addresses"
        )
    served = Served(
        groups=tuple(groups),
        seed=config.train.seed,
        store=config.embeddings.store,
        servers=servers.model_copy(update={"num_shards": peers.hosts.num_hosts}),
        folder=config.log.folder,
    )
    if not peers.has_others:
        return servers_of_hosts(trainers, served, key=secrets.token_hex(16), lives_with=None)
    key = f"{os.getcwd()} {config.model_dump_json()}"
    return servers_of_hosts(trainers, served, key=key, lives_with=os.getppid())


def _as_checkpoint(saved: SavedRun, run: RunFolder) -> Checkpoint:
    return Checkpoint(
        name=saved.cut or saved.path.name,
        folder=saved.path.relative_to(run.path),  # which each server may see elsewhere
        files=tuple(tuple(files) for files in saved.record_files),
    )
