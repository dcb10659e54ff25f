"""The shard server of a host whose configuration names none: trainers start it, and find it again.

It lives as long as the process that started the trainers, such as torchrun's agent. So when
trainers end and are started again, their tables are still there. Or it lives as long as somebody
holds it: then it ends with the last of the trainers of its host.

Its name is one in Linux's space of Unix sockets without files. Whoever finds somebody at that name
asks for the address, and for the token and certificate where the server has made them. The system
says whose process it is: another user's is not believed, and not told. Nothing is left behind when
the server ends, however it ends. One that does not answer, since it was stopped, is killed, and
another one started.

The server's process is `python -m bagpipe.server.local`, which gets what to serve as a pickle on
its standard input, says in JSON on its standard output whether it serves, and goes on in the
background.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash

from bagpipe.errors import BagpipeError, ConfigError, StoreError
from bagpipe.native.memory import keep_freed_memory
from bagpipe.server.ending import Ending
from bagpipe.server.staging import peer_of
from bagpipe.server.start import Address, Served
from bagpipe.server.told import StartedServer, ToldServer, told_server

_MAX_ANSWER_BYTES = 1 << 16
_LOOPBACK: Address = ("127.0.0.1", 0)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Request:
    """What a server's process is to do."""

    name: str
    served: Served
    number: int
    lives_with: int | None
    listen: Address


def local_server(
    served: Served,
    number: int,
    *,
    key: str,
    lives_with: int | None,
    listen: Address = _LOOPBACK,
) -> StartedServer:
    """Finds the server of this host, or starts it. Several processes may call it at a time.

    Args:
        served: What it serves.
        number: Which of the shards is this host's.
        key: Of the run: the same for all that are to find the server, and for no others.
        lives_with: The process whose end is the server's, such as torchrun's agent; None: it lives
            as long as somebody holds it.
        listen: Where. On loopback it makes up a token where the configuration has none, elsewhere
            a certificate, too.

    Raises:
        ConfigError: The server refuses the configuration.
        StoreError: It can't be started, or does not answer within `servers.start_timeout_s`.
    """
    servers = served.servers
    request = _Request(
        name=_name(key, number, lives_with),
        served=served,
        number=number,
        lives_with=lives_with,
        listen=listen,
    )
    deadline = None
    with ExitStack() as holds:  # what is started must not end before it is asked
        while (found := _ask(request.name, servers.start_timeout_s)) is None:
            deadline = deadline or time.monotonic() + servers.start_timeout_s
            if time.monotonic() > deadline:
                raise StoreError(
                    f"shard server {number} of this host did not answer within "
                    f"{servers.start_timeout_s:g} s after it was started: see what it logs"
                )
            holds.enter_context(_started(request, servers.start_timeout_s))
    told, asking = found
    if lives_with is not None:
        asking.close()
    return told.started(servers, hold=None if lives_with is not None else asking)


