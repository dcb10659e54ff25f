"""How a trainer reaches a shard server of its own host: records stay in memory that both have.

A trainer hands its `StagingMemory` over, a file descriptor, on a Unix socket. Then it asks by small
messages for records to be gathered right into a place of that memory, or written from one. So
records cross no socket, and they are copied once, in the server's process. A message and its answer
take 4 us, where those of a Flight stream take 45 (docs/lab/network.md).

    trainer -> server   the opening: a header, and the descriptor beside it
                        requests: a header, and the rows behind it
    server -> trainer   an answer to each, in order: a header, and behind it an error, if there is
                        one; then the connection ends

A connection is a stream, as one of Flight is: for a rank's writes, which are applied in order, or
for fetches. Each has a thread here. Headers, marks, fences and epochs are those of `wire`.

A server does not trust its trainers. The socket's name is told to those only who have logged in,
and the system says whose process it is that connects: another user's is sent away. Rows are copied
with their message, so nobody can change them once they are checked. Offsets are checked against the
mapping, whose file can't get smaller.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import struct
import threading
import time

import numpy as np
import pyarrow as pa

from bagpipe.errors import BagpipeError, StoreError
from bagpipe.native.sockets import connect_unix
from bagpipe.server.calls import unexpected
from bagpipe.server.memory import StagingMemory, map_foreign
from bagpipe.server.shard import Shard
from bagpipe.server.wire import Header, Place, What, decode
from bagpipe.types import Float32Array, Int64Array, UInt8Array

MAX_ROWS = 16_384
"""Rows that one message names at most: a Unix socket takes messages of 200 KB everywhere."""
MAX_UNDER_WAY = 64
"""Requests of a stream that may wait for their answers; with many more both ends might wait for
room in the other's socket."""
_SEND_BUFFER_BYTES = 2 << 20
"""Of the system's, for a trainer's requests; it may give less. By default one of many rows fills it
and its trainer stands still until the server has taken it."""
_NOBODY = "0" * 32
HEADER_BYTES = len(Header(what=What.ANSWER, epoch=0, instance=_NOBODY).encode())
_MAX_MESSAGE_BYTES = HEADER_BYTES + 8 * MAX_ROWS
_MAX_ERROR_BYTES = 4_096
_MAX_CONNECTIONS = 4_096
_OPENING_TIMEOUT_S, _CLOSE_TIMEOUT_S = 10.0, 5.0
_PEER = struct.Struct("3i")  # struct ucred: process, user, group

_log = logging.getLogger(__name__)


