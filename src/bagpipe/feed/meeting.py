"""Where the trainers of a host meet the oracle process that the first of them has started.

It is an abstract Unix socket. The first trainer listens before the process runs, and the process
inherits the socket, so nobody can come too early. A trainer says the key and its rank in one
message, and hands over its shared memory with it. On the porch many may wait for their turn to
speak, strangers too; they hold up nobody.
"""

from __future__ import annotations

import hmac
import os
import secrets
import socket
import struct
from dataclasses import dataclass
from multiprocessing.connection import Connection

from bagpipe.errors import BackgroundError
from bagpipe.native.sockets import connect_unix
from bagpipe.topology import MAX_TRAINERS

_MAX_GREETING_BYTES = 256
_MAX_SILENT = 256
"""Connections that may say nothing yet; when there are more, the oldest is closed."""


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
        """What `connect` needs. Tell it to trainers only: it holds the key."""
        return f"{self.listener.getsockname()[1:].decode()} {self.key}"


class Porch:
    """Who has knocked at a `Door`. Nothing here waits."""

    def __init__(self, door: Door) -> None:
        self._door, self._silent = door, dict[int, socket.socket]()  # by descriptor
        door.listener.setblocking(False)

    @property
    def descriptors(self) -> list[int]:
        """File descriptors to watch: the door's, and those of all who have said nothing yet."""
        return [self._door.listener.fileno(), *self._silent]

    def admit(self, number: int) -> Guest | None:
        """Looks at a descriptor where something has happened; returns a trainer that has come."""
        if number in self._silent:
            return self._listen(self._silent.pop(number))
        if number != self._door.listener.fileno():  # it was sent away meanwhile
            return None
        try:
            connection, _ = self._door.listener.accept()
        except OSError:  # who knocked has gone
            return None
        connection.setblocking(False)
        return self._listen(connection)

    def close(self) -> None:
        """Sends away all who have not been admitted; nobody comes any more."""
        self._door.listener.close()
        for connection in self._silent.values():
            connection.close()

    def _listen(self, connection: socket.socket) -> Guest | None:
        """Hears a greeting, if it has come: keeps who is silent, sends away who lacks the key."""
        try:
            greeting, files, _, _ = socket.recv_fds(connection, _MAX_GREETING_BYTES, 1)
        except BlockingIOError:  # a trainer says it with the knock, or nearly so
            self._silent[connection.fileno()] = connection
            if len(self._silent) > _MAX_SILENT:
                self._silent.pop(next(iter(self._silent))).close()
            return None
        except OSError:
            connection.close()
            return None
        key, _, rank = greeting.decode(errors="replace").partition(" ")
        if len(files) != 1 or not hmac.compare_digest(key.encode(), self._door.key.encode()):
            connection.close()
            for file in files:
                os.close(file)
            return None
        connection.setblocking(True)
        return Guest(rank=int(rank), connection=Connection(connection.detach()), file=files[0])


def connect(address: str, rank: int, file: int, timeout_s: float) -> Connection:
    """Connects a trainer to the process behind a `Door`.

    Args:
        address: the door's.
        rank: the trainer's.
        file: the descriptor of its shared memory; it stays open here.
        timeout_s: how long it may take until the door opens, where many are at it.

    Raises:
        BackgroundError: no process is there, or none any more, or the time is over.
    """
    name, key = address.split()
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # a timeout of Python's would make the socket one that does not wait for room before the door
    limit = struct.pack("ll", int(timeout_s), int(timeout_s % 1 * 1e6))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
    try:
        connect_unix(connection, f"\0{name}")
        socket.send_fds(connection, [f"{key} {rank}".encode()], [file])
    except OSError as error:
        connection.close()
        raise BackgroundError(
            f"rank {rank} can't reach the oracle process that its host's first rank has started "
            f"({error}): it has ended, or runs on another host, and the communicator was not told "
            "of several"
        ) from error
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 0, 0))
    return Connection(connection.detach())
