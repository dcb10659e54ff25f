"""The section of shard servers: what it takes, and what its mistakes say."""

from __future__ import annotations

from pathlib import Path

import pytest

from bagpipe.config.load import load_config
from bagpipe.config.run import RunConfig
from bagpipe.config.servers import ServersConfig, split_address
from bagpipe.errors import ConfigError
from bagpipe.train.settings import describe_run

RUN = '[data]\nkind = "synthetic"\n[log]\nfolder = "x"\n[servers]\n'


def loaded(folder: Path, text: str) -> ServersConfig:
    path = folder / "run.toml"
    path.write_text(RUN + text)
    servers = load_config(RunConfig, path).servers
    assert servers is not None
    return servers


def test_an_empty_section_is_one_server(tmp_path: Path) -> None:
    servers = loaded(tmp_path, "")
    assert (servers.shards, servers.addresses, servers.tls) == (1, (), None)


def test_addresses_count_the_shards(tmp_path: Path) -> None:
    text = 'addresses = ["a.example:7", "[2001:db8::1]:7", "10.0.0.1:8"]'
    assert loaded(tmp_path, text).shards == 3
    assert loaded(tmp_path, f"num_shards = 3\n{text}").shards == 3
    assert loaded(tmp_path, "num_shards = 7").shards == 7


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("num_shards = 0", "servers.num_shards = 0: input should be greater than or equal to 1"),
        ("num_shards = 1025", "servers.num_shards = 1025: input should be less than or equal"),
        ('num_shards = 3\naddresses = ["a:1"]', "num_shards = 3 and 1 addresses"),
        ('addresses = ["a"]', "servers.addresses[0]: 'a' is no address: must be \"host:port\""),
        ('addresses = ["a:1", "b:70000"]', "servers.addresses[1]: 'b:70000' is no address"),
        ('addresses = ["a:0"]', "can't find a server at port 0"),
        ('addresses = ["grpc://a:1"]', "is no address"),
        ('addresses = ["2001:db8::1:7"]', "is no address"),
        ('addresses = ["a:1", "a:1"]', "'a:1' is given to more than one shard"),
        ('token_file = "x"\ntoken_variable = "Y"', "token_file and token_variable are both given"),
        ('token_variable = "a b"', "servers.token_variable"),
        ('token = "secret"', "servers.token: unknown key in [servers]; did you mean 'token_file'"),
        ('tls = {certificate = "x", key = "y"}', "servers.tls.root: is missing"),
        ('tls = {root = "x", key = "y"}', "certificate and key belong together"),
        ('tls = {root = "x", mutual = true}', "mutual = true needs certificate and key"),
        ("timeout_s = 0", "servers.timeout_s = 0: input should be greater than 0"),
        ("begin_timeout_s = -1", "servers.begin_timeout_s = -1: input should be greater than 0"),
        ("start_timeout_s = 1e9", "servers.start_timeout_s = 1000000000.0: input should be less"),
        ("shards = 3", "servers.shards: unknown key in [servers]"),
    ],
)
def test_a_mistake_is_told_by_its_key(tmp_path: Path, text: str, fact: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, text)
    assert fact in str(caught.value)


def test_where_the_tables_are_is_not_remembered(tmp_path: Path) -> None:
    """So that a checkpoint holds no names of secrets, and other servers may go on with it."""
    path = tmp_path / "run.toml"
    path.write_text(RUN + 'token_file = "x"')
    assert "servers" not in describe_run(load_config(RunConfig, path))


def test_an_address_is_a_host_and_a_port() -> None:
    assert split_address("[2001:db8::1]:7") == ("2001:db8::1", 7)
    assert split_address("host-1.example:65535") == ("host-1.example", 65_535)
    with pytest.raises(ValueError, match="is no address"):
        split_address("host:65536")
