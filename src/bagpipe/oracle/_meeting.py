"""Where the trainers of a host meet the oracle process that the first of them has started: an
abstract Unix socket.

That one listens before the process runs, which inherits the socket, so that nobody comes too early.
A trainer says the key and its rank in one message, and hands over its shared memory with it.
"""

from __future__ import annotations

import hmac
import os
import secrets
import socket
from dataclasses import dataclass
from multiprocessing.connection import Connection

from bagpipe.errors import BackgroundError
from bagpipe.oracle.merge import MAX_TRAINERS

_GREETING_TIMEOUT_S = 5.0
_MAX_GREETING_BYTES = 256


@dataclass(frozen=True, kw_only=True)
class Guest:
    """A trainer that has come."""

    rank: int
    connection: Connection
    file: int  # its shared memory


@dataclass(frozen=True, kw_only=True)
class Door:
    """The listening end. Can be sent to a process that is being started."""

    listener: socket.socket
    key: str
    timeout_s: float
    """How long trainers may take to come."""

    @classmethod
    def open(cls, timeout_s: float) -> Door:
        """Listens under a new name, with a new key."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(f"\0bagpipe-{secrets.token_hex(16)}")
        listener.listen(MAX_TRAINERS)
        return cls(listener=listener, key=secrets.token_hex(16), timeout_s=timeout_s)

    @property
    def address(self) -> str:
        """What `connect` needs; to be told to trainers only."""
        return f"{self.listener.getsockname()[1:].decode()} {self.key}"

    def admit(self) -> Guest | None:
        """Who comes next; None for somebody without the key, or who says nothing."""
        connection, _ = self.listener.accept()
        connection.settimeout(_GREETING_TIMEOUT_S)
        try:
            greeting, files, _, _ = socket.recv_fds(connection, _MAX_GREETING_BYTES, 1)
        except OSError:
            connection.close()
            return None
        key, _, rank = greeting.decode(errors="replace").partition(" ")
        if len(files) != 1 or not hmac.compare_digest(key.encode(), self.key.encode()):
            connection.close()
            for file in files:
                os.close(file)
            return None
        connection.setblocking(True)
        return Guest(rank=int(rank), connection=Connection(connection.detach()), file=files[0])


def connect(address: str, rank: int, file: int) -> Connection:
    """A trainer's way to the process behind a `Door`. Raises BackgroundError when there is none, or
    none any more.
    """
    name, key = address.split()
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(f"\0{name}")
        socket.send_fds(connection, [f"{key} {rank}".encode()], [file])
    except OSError as error:
        connection.close()
        raise BackgroundError(
            f"rank {rank} can't reach the oracle process that its host's first rank has started "
            f"({error}): it has ended, or runs "
            "on another host, and the communicator was not told of several"
        ) from error
    return Connection(connection.detach())
