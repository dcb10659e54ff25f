"""The floor: messages of the same sizes over one Flight stream, and nothing done with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow.flight as flight

from bagpipe.server import wire
from bagpipe.types import Float32Array, Group, Int64Array

_METADATA = bytes(80)  # about as long as a header


class BareServer(flight.FlightServerBase):  # type: ignore[misc]
    """Answers a message of rows with as many bytes as their records have."""

    def __init__(self, host: str, group: Group) -> None:
        super().__init__(f"grpc+tcp://{host}:0")
        self._group = group
        self._data = np.ones(wire.piece_rows(group) * group.record_bytes, np.uint8)

    def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        """See `FlightServerBase.do_exchange`."""
        writer.begin(wire.SCHEMA)
        while True:
            try:
                rows, _ = wire.unpack(
                    reader.read_chunk().data, most_rows=wire.MAX_FETCH_ROWS, most_bytes=0
                )
            except StopIteration:
                return
            data = self._data[: len(rows) * self._group.record_bytes]
            writer.write_with_metadata(wire.pack(records=data), _METADATA)


class BareClient:
    """Asks as a `RemoteStore` does, and throws the answers away."""

    def __init__(self, host: str, port: int, group: Group) -> None:
        self._client = flight.connect(f"grpc+tcp://{host}:{port}")
        self._writer, self._reader = self._client.do_exchange(
            flight.FlightDescriptor.for_command(b"bare")
        )
        self._writer.begin(wire.SCHEMA)
        self._piece_rows = wire.piece_rows(group)

    def ask(self, rows: Int64Array, out: Float32Array) -> Callable[[], None]:
        """Sends the messages of a step, and returns what reads their answers."""
        pieces = range(0, len(rows), self._piece_rows)
        for begin in pieces:
            message = wire.pack(rows[begin : begin + self._piece_rows])
            self._writer.write_with_metadata(message, _METADATA)

        def wait() -> None:
            for _ in pieces:
                self._reader.read_chunk()

        return wait

    def close(self) -> None:
        """Ends the stream."""
        self._writer.done_writing()
        self._writer.close()
        self._client.close()
