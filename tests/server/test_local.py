"""The server that trainers start on their host: one for all of them, which they find again."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.flight as flight
import pytest
from tests.processes import is_alive
from tests.soon import SOON_S, TIMEOUT_S, wait_until

from bagpipe.config.servers import ServersConfig, split_address
from bagpipe.errors import ConfigError, StoreError
from bagpipe.optimizers import SGD
from bagpipe.server import local
from bagpipe.server.credentials import Credentials
from bagpipe.server.local import local_server
from bagpipe.server.made import with_secrets
from bagpipe.server.security import connect
from bagpipe.server.staging import peer_of
from bagpipe.server.start import Served
from bagpipe.server.told import StartedServer
from bagpipe.types import TableConfig, group_tables

WITHIN_S = SOON_S
OTHER_USER = 4321
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")


def served_by(*, num_shards: int = 2, **servers: Any) -> Served:
    tables = [TableConfig(name="t", num_embeddings=300, embedding_dim=4, feature_names=["f"])]
    groups = group_tables(tables, SGD(lr=0.1))
    return Served(groups=groups, seed=1, servers=ServersConfig(num_shards=num_shards, **servers))


SERVED, KEY = served_by(start_timeout_s=TIMEOUT_S), "the run"


def started_by(agent: subprocess.Popen[bytes], number: int = 0, **options: Any) -> StartedServer:
    return local_server(SERVED, number, key=KEY, lives_with=agent.pid, **options)


@pytest.fixture
def agent() -> Iterator[subprocess.Popen[bytes]]:
    """The process that started the trainers."""
    with subprocess.Popen(["sleep", "900"]) as process:
        yield process
        process.kill()


def identity(server: StartedServer) -> dict[str, Any]:
    options = flight.FlightCallOptions(timeout=WITHIN_S)
    with connect(*split_address(server.address), server.credentials) as client:
        (answer,) = client.do_action(flight.Action("identify", b"{}"), options)
        found: dict[str, Any] = json.loads(answer.body.to_pybytes())
        return found


def process_of(number: int, agent: subprocess.Popen[bytes]) -> int:
    """The server's process, as the system tells it."""
    name = local._name(KEY, number, agent.pid)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asking:
        asking.connect(f"\0{name}")
        return peer_of(asking)[0]


def wait_until_gone(pid: int) -> None:
    wait_until(lambda: not is_alive(pid))


def test_all_trainers_find_one_server_also_after_a_restart_until_their_agent_ends(
    agent: subprocess.Popen[bytes],
) -> None:
    with ThreadPoolExecutor(4) as pool:
        ranks = [pool.submit(started_by, agent, 1) for _ in range(4)]
        servers = [rank.result(WITHIN_S) for rank in ranks]
    again = started_by(agent, 1)
    assert servers == [again] * 4
    assert (identity(again)["shard"], identity(again)["num_shards"]) == (1, 2)
    pid = process_of(1, agent)
    agent.kill()
    agent.wait()
    wait_until_gone(pid)
    with pytest.raises(StoreError, match=f"process {agent.pid}, with which .* is gone"):
        started_by(agent, 1)


def test_its_token_is_known_to_its_trainers_only(
    agent: subprocess.Popen[bytes],
) -> None:
    server = started_by(agent)
    token = server.credentials.token
    assert token is not None
    assert len(token.get_secret_value()) == 64
    options = flight.FlightCallOptions(timeout=WITHIN_S)
    with connect(*split_address(server.address), Credentials()) as client:
        with pytest.raises(flight.FlightUnauthenticatedError):
            list(client.do_action(flight.Action("identify", b"{}"), options))
    proc = Path(f"/proc/{process_of(0, agent)}")
    for shown in ("cmdline", "environ"):
        assert token.get_secret_value() not in (proc / shown).read_text()
    if os.geteuid() == 0:
        assert asked_by_another_user(agent) == "b''\n"


def asked_by_another_user(agent: subprocess.Popen[bytes]) -> str:
    """What a process of another user is told."""
    name = local._name(KEY, 0, agent.pid)
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
    names = [local._name(*of) for of in ((KEY, 0, agent.pid), (KEY, 1, agent.pid))]
    names += [local._name(*of) for of in (("another", 0, agent.pid), (KEY, 0, os.getpid()))]
    assert len(set(names)) == 4
    assert max(map(len, names)) <= 107  # the longest that a Unix socket takes


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
def test_one_that_was_killed_or_stopped_is_replaced(
    agent: subprocess.Popen[bytes], end: signal.Signals
) -> None:
    # as patient as a busy machine needs where a server starts, not where a stopped one is asked
    before = started_by(agent)
    instance, pid = identity(before)["instance"], process_of(0, agent)
    os.kill(pid, end)
    try:
        if end == signal.SIGSTOP:
            wait_until(lambda: "State:\tT" in Path(f"/proc/{pid}/status").read_text())
            name = local._name(KEY, 0, agent.pid)
            assert local._ask(name, timeout_s=0.2) is None
        wait_until_gone(pid)
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    after = started_by(agent)
    assert identity(after)["instance"] != instance


def test_one_that_does_not_answer_may_be_gone_by_then() -> None:
    """As one that another trainer has killed; here somebody else has its socket."""
    name = f"bagpipe-test-{secrets.token_hex(8)}"
    code = (
        "import socket, subprocess, sys;"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET);"
        "s.bind('\\0' + sys.argv[1]); s.listen();"
        "print(subprocess.Popen(['sleep', '900'], stdout=2, pass_fds=[s.fileno()]).pid)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, name], stdout=subprocess.PIPE, check=True, timeout=WITHIN_S
    )
    try:
        assert local._ask(name, timeout_s=0.2) is None
    finally:
        os.kill(int(ended.stdout), signal.SIGKILL)


def test_what_it_refuses_is_told(agent: subprocess.Popen[bytes]) -> None:
    with pytest.raises(ConfigError, match=r"shard server 2 of this host: .* must be from 0 to 1"):
        started_by(agent, 2)


def test_one_that_can_not_be_started_is_told(
    agent: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(StoreError, match="shard server 0 of this host could not be started"):
        started_by(agent)


def test_one_that_is_held_ends_with_the_last_who_holds_it() -> None:
    key = secrets.token_hex(8)
    first, second = (
        local_server(SERVED, 0, key=key, lives_with=None, listen=("0.0.0.0", 0)) for _ in range(2)
    )
    assert first.hold is not None
    assert second.hold is not None
    assert (first.address, first.credentials) == (second.address, second.credentials)
    pid = peer_of(first.hold)[0]
    first.hold.close()
    # by TLS, with a certificate for its address that signs itself
    assert identity(second)["shard"] == 0
    assert second.credentials.root is not None
    with connect(*split_address(second.address), Credentials(root=second.credentials.root)) as of:
        with pytest.raises(flight.FlightUnauthenticatedError):
            list(of.do_action(flight.Action("identify", b"{}")))
    second.hold.close()
    wait_until_gone(pid)


def test_where_no_certificate_can_be_made_the_error_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    told = r"no certificate can be made with openssl here .*: install it, or set \[servers.tls\]"
    with pytest.raises(ConfigError, match=told), with_secrets(ServersConfig(), "127.0.0.1"):
        pass


@needs_root
def test_another_user_can_not_pass_as_the_server(
    agent: subprocess.Popen[bytes],
) -> None:
    name = local._name(KEY, 0, agent.pid)
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
            started_by(agent)
        other.kill()
