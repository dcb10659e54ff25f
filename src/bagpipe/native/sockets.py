"""Unix sockets: what Python leaves to do."""

from __future__ import annotations

import errno
import socket


def connect_unix(connection: socket.socket, address: str) -> None:
    """As `connection.connect`, also where a signal comes while it waits for room in the queue.

    Python then looks whether the connection is there by asking for an error, and there is none.
    """
    while True:
        connection.connect(address)
        try:
            connection.getpeername()
            return
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                raise
