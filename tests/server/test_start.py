"""A shard server from a configuration: what it serves, where, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.server.certificates import Files, has_ipv6
from tests.soon import SOON_S

from bagpipe.config.load import check_config
from bagpipe.config.run import RunConfig
from bagpipe.config.servers import split_address
from bagpipe.errors import BagpipeError
from bagpipe.server.start import running_shard


def config_of(folder: Path, **sections: Any) -> RunConfig:
    settings: dict[str, Any] = {
        "data": {"kind": "synthetic", "num_embeddings": [40, 300, 90]},
        "embeddings": {"embedding_dim": 64},
        "log": {"folder": str(folder / "run")},
        "train": {"seed": 5},
        "servers": {"num_shards": 3},
    }
    return check_config(RunConfig, settings | sections, source="run.toml")


def refused(config: RunConfig, number: int = 1, **places: Any) -> str:
    with pytest.raises(BagpipeError) as caught, running_shard(config, number, **places):
        pass
    return str(caught.value)


def test_it_has_the_groups_and_the_seed_of_the_run(tmp_path: Path) -> None:
    with running_shard(config_of(tmp_path), 2) as running:
        shard = running.server.shard
        assert (shard.number, shard.num_shards, shard.seed, shard.epoch) == (2, 3, 5, None)
        assert [group.num_rows for group in shard.groups] == [430]
        assert split_address(running.address) == ("127.0.0.1", running.server.port)
        assert running.metrics_address is None


def test_without_a_section_it_is_the_only_shard(tmp_path: Path) -> None:
    config = config_of(tmp_path).model_copy(update={"servers": None})
    with running_shard(config, 0) as running:
        assert running.server.shard.num_shards == 1


def test_it_listens_at_its_address_unless_told_otherwise(tmp_path: Path) -> None:
    # of a host at which no other test listens: nobody takes the port meanwhile
    with running_shard(config_of(tmp_path), 0, listen=("127.0.0.2", 0)) as other:
        taken = other.address
    config = config_of(tmp_path, servers={"addresses": ["192.0.2.1:7", taken]})
    with running_shard(config, 1) as running:
        assert running.address == taken
    with running_shard(config, 1, listen=("127.0.0.1", 0)) as running:
        assert running.address == f"127.0.0.1:{running.server.port}"


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")
def test_an_address_of_ipv6_has_brackets(tmp_path: Path) -> None:
    with running_shard(config_of(tmp_path), 1, listen=("::1", 0)) as running:
        assert running.address == f"[::1]:{running.server.port}"


def test_where_it_listens_everywhere_its_name_is_told(tmp_path: Path) -> None:
    files = Files(tmp_path / "certificates")
    chain, key = files.issue("host", "localhost")
    servers = {
        "addresses": ["trainers-know-it.example:7"],
        "token_file": str(files.token),
        "tls": {"root": str(files.root), "certificate": str(chain), "key": str(key)},
    }
    config = config_of(tmp_path, servers=servers)
    with running_shard(config, 0, listen=("0.0.0.0", 0)) as running:
        assert running.address == f"trainers-know-it.example:{running.server.port}"


def test_nobody_else_gets_the_folder_of_its_rows(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    store = {"kind": "file", "folder": str(folder)}
    config = config_of(tmp_path, embeddings={"embedding_dim": 64, "store": store})
    with running_shard(config, 1), running_shard(config, 2):
        told = refused(config, 1)
        assert f"{folder}/shard-1-of-3: another shard server has it" in told
        assert "kill -9" in told
    with running_shard(config, 1):
        found = {str(path.relative_to(folder)) for path in folder.glob("*/group-*")}
        assert found == {"shard-1-of-3/group-0", "shard-2-of-3/group-0"}


def test_nobody_else_gets_its_port(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    with running_shard(config, 1, metrics=("127.0.0.1", 0)) as running:
        place = split_address(running.address)
        assert f"port {place[1]}: another server is there" in refused(config, 1, listen=place)
        assert running.metrics_address is not None
        place = split_address(running.metrics_address)
        assert f"for metrics on {place[0]}, port {place[1]}" in refused(config, 1, metrics=place)


@pytest.mark.parametrize(
    ("sections", "number", "places", "fact"),
    [
        ({}, 3, {}, "--shard 3: servers.num_shards or the addresses make 3 shards"),
        ({}, 1, {"listen": ("0.0.0.0", 0)}, "on 0.0.0.0 can be reached from other hosts"),
        ({}, 1, {"metrics": ("0.0.0.0", 0)}, "on 0.0.0.0 can be reached from other hosts"),
        ({"servers": {"token_file": "/nowhere"}}, 0, {}, "servers.token_file = '/nowhere'"),
        ({"data": {"kind": "prepared", "folder": "nowhere"}}, 1, {}, "nowhere"),
        (
            {"embeddings": {"store": {"kind": "file", "folder": "/proc/nowhere"}}},
            1,
            {},
            "/proc/nowhere/shard-1-of-3: can't be written",
        ),
    ],
)
def test_a_mistake_is_told(
    tmp_path: Path, sections: dict[str, Any], number: int, places: dict[str, Any], fact: str
) -> None:
    assert fact in refused(config_of(tmp_path, **sections), number, **places)


def test_nothing_of_it_loads_torch() -> None:
    code = "import sys, bagpipe.server.start, bagpipe.cli.serve; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=SOON_S)
