"""A trainer's client over TLS, with a token: the same rows, and refusals that say what to set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest
from pydantic import SecretStr
from tests.server.certificates import TOKEN, Files
from tests.server.shards import make_shard
from tests.soon import TIMEOUT_S
from tests.store_contract import SEED, fetch, make_group, records_of, rows_of

from bagpipe.errors import StoreError
from bagpipe.server.client import ShardServers
from bagpipe.server.control import ServerControl
from bagpipe.server.credentials import Credentials, client_credentials, server_credentials
from bagpipe.server.flight import ShardServer
from bagpipe.server.shard import Checkpoint


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("certificates"))


@contextmanager
def serving(files: Files, num_shards: int = 1, *, mutual: bool = False) -> Iterator[list[str]]:
    """Servers, and their addresses."""
    credentials = server_credentials(files.config(mutual=mutual), "127.0.0.1")
    shards = [make_shard(number, num_shards) for number in range(num_shards)]
    servers = [ShardServer(shard, credentials=credentials) for shard in shards]
    try:
        yield [f"localhost:{server.port}" for server in servers]
    finally:
        for server in servers:
            server.close()


def connected(addresses: list[str], credentials: Credentials) -> ServerControl:
    return ServerControl(addresses, [make_group()], SEED, credentials, start_timeout_s=TIMEOUT_S)


@pytest.mark.parametrize("mutual", [False, True])
def test_rows_are_the_same_behind_tls_and_a_token(files: Files, mutual: bool) -> None:
    credentials = client_credentials(files.config(mutual=mutual))
    with (
        serving(files, 2, mutual=mutual) as addresses,
        closing(connected(addresses, credentials)) as control,
        closing(ShardServers(control, [make_group()], 1, control.begin(1, 1), rank=0)) as servers,
    ):
        store, rows = servers.stores[0], rows_of(*range(0, 1_000, 7))
        store.write(rows, records_of(rows))
        np.testing.assert_array_equal(fetch(store, rows), records_of(rows))


@pytest.mark.parametrize(
    ("wrong", "fact"),
    [
        ("token", "the token is wrong"),
        ("no token", "a token is wanted: set it in servers.token_file"),
        ("root", "its certificate was not signed by servers.tls.root of this host"),
        ("no TLS", "it has closed the connection: it may want TLS"),
    ],
)
def test_who_is_refused_is_told_by_whom_and_what_to_set(
    files: Files, tmp_path: Path, wrong: str, fact: str
) -> None:
    root = files.root.read_bytes()
    credentials = {
        "token": Credentials(token=SecretStr("wrong" * 4), root=root),
        "no token": Credentials(root=root),
        "root": Credentials(token=SecretStr(TOKEN), root=Files(tmp_path).root.read_bytes()),
        "no TLS": Credentials(token=SecretStr(TOKEN)),
    }[wrong]
    with serving(files) as addresses, pytest.raises(StoreError) as caught:
        connected(addresses, credentials)
    assert f"shard server 0 of 1 at {addresses[0]} failed in call identify: {fact}" in str(
        caught.value
    )
    assert TOKEN not in str(caught.value)


def test_each_host_may_see_the_runs_folder_elsewhere(tmp_path: Path) -> None:
    """Only the place within it travels: the trainer's folder is one that no server can see."""
    there, here = tmp_path / "server" / "run", tmp_path / "trainer" / "run"
    unfinished, step = "epochs/1/cuts/1", "checkpoints/step-1"
    (there / unfinished).mkdir(parents=True)
    rows = rows_of(1, 2, 3)
    with started(there, here) as (control, begin), begin(1, None) as servers:
        servers.stores[0].write(rows, records_of(rows))
        (files,) = control.cut(1, here / unfinished)()
    (there / "checkpoints").mkdir()
    (there / unfinished).rename(there / step)
    checkpoint = Checkpoint(name="1.1", folder=here / step, files=(files,))
    with started(there, here) as (_, begin), begin(2, checkpoint) as servers:
        np.testing.assert_array_equal(fetch(servers.stores[0], rows), records_of(rows))


Begin: TypeAlias = Callable[[int, Checkpoint | None], AbstractContextManager[ShardServers]]


@contextmanager
def started(there: Path, here: Path) -> Iterator[tuple[ServerControl, Begin]]:
    """A new server that sees the run's folder `there`, and a trainer who sees it `here`."""
    groups = [make_group()]
    with (
        closing(ShardServer(make_shard(), run_folder=there)) as server,
        closing(
            ServerControl([f"localhost:{server.port}"], groups, SEED, run_folder=here)
        ) as control,
    ):

        def begin(epoch: int, checkpoint: Checkpoint | None) -> closing[ShardServers]:
            instances = control.begin(epoch, 1, checkpoint)
            return closing(ShardServers(control, groups, epoch, instances, rank=0))

        yield control, begin