class StagingServer:
    """The end of a shard server; it serves from its making until `close`."""

    def __init__(self, shard: Shard) -> None:
        """Listens at an address of its own.

        Args:
            shard: What is read and written; it is borrowed.

        Raises:
            StoreError: The system refuses.
        """
        self._shard = shard
        self.address = f"bagpipe-staging-{secrets.token_hex(16)}"
        """What trainers of this host connect to. On another host nobody is there."""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._listener.bind(f"\0{self.address}")
            self._listener.listen(128)
        except OSError as error:
            self._listener.close()
            raise StoreError(f"can't listen for trainers of this host: {error}") from error
        self._lock = threading.Lock()
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._is_closed = False
        self._accepting = threading.Thread(target=self._accept, name="staging", daemon=True)
        self._accepting.start()

    def close(self) -> None:
        """Ends all connections. What waits in the shard must be ended before, by closing that."""
        with self._lock:
            self._is_closed = True
            connections = dict(self._connections)
        _shut_down(self._listener)
        self._accepting.join(_CLOSE_TIMEOUT_S)
        self._listener.close()
        for connection, thread in connections.items():
            _shut_down(connection)
            thread.join(_CLOSE_TIMEOUT_S)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                if self._is_closed:
                    return
                time.sleep(0.1)  # no descriptors are left: others may be closed
                continue
            if self._is_stranger(connection):
                connection.close()
                continue
            thread = threading.Thread(
                target=self._serve, args=(connection,), name="staging", daemon=True
            )
            with self._lock:
                if self._is_closed or len(self._connections) >= _MAX_CONNECTIONS:
                    connection.close()
                    continue
                self._connections[connection] = thread
                thread.start()  # who closes the server can wait for it only then

    def _is_stranger(self, connection: socket.socket) -> bool:
        process, user = peer_of(connection)
        if user == os.geteuid():
            return False
        _log.warning(
            "process %d of user %d was refused shared memory of this server of user %d",
            process,
            user,
            os.geteuid(),
        )
        return True

    def _serve(self, connection: socket.socket) -> None:
        """Serves a connection until it ends; any error ends it, and no other."""
        number, is_first = 0, True
        try:
            memory, what = self._open(connection)
            connection.send(_answer(number))
            message = bytearray(_MAX_MESSAGE_BYTES + 1)
            while size := connection.recv_into(message):
                header, rows = _split(message, size)
                number = header.number
                if header.what is not what:
                    raise StoreError(
                        f"a stream that was opened for a {what.name} has a {header.what.name}"
                    )
                if is_first and what is What.WRITE:
                    self._shard.claim_writes(header)
                is_first = False
                self._apply(header, rows, memory)
                connection.send(_answer(number))
        except BagpipeError as error:
            _tell(connection, number, str(error))
        except OSError:  # the trainer has gone
            pass
        except Exception as error:
            _log.exception("a request of shared memory failed")
            _tell(connection, number, unexpected(error))
        finally:
            with self._lock:
                self._connections.pop(connection, None)
            connection.close()

    def _open(self, connection: socket.socket) -> tuple[UInt8Array, What]:
        """Reads the opening: returns the trainer's memory, and what the stream is for."""
        _limit(connection, socket.SO_RCVTIMEO, _OPENING_TIMEOUT_S)
        message, files, _, _ = socket.recv_fds(connection, HEADER_BYTES + 1, 2)
        try:
            header = decode(message)
            if header.what not in (What.WRITE, What.FETCH):
                raise StoreError(f"a stream can't be opened for an {header.what.name}")
            if len(files) != 1:
                raise StoreError(f"a stream's opening brings {len(files)} files, must bring 1")
            memory = map_foreign(files[0])
        finally:
            for file in files:
                os.close(file)
        _limit(connection, socket.SO_RCVTIMEO, 0)
        return memory, header.what

    def _apply(self, header: Header, rows: Int64Array, memory: UInt8Array) -> None:
        if not len(rows) and header.what is What.WRITE:
            self._shard.mark(header)
            return
        records = _place(header, len(rows), memory, self._shard)
        if header.what is What.WRITE:
            self._shard.write(header, rows, records)
        else:
            self._shard.fetch(header, rows, records)


class EndedError(StoreError):
    """The server has ended a connection, or its process has ended."""


