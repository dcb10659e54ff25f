"""A trainer's streams to one shard server, and what waits for their answers.

Each stream has a thread that reads answers, so a server never waits for a trainer to look. A fetch
that can't be sent at once, since the server still owes answers on that stream, is sent by a second
thread: asking never blocks, however long a fence holds the requests before.

A stream that fails is of no more use. It tells `fail`, which ends all others, too: then every part
of every request ends, and nobody touches a caller's array after its wait has returned.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight

from bagpipe.errors import StoreError
from bagpipe.native.jit import jit
from bagpipe.native.memory import copy_run
from bagpipe.server import wire
from bagpipe.server.wire import Header
from bagpipe.types import Float32Array, Group, Int64Array, UInt8Array

_END_TIMEOUT_S = 5.0


class Pending:
    """A request in parts, each of which ends once; waited for by one thread."""

    __slots__ = ("_error", "_is_over", "_lock", "_num_left")

    def __init__(self, num_parts: int) -> None:
        self._num_left = num_parts
        self._error: StoreError | None = None
        self._lock, self._is_over = threading.Lock(), threading.Lock()
        if num_parts:
            self._is_over.acquire()

    def end_part(self, error: StoreError | None = None) -> None:
        """One part more has come, or failed."""
        with self._lock:
            self._num_left -= 1
            self._error = self._error or error
            is_over = not self._num_left
        if is_over:
            self._is_over.release()

    def wait(self) -> None:
        """Returns once all parts have come. StoreError: one has failed, and all have ended."""
        with self._is_over:
            pass
        if self._error is not None:
            raise StoreError(str(self._error)) from self._error


@dataclass(slots=True)
class Part:
    """What a stream owes: the answer to one message."""

    pending: Pending
    header: Header
    payload: pa.RecordBatch | None = None
    rows: int = 0
    """Whose records are to come."""
    out: Float32Array | None = None  # (n, record_width) of the whole request
    places: Int64Array | None = None  # (rows,) in out; None: in order from `first` on
    first: int = 0
    num_received: int = 0
    number: int = 0
    """Of the message in its stream."""

    def receive(self, data: UInt8Array, group: Group) -> bool:
        """Puts records where they belong; returns whether all have come."""
        if self.out is not None:
            num_records = len(data) // group.record_bytes
            records = wire.as_records(data, num_records, group)
            begin, end = self.num_received, self.num_received + num_records
            if not num_records or end > self.rows:
                raise StoreError(f"{end:,} records came for {self.rows:,} rows")
            if self.places is None:
                self.out[self.first + begin : self.first + end] = records
            else:
                _scatter(records, self.places[begin:end], self.out)
            self.num_received = end
        return self.num_received == self.rows


class Stream:
    """One stream; any thread may send."""

    def __init__(
        self,
        client: flight.FlightClient,
        command: bytes,
        groups: tuple[Group, ...],
        fail: Callable[[Exception], StoreError],
    ) -> None:
        """Opens it.

        Args:
            client: Of the server.
            command: What the stream is for.
            groups: All groups.
            fail: Told why the stream has failed; returns how to tell it.
        """
        self._groups, self._fail = groups, fail
        self._writer, self._reader = client.do_exchange(
            flight.FlightDescriptor.for_command(command)
        )
        self._writer.begin(wire.SCHEMA)
        self._lock = threading.Lock()
        self._owed: deque[Part] = deque()
        self._error: StoreError | None = None
        self._num_sent = 0
        self.last_s = time.monotonic()
        """When an answer came last, or was first owed."""
        self._to_send: SimpleQueue[Part | None] = SimpleQueue()
        self._threads = [threading.Thread(target=self._receive, name="receive", daemon=True)]
        if command == wire.FETCH:
            self._threads.append(threading.Thread(target=self._send, name="send", daemon=True))
        for thread in self._threads:
            thread.start()

    @property
    def num_owed(self) -> int:
        """How many answers are to come."""
        return len(self._owed)

    def send(self, part: Part) -> None:
        """Sends a message and notes what is owed; messages are answered in order.

        Blocks until the system takes it, which a server of writes soon does.

        Raises:
            StoreError: The stream has failed.
        """
        with self._lock:
            self._note(part)
            self._write(part)

    def send_later(self, part: Part) -> None:
        """As `send`, but never blocks for long.

        Raises:
            StoreError: The stream has failed.
        """
        with self._lock:
            is_idle = not self._owed
            self._note(part)
            if is_idle:  # then the server reads, and takes it at once
                self._write(part)
            else:
                self._to_send.put(part)

    def stalled_s(self) -> float:
        """How long an answer has been owed without any that came."""
        return time.monotonic() - self.last_s if self._owed else 0.0

    def cancel(self, error: StoreError) -> None:
        """Ends the stream; what is owed fails with `error`."""
        self._error = self._error or error
        self._reader.cancel()

    def close(self) -> None:
        """Ends the stream, once what is owed has come or failed."""
        self._to_send.put(None)
        with suppress(flight.FlightError, pa.ArrowException, OSError):
            self._writer.done_writing()
        for thread in self._threads:
            thread.join(_END_TIMEOUT_S)
        with suppress(flight.FlightError, pa.ArrowException, OSError):
            self._writer.close()

    def _note(self, part: Part) -> None:
        if self._error is not None:
            raise StoreError(str(self._error)) from self._error
        if not self._owed:
            self.last_s = time.monotonic()
        part.number, self._num_sent = self._num_sent, self._num_sent + 1
        self._owed.append(part)

    def _write(self, part: Part) -> None:
        header = replace(part.header, number=part.number).encode()
        try:
            if part.payload is None:
                self._writer.write_metadata(header)
            else:
                self._writer.write_with_metadata(part.payload, header)
        except Exception as error:  # then the thread that reads ends what is owed
            self._fail(error)

    def _send(self) -> None:
        while (part := self._to_send.get()) is not None:
            self._write(part)

    def _receive(self) -> None:
        error: StoreError
        try:
            while True:
                self._take(self._reader.read_chunk())
        except StopIteration:
            error = self._fail(StoreError("it has ended the stream")) if self._owed else _ENDED
        except Exception as failure:  # whatever it is, it must reach those who wait
            error = self._fail(failure)
        with self._lock:
            self._error = error
            owed = list(self._owed)
            self._owed.clear()
        for part in owed:
            part.pending.end_part(error)

    def _take(self, chunk: Any) -> None:
        header = wire.decode(chunk.app_metadata)
        if not self._owed or self._owed[0].number != header.number:
            raise StoreError(f"an answer to message {header.number} came, which owes none")
        part = self._owed[0]
        _, data = wire.unpack(chunk.data, most_rows=0, most_bytes=wire.PIECE_BYTES)
        self.last_s = time.monotonic()
        if part.receive(data, self._groups[part.header.group]):
            self._owed.popleft()
            part.pending.end_part()


_ENDED = StoreError("the stream has ended")


@jit
def _scatter(records: Float32Array, places: Int64Array, out: Float32Array) -> None:
    """Copies record i of (n, width) to out[places[i]]."""
    for index in range(len(places)):
        copy_run(records[index], out[np.uint64(places[index])])


@jit
def gather(records: Float32Array, places: Int64Array, out: Float32Array) -> None:
    """Copies records[places[i]] to record i of out (n, width)."""
    for index in range(len(places)):
        copy_run(records[np.uint64(places[index])], out[index])
