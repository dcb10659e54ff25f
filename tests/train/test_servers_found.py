"""Trainers whose file names no server share one that they start, and find it again."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.server.certificates import Files
from tests.train.ranks import run_ranks
from tests.train.runs import small_config

from bagpipe.config.run import RunConfig
from bagpipe.config.servers import ServersConfig, TlsConfig
from bagpipe.config.tables import make_tables
from bagpipe.data import open_source
from bagpipe.distributed.trainers import Trainers
from bagpipe.errors import ConfigError
from bagpipe.server.control import ServerControl
from bagpipe.train.servers import _started
from bagpipe.types import Group, group_tables


@pytest.fixture(autouse=True)
def launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What starts the ranks, which are threads here."""
    with subprocess.Popen(["sleep", "900"]) as process:
        monkeypatch.setattr(os, "getppid", lambda: process.pid)
        yield
        process.kill()


def started_for(config: RunConfig, servers: ServersConfig, trainers: Trainers) -> list[Any]:
    return [
        (each.address, each.credentials)
        for each in _started(config, groups_of(config), servers, trainers)
    ]


def groups_of(config: RunConfig) -> tuple[Group, ...]:
    tables = make_tables(open_source(config.data, "train").features, config)
    return group_tables(tables, config.table_optimizer.build())


def found_by(num_trainers: int, config: RunConfig, servers: ServersConfig, **of: Any) -> list[Any]:
    """By rank where the servers are, and what this rank shows them."""
    return run_ranks(
        num_trainers, lambda peers: started_for(config, servers, Trainers(peers)), **of
    )


def test_ranks_of_a_host_share_a_server_also_after_a_restart(tmp_path: Path) -> None:
    config, none = small_config(tmp_path), ServersConfig()
    first, second = found_by(2, config, none)
    assert first == second == found_by(2, config, none)[0]
    ((address, credentials),) = first
    assert address.startswith("127.0.0.1:")
    assert credentials.token is not None


def test_one_server_is_started_on_each_host(tmp_path: Path) -> None:
    config, servers = small_config(tmp_path), ServersConfig(num_shards=3)
    with pytest.raises(ConfigError, match=r"num_shards = 3 without addresses: .* each of 1 hosts"):
        started_for(config, servers, Trainers())


def is_known(name: str) -> bool:
    try:
        return bool(socket.getaddrinfo(name, None))
    except OSError:
        return False


def reach_all(config: RunConfig, found: list[Any]) -> None:
    """Refuses servers in another order, or of other tables."""
    addresses, credentials = zip(*found, strict=True)
    ServerControl(addresses, groups_of(config), config.train.seed, credentials).close()


def test_each_host_has_a_shard_which_all_ranks_reach_by_tls_and_with_a_token(
    tmp_path: Path,
) -> None:
    config = small_config(tmp_path)
    for found in found_by(3, config, ServersConfig(), num_hosts=2):
        assert len({address for address, _ in found}) == 2
        assert len({credentials.token for _, credentials in found}) == 2
        assert all(credentials.root is not None for _, credentials in found)
        reach_all(config, found)


@pytest.mark.skipif(not is_known(socket.gethostname()), reason="nobody knows this host's name")
def test_certificates_and_token_of_the_configuration_are_used(tmp_path: Path) -> None:
    files = Files(tmp_path / "certificates")
    chain, key = files.issue("host", socket.gethostname())
    tls = TlsConfig(root=files.root, certificate=chain, key=key)
    servers, config = ServersConfig(token_file=files.token, tls=tls), small_config(tmp_path)
    found, _ = found_by(2, config, servers, num_hosts=2)
    assert {credentials.root for _, credentials in found} == {files.root.read_bytes()}
    reach_all(config, found)
