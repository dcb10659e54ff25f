"""From a run's configuration, or from tables, to a shard server that runs.

Where it is a configuration, tables, groups and shards follow from the file, as they do for
trainers; so both must be started from the same one. Nothing here loads torch.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import SecretStr

from bagpipe.config.run import MemoryStoreConfig, RunConfig, StoreConfig
from bagpipe.config.servers import ServersConfig, split_address
from bagpipe.config.tables import make_tables
from bagpipe.data import open_source
from bagpipe.errors import ConfigError, StoreError
from bagpipe.native.files import make_folder
from bagpipe.server.credentials import Credentials, server_credentials
from bagpipe.server.flight import ShardServer
from bagpipe.server.logins import Logins
from bagpipe.server.metrics import MetricsServer, ServerMetrics
from bagpipe.server.shard import Shard
from bagpipe.store import FileStore, MemoryStore
from bagpipe.store.array import ArrayStore
from bagpipe.store.cuts import CutStore
from bagpipe.types import Group, group_tables

Address = tuple[str, int]
"""A host and a port, 0: any that is free."""
_LOOPBACK = "127.0.0.1"
_WAIT_SHARE = 0.8
"""How long a server waits for a rank's writes, as a share of the time that a request may take.

The server then says whose writes did not come. A client that gave up first could not say it."""


@dataclass(frozen=True, kw_only=True)
class RunningShard:
    """A shard server that listens."""

    server: ShardServer
    address: str
    """What trainers connect to, "host:port"."""
    metrics_address: str | None
    """Where it tells its numbers, if it does."""
    credentials: Credentials


@dataclass(frozen=True, kw_only=True)
class Served:
    """What the shard servers of a run serve, and how."""

    groups: tuple[Group, ...]
    seed: int
    store: StoreConfig = field(default_factory=MemoryStoreConfig)
    """Behind each server."""
    servers: ServersConfig = field(default_factory=ServersConfig)
    folder: Path | None = None
    """The run's, outside of which servers touch no file; None: there are no checkpoints."""


@contextmanager
def running_shard(
    config: RunConfig, number: int, *, listen: Address | None = None, metrics: Address | None = None
) -> Iterator[RunningShard]:
    """As `serving`, from a run's configuration.

    Raises:
        DataError: The data do not say how large the tables are.
    """
    with serving(served_of(config), number, listen=listen, metrics=metrics) as running:
        yield running


def served_of(config: RunConfig) -> Served:
    """What the shard servers of a run's configuration serve.

    Raises:
        DataError: The data do not say how large the tables are.
    """
    return Served(
        groups=_groups(config),
        seed=config.train.seed,
        store=config.embeddings.store,
        servers=config.servers or ServersConfig(),
        folder=config.log.folder,
    )


@contextmanager
def serving(
    served: Served,
    number: int,
    *,
    listen: Address | None = None,
    name: str | None = None,
    metrics: Address | None = None,
    own_token: SecretStr | None = None,
) -> Iterator[RunningShard]:
    """Starts the server of one shard of every group; closes it at the end.

    Args:
        served: What it serves.
        number: Which shard, from 0 on.
        listen: Where; by default at its address in `servers.addresses`, or on loopback at any port
            that is free.
        name: By which others reach this host; by default its own.
        metrics: Where to tell numbers by HTTP; None: nowhere.
        own_token: What trainers show where the configuration has no token.

    Raises:
        ConfigError: There is no such shard; a secret is missing or open to others; the address is
            taken; or another server has the store's folder.
        StoreError: The memory or the folder can't be had.
    """
    servers = served.servers
    if not 0 <= number < servers.shards:
        raise ConfigError(
            f"--shard {number}: servers.num_shards or the addresses make {servers.shards} shards, "
            f"so it must be from 0 to {servers.shards - 1}"
        )
    known = servers.addresses[number] if servers.addresses else None
    host, port = listen or (split_address(known) if known else (_LOOPBACK, 0))
    credentials = server_credentials(servers, host)
    credentials = replace(credentials, token=credentials.token or own_token)
    metrics_credentials = None if metrics is None else server_credentials(servers, metrics[0])
    with ExitStack() as stack:
        make_store = stack.enter_context(_stores(served, number))
        stores = [CutStore(make_store(group)) for group in served.groups]
        shard = Shard(
            served.groups,
            served.seed,
            number,
            servers.shards,
            stores,
            wait_timeout_s=_WAIT_SHARE * servers.timeout_s,
        )
        logins = Logins(credentials.token)
        server = ShardServer(
            shard, host, port, credentials, logins, served.folder or Path(os.devnull)
        )
        stack.callback(server.close)
        metrics_address = None
        if metrics is not None:
            assert metrics_credentials is not None
            teller = MetricsServer(
                *metrics, ServerMetrics(shard, logins), metrics_credentials, logins
            )
            stack.enter_context(closing(teller))
            metrics_address = _address(metrics[0], teller.port, None)
        yield RunningShard(
            server=server,
            address=_address(host, server.port, name or (known and split_address(known)[0])),
            metrics_address=metrics_address,
            credentials=credentials,
        )


def _address(host: str, port: int, name: str | None) -> str:
    """What others connect to where a server listens at `host`, which may be all of a host's."""
    if host in ("0.0.0.0", "::"):
        host = name or socket.gethostname()
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _groups(config: RunConfig) -> tuple[Group, ...]:
    data = config.data
    if data.kind == "prepared":  # only how large tables are is asked for: no file is read for it
        data = data.model_copy(update={"verify": False})
    tables = make_tables(open_source(data, "train").features, config)
    return group_tables(tables, config.table_optimizer.build())


@contextmanager
def _stores(served: Served, number: int) -> Iterator[Callable[[Group], ArrayStore]]:
    """What makes an empty store of a group; holds the folder of file stores meanwhile."""
    seed, medium, num_shards = served.seed, served.store, served.servers.shards
    if medium.kind == "memory":
        yield lambda group: MemoryStore(group, seed, shard=number, num_shards=num_shards)
        return
    folder = medium.folder / f"shard-{number}-of-{num_shards}"
    with _held(folder):
        yield lambda group: FileStore(
            group,
            seed,
            folder / f"group-{group.index}",
            shard=number,
            num_shards=num_shards,
            existing="overwrite",
        )


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Makes a folder and holds it; the system lets go of it when the process ends.

    Raises:
        StoreError: It can't be written.
        ConfigError: Another process holds it.
    """
    try:
        make_folder(folder)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise StoreError(f"{folder}: can't be written: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"{folder}: another shard server has it: end that one first (kill -9 if it is "
                "stopped), or set another embeddings.store.folder"
            ) from error
        yield
