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
from bagpipe.types import group_tables


@pytest.fixture(autouse=True)
def launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What starts the ranks, which are threads here."""
    with subprocess.Popen(["sleep", "900"]) as process:
        monkeypatch.setattr(os, "getppid", lambda: process.pid)
        yield
        process.kill()


def found_by(num_trainers: int, config: RunConfig, servers: ServersConfig, **of: Any) -> list[Any]:
    """By rank the addresses of the servers, and what this rank shows them."""
    return run_ranks(num_trainers, lambda peers: _started(config, servers, Trainers(peers)), **of)


def test_ranks_of_a_host_share_a_server_also_after_a_restart(tmp_path: Path) -> None:
    config, none = small_config(tmp_path), ServersConfig()
    first, second = found_by(2, config, none)
    assert first == second == found_by(2, config, none)[0]
    (address,), credentials = first
    assert address.startswith("127.0.0.1:")
    assert credentials.token is not None


def test_one_server_is_started_on_each_host(tmp_path: Path) -> None:
    config, servers = small_config(tmp_path), ServersConfig(num_shards=3)
    with pytest.raises(ConfigError, match=r"num_shards = 3 without addresses: .* each of 1 hosts"):
        _started(config, servers, Trainers())


def test_hosts_speak_to_each_others_servers_only_with_tls_and_a_token(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0 can be reached from other hosts, so it ne"):
        found_by(2, small_config(tmp_path), ServersConfig(), num_hosts=2)


def is_known(name: str) -> bool:
    try:
        return bool(socket.getaddrinfo(name, None))
    except OSError:
        return False


@pytest.mark.skipif(not is_known(socket.gethostname()), reason="nobody knows this host's name")
def test_each_host_has_a_shard_and_all_ranks_reach_both(tmp_path: Path) -> None:
    files = Files(tmp_path / "certificates")
    chain, key = files.issue("host", socket.gethostname())
    tls = TlsConfig(root=files.root, certificate=chain, key=key)
    servers = ServersConfig(token_file=files.token, tls=tls)
    config = small_config(tmp_path)
    tables = make_tables(open_source(config.data, "train").features, config)
    groups = group_tables(tables, config.embeddings.optimizer.build())
    for addresses, credentials in found_by(4, config, servers, num_hosts=2):
        # refuses servers in another order, or of other tables
        ServerControl(addresses, groups, config.train.seed, credentials).close()
        assert len(addresses) == 2
