"""How the parts of requests travel to a server, and answers back: the seam of payload places.

A channel is one stream. `FlightChannel` goes everywhere, with records inside its messages.
`StagingChannel` goes to a server of this host: its messages name a place of memory that both have.
Memory registered for RDMA would be a third.
"""

from __future__ import annotations

import threading
from collections import deque
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

import pyarrow as pa
import pyarrow.flight as flight

from bagpipe.server import wire
from bagpipe.server.memory import StagingMemory
from bagpipe.server.parts import Part
from bagpipe.server.staging import EndedError, StagingStream
from bagpipe.server.wire import Header, Place, What
from bagpipe.types import Float32Array, Group, UInt8Array

_WINDOW = 16
"""Messages of a staging channel under way: each holds a block of memory."""


class Channel(Protocol):
    """One stream. One thread at a time writes, one reads, and any may cancel."""

    def write(self, part: Part, header: Header) -> None:
        """Sends a part's message; may wait until the server has answered others."""

    def read(self) -> tuple[Header, UInt8Array | None]:
        """Waits for an answer.

        Returns:
            Its header, and the bytes of its records, good until the next call; None: the records
            are in their place already.

        Raises:
            StopIteration: The stream has ended.
        """

    def finish(self) -> None:
        """Nothing more is written: the server ends the stream once all is answered."""

    def cancel(self) -> None:
        """Ends the stream now; who writes or reads fails."""

    def close(self) -> None:
        """Releases it, once nobody reads any more."""


class FlightChannel:
    """A `Channel` by Flight."""

    def __init__(
        self, client: flight.FlightClient, command: bytes, groups: tuple[Group, ...]
    ) -> None:
        """Opens a stream that is for `command`."""
        self._groups = groups
        self._writer, self._reader = client.do_exchange(
            flight.FlightDescriptor.for_command(command)
        )
        self._writer.begin(wire.SCHEMA)

    def write(self, part: Part, header: Header) -> None:
        """See `Channel.write`."""
        if part.rows is None:
            self._writer.write_metadata(header.encode())
        elif header.what is What.FETCH:
            self._writer.write_with_metadata(wire.pack(part.rows), header.encode())
        else:
            records = part.run
            if records is None:
                records = wire.room(part.num_rows, self._groups[header.group])
                part.gather(records)
            payload = wire.pack(part.rows, wire.as_bytes(records))
            self._writer.write_with_metadata(payload, header.encode())

    def read(self) -> tuple[Header, UInt8Array | None]:
        """See `Channel.read`."""
        chunk = self._reader.read_chunk()
        header = wire.decode(chunk.app_metadata)
        _, data = wire.unpack(chunk.data, most_rows=0, most_bytes=wire.PIECE_BYTES)
        return header, data

    def finish(self) -> None:
        """See `Channel.finish`."""
        with suppress(flight.FlightError, pa.ArrowException, OSError):
            self._writer.done_writing()

    def cancel(self) -> None:
        """See `Channel.cancel`."""
        self._reader.cancel()

    def close(self) -> None:
        """See `Channel.close`."""
        with suppress(flight.FlightError, pa.ArrowException, OSError):
            self._writer.close()


class StagingChannel:
    """A `Channel` by memory that the server shares.

    Records that lie in that memory, in order, are gathered or read by the server right there.
    Others go by a block of it, with one copy more.
    """

    def __init__(
        self, stream: StagingStream, memory: StagingMemory, groups: tuple[Group, ...]
    ) -> None:
        """Takes the stream over, and borrows the memory, which was handed over on it."""
        self._stream, self._memory, self._groups = stream, memory, groups
        self._room = threading.Semaphore(_WINDOW)
        # (block of memory or None, whether the answer brings records into it), by message
        self._under_way: deque[tuple[Float32Array | None, bool]] = deque()
        self._read: Float32Array | None = None  # what the answer before brought

    def write(self, part: Part, header: Header) -> None:
        """See `Channel.write`."""
        self._room.acquire()
        records, block, offset = part.run, None, None
        if records is not None:
            offset = self._memory.offset_of(records)
        if part.rows is not None and offset is None:
            block = self._memory.take(part.num_rows, self._groups[header.group].record_width)
            if header.what is What.WRITE:
                part.gather(block)
            offset = self._memory.offset_of(block)
        self._under_way.append((block, header.what is What.FETCH))
        self._stream.send(replace(header, place=Place.STAGING, offset=offset or 0), part.rows)

    def read(self) -> tuple[Header, UInt8Array | None]:
        """See `Channel.read`."""
        self._give_back(self._read)
        self._read = None
        try:
            header = self._stream.receive()
        except EndedError as error:
            raise StopIteration from error
        block, brings_records = self._under_way.popleft()
        self._room.release()
        if brings_records and block is not None:
            self._read = block
            return header, wire.as_bytes(block)
        self._give_back(block)
        return header, None

    def finish(self) -> None:
        """See `Channel.finish`."""
        self._stream.finish()

    def cancel(self) -> None:
        """See `Channel.cancel`."""
        self._stream.cancel()
        self._room.release(2 * _WINDOW)  # who waits for room fails then

    def close(self) -> None:
        """See `Channel.close`."""
        # blocks under way stay taken: the server may write to them for a moment
        self._give_back(self._read)
        self._read = None
        self._stream.close()

    def _give_back(self, block: Float32Array | None) -> None:
        if block is not None:
            self._memory.give_back(block)
