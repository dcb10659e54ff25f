"""The shard server of a host whose configuration names none: trainers start it, and find it again.

It lives as long as the process that started the trainers, such as torchrun's agent. So when
trainers end and are started again, their tables are still there.

Its name is one in Linux's space of Unix sockets without files, made of that process, the host's
shard and the run's configuration. Whoever finds somebody at that name asks for the address and the
token. The system says whose process it is: another user's is not believed, and not told. Nothing is
left behind when the server ends, however it ends. One that does not answer, since it was stopped,
is killed, and another one started.

The server's process is `python -m bagpipe.server.local`, which gets what to serve as JSON on its
standard input, says in JSON on its standard output whether it serves, and goes on in the
background.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash
from pydantic import SecretStr

from bagpipe.config.load import check_config
from bagpipe.config.run import RunConfig
from bagpipe.config.servers import ServersConfig
from bagpipe.errors import BagpipeError, ConfigError, StoreError
from bagpipe.native.memory import keep_freed_memory
from bagpipe.server.credentials import Credentials, client_credentials
from bagpipe.server.ending import Ending
from bagpipe.server.staging import peer_of
from bagpipe.server.start import Place, running_shard

_MAX_ANSWER_BYTES = 8192
_LOOPBACK: Place = ("127.0.0.1", 0)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LocalServer:
    """Where the server of this host is, and what trainers show it."""

    address: str
    credentials: Credentials


def local_server(
    config: RunConfig, number: int, *, lives_with: int, listen: Place = _LOOPBACK
) -> LocalServer:
    """Finds the server of this host, or starts it. Several processes may call it at a time.

    Args:
        config: The run's.
        number: Which of the run's shards is this host's.
        lives_with: The process whose end is the server's, such as torchrun's agent.
        listen: Where. On loopback it makes up a token where the configuration has none.

    Raises:
        ConfigError: The server refuses the configuration.
        StoreError: It can't be started, or does not answer within `servers.start_timeout_s`.
    """
    servers = config.servers or ServersConfig()
    settings = config.model_dump(mode="json")
    name = _name(settings, number, lives_with)
    request = {
        "name": name,
        "config": settings,
        "number": number,
        "lives_with": lives_with,
        "listen": listen,
    }
    deadline = None
    while (answer := _ask(name, servers.start_timeout_s)) is None:
        deadline = deadline or time.monotonic() + servers.start_timeout_s
        if time.monotonic() > deadline:
            raise StoreError(
                f"shard server {number} of this host did not answer within "
                f"{servers.start_timeout_s:g} s after it was started: see what it logs"
            )
        _start(request, servers.start_timeout_s)
    address, token = answer
    credentials = client_credentials(servers)
    return LocalServer(
        address=address, credentials=replace(credentials, token=SecretStr(token) if token else None)
    )


def _name(settings: Mapping[str, Any], number: int, pid: int) -> str:
    """The same for all starts of a run's trainers by one process, and for no others."""
    try:
        # the number of a process may be another's later: when it began tells them apart
        began = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError as error:
        raise StoreError(f"process {pid}, with which a shard server is to live, is gone") from error
    run = xxhash.xxh3_64(json.dumps([settings, os.getcwd()], sort_keys=True).encode()).hexdigest()
    return f"bagpipe-server-{os.geteuid()}-{pid}-{began}-{run}-{number}"


def _ask(name: str, timeout_s: float) -> tuple[str, str] | None:
    """The address and the token of the server of that name; None where there is none.

    One that does not answer is killed.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asking:
        asking.settimeout(timeout_s)
        try:
            asking.connect(f"\0{name}")
        except ConnectionRefusedError:
            return None
        pid, user = peer_of(asking)
        if user != os.geteuid():
            raise StoreError(
                f"process {pid} of user {user} has taken the name of this host's shard server, "
                f"{name!r}: end it"
            )
        try:
            answer = asking.recv(_MAX_ANSWER_BYTES)
        except TimeoutError:
            _log.warning("shard server %d has not answered for %g s: it is killed", pid, timeout_s)
            os.kill(pid, signal.SIGKILL)
            return None
        except ConnectionResetError:
            return None
    address, found, token = answer.decode().partition("\n")
    return (address, token) if found else None


def _start(request: Mapping[str, Any], timeout_s: float) -> None:
    """Starts a server, and waits until it serves, or another one of its name does."""
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "bagpipe.server.local"],
            input=json.dumps(request),
            stdout=subprocess.PIPE,
            text=True,
            timeout=timeout_s,
            check=True,
        )
        error = json.loads(ended.stdout)["error"]
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise StoreError(
            f"shard server {request['number']} of this host could not be started: {error}: see "
            "what it printed"
        ) from error
    if error is not None:
        raise ConfigError(f"shard server {request['number']} of this host: {error}")


def main() -> None:
    """The server's process: leaves its parent once it serves."""
    request = json.load(sys.stdin)
    hears, tells = os.pipe()
    if os.fork():
        os.close(tells)
        with os.fdopen(hears) as told:
            sys.stdout.write(told.read())
        return
    os.setsid()  # Ctrl-C is for the trainers
    os.dup2(2, 1)
    os.close(hears)
    _serve(request, tells)


def _serve(request: Mapping[str, Any], tells: int) -> None:
    number = request["number"]
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format=f"%(asctime)s shard {number} %(levelname)s %(message)s",
    )
    keep_freed_memory()  # messages are as large as those before them
    ending = Ending(request["lives_with"])
    try:
        with _named(request["name"]) as listener:
            config = check_config(RunConfig, request["config"], source="the trainers' run")
            host, port = request["listen"]
            with running_shard(
                config, number, listen=(host, port), own_token=_new_token()
            ) as running:
                token = running.credentials.token
                shown = token.get_secret_value() if token is not None else ""
                answer = f"{running.address}\n{shown}".encode()
                threading.Thread(target=_tell, args=(listener, answer), daemon=True).start()
                _report(tells, None)
                _log.info("ends: %s", ending.wait())
    except _TakenError:
        _report(tells, None)
    except BagpipeError as error:
        _report(tells, str(error))
    # a client that stays would keep the process, and nothing is left to be saved
    logging.shutdown()
    os._exit(0)


class _TakenError(Exception):
    """Another server has the name."""


def _named(name: str) -> socket.socket:
    """A socket of that name, at which nobody is answered yet."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.bind(f"\0{name}")
    except OSError as error:
        listener.close()
        raise _TakenError from error
    listener.listen(64)
    return listener


def _tell(listener: socket.socket, answer: bytes) -> None:
    """Tells every process of this user where the server is."""
    while True:
        try:
            asking, _ = listener.accept()
        except OSError:
            time.sleep(0.1)  # no descriptors are left: others may be closed
            continue
        with asking, suppress(OSError):  # who asked may be gone
            pid, user = peer_of(asking)
            if user == os.geteuid():
                asking.send(answer, socket.MSG_DONTWAIT)
            else:
                _log.warning("process %d of user %d was not told the token", pid, user)


def _new_token() -> SecretStr:
    return SecretStr(secrets.token_hex(32))


def _report(tells: int, error: str | None) -> None:
    with os.fdopen(tells, "w") as told:
        json.dump({"error": error}, told)


if __name__ == "__main__":
    main()
