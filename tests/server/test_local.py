"""The server that trainers start on their host: one for all of them, which they find again."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.flight as flight
import pytest
from tests.soon import SOON_S

from bagpipe.config.load import check_config
from bagpipe.config.run import RunConfig
from bagpipe.config.servers import split_address
from bagpipe.errors import ConfigError, StoreError
from bagpipe.server import local
from bagpipe.server.credentials import Credentials
from bagpipe.server.local import LocalServer, local_server
from bagpipe.server.security import connect
from bagpipe.server.staging import peer_of

WITHIN_S = SOON_S
OTHER_USER = 4321
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")


def config_of(folder: Path, **servers: Any) -> RunConfig:
    settings = {
        "data": {"kind": "synthetic", "num_embeddings": [40, 300, 90]},
        "log": {"folder": str(folder / "run")},
        "servers": {"num_shards": 2} | servers,
    }
    return check_config(RunConfig, settings, source="run.toml")


@pytest.fixture
def agent() -> Iterator[subprocess.Popen[bytes]]:
    """The process that started the trainers."""
    with subprocess.Popen(["sleep", "900"]) as process:
        yield process
        process.kill()


def identity(server: LocalServer) -> dict[str, Any]:
    options = flight.FlightCallOptions(timeout=WITHIN_S)
    with connect(*split_address(server.address), server.credentials) as client:
        (answer,) = client.do_action(flight.Action("identify", b"{}"), options)
        found: dict[str, Any] = json.loads(answer.body.to_pybytes())
        return found


def process_of(config: RunConfig, number: int, agent: subprocess.Popen[bytes]) -> int:
    """The server's process, as the system tells it."""
    name = local._name(config.model_dump(mode="json"), number, agent.pid)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asking:
        asking.connect(f"\0{name}")
        return peer_of(asking)[0]


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_until_gone(pid: int) -> None:
    wait_until(lambda: not Path(f"/proc/{pid}").exists())


def test_all_trainers_find_one_server_also_after_a_restart_until_their_agent_ends(
    tmp_path: Path, agent: subprocess.Popen[bytes]
) -> None:
    config = config_of(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        ranks = [pool.submit(local_server, config, 1, lives_with=agent.pid) for _ in range(4)]
        servers = [rank.result(WITHIN_S) for rank in ranks]
    again = local_server(config, 1, lives_with=agent.pid)
    assert servers == [again] * 4
    assert (identity(again)["shard"], identity(again)["num_shards"]) == (1, 2)
    pid = process_of(config, 1, agent)
    agent.kill()
    agent.wait()
    wait_until_gone(pid)
    with pytest.raises(StoreError, match=f"process {agent.pid}, with which .* is gone"):
        local_server(config, 1, lives_with=agent.pid)


def test_its_token_is_known_to_its_trainers_only(
    tmp_path: Path, agent: subprocess.Popen[bytes]
) -> None:
    config = config_of(tmp_path)
    server = local_server(config, 0, lives_with=agent.pid)
    token = server.credentials.token
    assert token is not None
    assert len(token.get_secret_value()) == 64
    options = flight.FlightCallOptions(timeout=WITHIN_S)
    with connect(*split_address(server.address), Credentials()) as client:
        with pytest.raises(flight.FlightUnauthenticatedError):
            list(client.do_action(flight.Action("identify", b"{}"), options))
    proc = Path(f"/proc/{process_of(config, 0, agent)}")
    for shown in ("cmdline", "environ"):
        assert token.get_secret_value() not in (proc / shown).read_text()
    if os.geteuid() == 0:
        assert asked_by_another_user(config, agent) == "b''\n"


def asked_by_another_user(config: RunConfig, agent: subprocess.Popen[bytes]) -> str:
    """What a process of another user is told."""
    name = local._name(config.model_dump(mode="json"), 0, agent.pid)
    code = (
        "import os, socket, sys; os.setuid(int(sys.argv[2]));"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET);"
        "s.connect('\\0' + sys.argv[1]); print(s.recv(9999))"
    )
    return subprocess.run(
        [sys.executable, "-c", code, name, str(OTHER_USER)],
        capture_output=True,
        text=True,
        check=True,
        timeout=WITHIN_S,
    ).stdout


def test_another_run_shard_or_agent_has_a_server_of_its_own(
    tmp_path: Path, agent: subprocess.Popen[bytes]
) -> None:
    run, other = (
        config_of(folder).model_dump(mode="json") for folder in (tmp_path, tmp_path / "other")
    )
    names = [local._name(*of) for of in ((run, 0, agent.pid), (run, 1, agent.pid))]
    names += [local._name(*of) for of in ((other, 0, agent.pid), (run, 0, os.getpid()))]
    assert len(set(names)) == 4
    assert max(map(len, names)) <= 107  # the longest that a Unix socket takes


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
def test_one_that_was_killed_or_stopped_is_replaced(
    tmp_path: Path, agent: subprocess.Popen[bytes], end: signal.Signals
) -> None:
    slow = config_of(tmp_path)
    # as patient as a busy machine needs where a server starts, not where a stopped one is asked
    before = local_server(slow, 0, lives_with=agent.pid)
    instance, pid = identity(before)["instance"], process_of(slow, 0, agent)
    os.kill(pid, end)
    try:
        if end == signal.SIGSTOP:
            wait_until(lambda: "State:\tT" in Path(f"/proc/{pid}/status").read_text())
            name = local._name(slow.model_dump(mode="json"), 0, agent.pid)
            assert local._ask(name, timeout_s=0.2) is None
        wait_until_gone(pid)
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    after = local_server(slow, 0, lives_with=agent.pid)
    assert identity(after)["instance"] != instance


def test_what_it_refuses_is_told(tmp_path: Path, agent: subprocess.Popen[bytes]) -> None:
    config = config_of(tmp_path)
    told = r"shard server 0 of this host: a shard server on 0\.0\.0\.0 can be reached from other"
    with pytest.raises(ConfigError, match=told):
        local_server(config, 0, lives_with=agent.pid, listen=("0.0.0.0", 0))


def test_one_that_can_not_be_started_is_told(
    tmp_path: Path, agent: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(StoreError, match="shard server 0 of this host could not be started"):
        local_server(config_of(tmp_path), 0, lives_with=agent.pid)


@needs_root
def test_another_user_can_not_pass_as_the_server(
    tmp_path: Path, agent: subprocess.Popen[bytes]
) -> None:
    config = config_of(tmp_path)
    name = local._name(config.model_dump(mode="json"), 0, agent.pid)
    code = (
        "import os, socket, sys; os.setuid(int(sys.argv[2]));"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET);"
        "s.bind('\\0' + sys.argv[1]); s.listen(); print('ready', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, name, str(OTHER_USER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"ready\n"
        with pytest.raises(StoreError, match=f"process {other.pid} of user {OTHER_USER}"):
            local_server(config, 0, lives_with=agent.pid)
        other.kill()