def is_near(address: str) -> bool:
    """Whether the server that told this address runs on this host."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        _limit(connection, socket.SO_SNDTIMEO, _OPENING_TIMEOUT_S)
        try:
            connect_unix(connection, f"\0{address}")
        except OSError:
            return False
        return bool(address) and peer_of(connection)[1] == os.geteuid()


class StagingStream:
    """A trainer's end of one connection.

    One thread at a time sends, one at a time receives, and any may cancel.
    """

    def __init__(
        self, address: str, memory: StagingMemory, opening: Header, *, timeout_s: float
    ) -> None:
        """Connects, and hands the memory over.

        Args:
            address: The server's.
            memory: Where records are; it must stay open until this returns.
            opening: Says what the stream is for, WRITE or FETCH, and of which epoch.
            timeout_s: How long it may take until the server lets it in.

        Raises:
            EndedError: Nobody is there, as on another host. What the server has against the opening
                is raised by the first `receive`.
        """
        self._is_open = False
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        _limit(self._connection, socket.SO_SNDTIMEO, timeout_s)
        try:
            connect_unix(self._connection, f"\0{address}")
            process, user = peer_of(self._connection)
            if user != os.geteuid():  # who has the memory has the records
                raise PermissionError(f"process {process} of user {user} is there")
            socket.send_fds(self._connection, [opening.encode()], [memory.file])
        except OSError as error:
            self._connection.close()
            raise EndedError(f"it can't be reached by shared memory: {error}") from error
        _limit(self._connection, socket.SO_SNDTIMEO, 0)

    def send(self, header: Header, rows: Int64Array | None) -> None:
        """Sends a request, of at most `MAX_ROWS` rows; `MAX_UNDER_WAY` may wait for answers.

        A write without rows is a mark alone.

        Args:
            header: Its `offset` says where in the memory the records are, or go to.
            rows: (n,) int64, C-contiguous.

        Raises:
            EndedError: The server is gone.
        """
        assert rows is None or len(rows) <= MAX_ROWS
        behind = [] if rows is None else [pa.py_buffer(rows)]
        try:
            self._connection.sendmsg([header.encode(), *behind])
        except OSError as error:
            raise EndedError(f"it is gone: {error}") from error

    def receive(self) -> Header:
        """Waits for the next answer; they come in the order of the requests.

        Raises:
            StoreError: The request failed, or the opening did. The stream is then of no more use.
            EndedError: The stream has ended.
        """
        if not self._is_open:
            self._receive()
            self._is_open = True
        return self._receive()

    def finish(self) -> None:
        """Nothing more is sent: the server ends the stream once all is answered."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)

    def cancel(self) -> None:
        """Ends the stream; who waits for an answer fails."""
        _shut_down(self._connection)

    def close(self) -> None:
        """Ends the stream, for which nobody waits any more. Closing twice is allowed."""
        _shut_down(self._connection)
        self._connection.close()

    def _receive(self) -> Header:
        try:
            message = self._connection.recv(HEADER_BYTES + _MAX_ERROR_BYTES)
        except OSError as error:
            raise EndedError(f"it is gone: {error}") from error
        if not message:
            raise EndedError("it has ended the stream")
        text = message[HEADER_BYTES:].decode(errors="replace")
        if text:
            raise StoreError(text)
        return decode(message[:HEADER_BYTES])


def _split(message: bytearray, size: int) -> tuple[Header, Int64Array]:
    """The header and the rows (n,) of a message, a view of its bytes."""
    header = decode(bytes(memoryview(message)[: min(size, HEADER_BYTES)]))
    rows_bytes = size - HEADER_BYTES
    if size > _MAX_MESSAGE_BYTES or rows_bytes % 8:
        raise StoreError(
            f"a message has {rows_bytes:,} bytes of rows or more, may have {8 * MAX_ROWS:,}, 8 for "
            "each"
        )
    return header, np.frombuffer(message, np.int64, rows_bytes // 8, HEADER_BYTES)


def _place(header: Header, num_rows: int, memory: UInt8Array, shard: Shard) -> Float32Array:
    """The records (num_rows, record_width) in the trainer's memory that a header names."""
    group = shard.group(header)
    size_bytes = num_rows * group.record_bytes
    if header.place is not Place.STAGING or header.slot != 0 or header.offset % 4:
        raise StoreError(
            f"a message names place {header.place.name}, slot {header.slot}, offset "
            f"{header.offset:,}: it must be STAGING, slot 0 and a multiple of 4"
        )
    if header.offset + size_bytes > len(memory):
        raise StoreError(
            f"a message names {size_bytes:,} bytes from {header.offset:,} on of memory that has "
            f"{len(memory):,}"
        )
    records: Float32Array = memory[header.offset : header.offset + size_bytes].view(np.float32)
    return records.reshape(num_rows, group.record_width)


def _answer(number: int) -> bytes:
    return Header(what=What.ANSWER, epoch=0, instance=_NOBODY, number=number).encode()


def _tell(connection: socket.socket, number: int, error: str) -> None:
    """Tells an error, if the other end is there and reads."""
    text = error.encode()[:_MAX_ERROR_BYTES]
    with contextlib.suppress(OSError):
        connection.send(_answer(number) + text, socket.MSG_DONTWAIT)


def _limit(connection: socket.socket, option: int, timeout_s: float) -> None:
    """A limit of the system's: with one of Python's each call would poll first."""
    limit = struct.pack("ll", int(timeout_s), int(timeout_s % 1 * 1e6))
    connection.setsockopt(socket.SOL_SOCKET, option, limit)


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """The process and the user at the other end, as the system knows them."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    process, user, _ = _PEER.unpack(raw)
    return process, user


def _shut_down(connection: socket.socket) -> None:
    """Ends a connection that another thread may be waiting for."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