def _name(key: str, number: int, lives_with: int | None) -> str:
    """The same for all starts of a run's trainers by one process, and for no others."""
    run = xxhash.xxh3_64(key.encode()).hexdigest()
    if lives_with is None:
        return f"bagpipe-server-{os.geteuid()}-{run}-{number}"
    try:
        # the number of a process may be another's later: when it began tells them apart
        began = Path(f"/proc/{lives_with}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError as error:
        raise StoreError(
            f"process {lives_with}, with which a shard server is to live, is gone"
        ) from error
    return f"bagpipe-server-{os.geteuid()}-{lives_with}-{began}-{run}-{number}"


def _ask(name: str, timeout_s: float) -> tuple[ToldServer, socket.socket] | None:
    """What the server of that name answers, and the connection; None where there is none.

    One that does not answer is killed.
    """
    with ExitStack() as stack:
        asking = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
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
            with suppress(ProcessLookupError):  # another trainer has killed it
                os.kill(pid, signal.SIGKILL)
            return None
        except ConnectionResetError:
            return None
        if not answer:
            return None
        stack.pop_all()
    return ToldServer(**json.loads(answer)), asking


@contextmanager
def _started(request: _Request, timeout_s: float) -> Iterator[None]:
    """Starts a server, and waits until it serves, or another one of its name does.

    A server that ends with who holds it is held until the end.
    """
    ours, theirs = socket.socketpair()
    with ours:
        try:
            with theirs:
                ended = subprocess.run(
                    [sys.executable, "-m", "bagpipe.server.local", str(theirs.fileno())],
                    input=pickle.dumps(request),
                    stdout=subprocess.PIPE,
                    pass_fds=[theirs.fileno()],
                    timeout=timeout_s,
                    check=True,
                )
            error = json.loads(ended.stdout)["error"]
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            raise StoreError(
                f"shard server {request.number} of this host could not be started: {error}: see "
                "what it printed"
            ) from error
        if error is not None:
            raise ConfigError(f"shard server {request.number} of this host: {error}")
        yield


def main() -> None:
    """The server's process: leaves its parent once it serves."""
    request: _Request = pickle.load(sys.stdin.buffer)  # of its parent
    hears, tells = os.pipe()
    if os.fork():
        os.close(tells)
        with os.fdopen(hears) as told:
            sys.stdout.write(told.read())
        return
    os.setsid()  # Ctrl-C is for the trainers
    os.dup2(2, 1)
    os.close(hears)
    _serve(request, tells, socket.socket(fileno=int(sys.argv[1])))


def _serve(request: _Request, tells: int, hold: socket.socket) -> None:
    number = request.number
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format=f"%(asctime)s shard {number} %(levelname)s %(message)s",
    )
    keep_freed_memory()  # messages are as large as those before them
    ending = Ending(request.lives_with)
    try:
        serving = told_server(request.served, request.number, listen=request.listen)
        with _named(request.name) as listener, serving as told:
            door = _Door(listener, json.dumps(asdict(told)).encode(), ending.end)
            if request.lives_with is None:
                door.hold(hold)
            else:
                hold.close()
            threading.Thread(target=door.serve, daemon=True).start()
            _report(tells, None)
            _log.info("serves at %s", told.address)
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


class _Door:
    """Tells every process of this user where the server is, and knows who holds it."""

    def __init__(self, listener: socket.socket, answer: bytes, end: Callable[[str], None]) -> None:
        self._listener, self._answer, self._end = listener, answer, end
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._num_holds: int | None = None

    def hold(self, connection: socket.socket) -> None:
        """Holds the server until the other end is closed; from the first one on all who ask do."""
        self._selector.register(connection, selectors.EVENT_READ)
        self._num_holds = (self._num_holds or 0) + 1

    def serve(self) -> None:
        """Runs on a thread of its own."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._listener:
                    self._tell()
                else:
                    self._let_go(key.fileobj)

    def _tell(self) -> None:
        try:
            asking, _ = self._listener.accept()
        except OSError:
            time.sleep(0.1)  # no descriptors are left: others may be closed
            return
        with ExitStack() as stack, suppress(OSError):  # who asked may be gone
            stack.enter_context(asking)
            pid, user = peer_of(asking)
            if user != os.geteuid():
                _log.warning("process %d of user %d was not told the token", pid, user)
                return
            asking.send(self._answer, socket.MSG_DONTWAIT)
            if self._num_holds is not None:
                self.hold(asking)
                stack.pop_all()

    def _let_go(self, connection: object) -> None:
        assert isinstance(connection, socket.socket)
        assert self._num_holds is not None
        self._selector.unregister(connection)
        connection.close()
        self._num_holds -= 1
        if not self._num_holds:
            self._end("nobody holds it any more")


def _report(tells: int, error: str | None) -> None:
    with os.fdopen(tells, "w") as told:
        json.dump({"error": error}, told)


if __name__ == "__main__":
    main()
