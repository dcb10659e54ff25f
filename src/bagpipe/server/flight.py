"""A shard server: streams and calls of Arrow Flight onto a `Shard`.

A stream is a DoExchange whose descriptor says what it is for: `write`, `fetch` or `snapshot`. Its
messages are those of `wire`. A rank has one stream of writes, whose messages are applied and
answered in order, and any number of streams of fetches, each of which is answered in order, too. A
fetch is answered by as many messages as its records need.

Calls, as Flight's actions, are those of `calls`: JSON of a fixed form.

Each stream and call has a thread of its own here, so one that waits, or whose client does not read,
holds up no other. It holds one message at a time. Whatever is wrong with a message ends its stream
with an error that says what, and no other stream.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.flight as flight

from bagpipe.errors import BagpipeError, StoreError
from bagpipe.server import calls, wire
from bagpipe.server.credentials import Credentials
from bagpipe.server.logins import Logins
from bagpipe.server.security import GuardedServer
from bagpipe.server.shard import Shard
from bagpipe.server.staging import StagingServer
from bagpipe.server.wire import Header, Place, What
from bagpipe.types import Group

_CLOSE_TIMEOUT_S = 5.0
_MAX_TEXT = 1000
"""Characters; each may take 9 bytes in a header, which has 16 KB, and an error is sent twice."""

_log = logging.getLogger(__name__)


class ShardServer(GuardedServer):
    """Serves one shard from its making until `close`.

    Args:
        shard: Whose rows are served; taken over.
        host: Where to listen.
        port: 0: any that is free; `port` then says which.
        credentials: The server's, see `bagpipe.server.credentials`.
        logins: By default those with the credentials' token.
        run_folder: The run's, outside of which no client's call reads or writes a file; None: all
            files are open to clients.

    Raises:
        ConfigError: It can't listen there.
    """

    def __init__(
        self,
        shard: Shard,
        host: str = "127.0.0.1",
        port: int = 0,
        credentials: Credentials | None = None,
        logins: Logins | None = None,
        run_folder: Path | None = None,
    ) -> None:
        self.shard, self._run_folder = shard, run_folder
        super().__init__(host, port, credentials or Credentials(), logins)
        self._staging = StagingServer(shard)
        shard.staging = self._staging.address

    def close(self, timeout_s: float = _CLOSE_TIMEOUT_S) -> bool:
        """Ends what waits, releases the records and stops listening.

        Flight can't end a stream whose client neither sends nor leaves.

        Returns:
            Whether all streams have ended within `timeout_s`. Where not, only the end of the
            process ends them.
        """
        self.shard.close()
        self._staging.close()
        stopping = threading.Thread(target=self.shutdown, name="shutdown", daemon=True)
        stopping.start()
        stopping.join(timeout_s)
        return not stopping.is_alive()

    def exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        """One stream, until its client ends it."""
        streams: dict[bytes, Callable[[Any, Any], None]] = {
            wire.WRITE: self._write,
            wire.FETCH: self._fetch,
            wire.SNAPSHOT: self._snapshot,
        }
        with _telling():
            serve = streams.get(descriptor.command or b"")
            if serve is None:
                raise StoreError("a stream must be one of " + ", ".join(map(bytes.decode, streams)))
            serve(reader, writer)

    def action(self, context: Any, action: Any) -> Iterator[Any]:
        """One call; it may be answered more than once."""
        with _telling():
            for answer in calls.answers(self.shard, action.type, action.body, self._run_folder):
                yield flight.Result(answer)

    def _write(self, reader: Any, writer: Any) -> None:
        is_first = True
        for header, payload in _messages(reader, What.WRITE):
            if is_first:
                self.shard.claim_writes(header)
                is_first = False
            if payload is None:
                self.shard.mark(header)
            else:
                group = self._group(header)
                most_rows = wire.piece_rows(group)
                rows, data = wire.unpack(
                    payload, most_rows=most_rows, most_bytes=most_rows * group.record_bytes
                )
                self.shard.write(header, rows, wire.as_records(data, len(rows), group))
            writer.write_metadata(_answer(header))

    def _fetch(self, reader: Any, writer: Any) -> None:
        writer.begin(wire.SCHEMA)
        for header, payload in _messages(reader, What.FETCH):
            group = self._group(header)
            rows, _ = wire.unpack(payload, most_rows=wire.MAX_FETCH_ROWS, most_bytes=0)
            answer = _answer(header)
            step = wire.piece_rows(group)
            self.shard.wait(header)
            for begin in range(0, max(1, len(rows)), step):
                piece = rows[begin : begin + step]
                out = wire.room(len(piece), group)
                self.shard.read(header, piece, out)
                writer.write_with_metadata(wire.pack(records=wire.as_bytes(out)), answer)

    def _snapshot(self, reader: Any, writer: Any) -> None:
        writer.begin(wire.SCHEMA)
        header, _ = next(_messages(reader, What.FETCH))
        answer = _answer(header)
        for rows, records in self.shard.snapshot(header):
            writer.write_with_metadata(wire.pack(rows, wire.as_bytes(records)), answer)

    def _group(self, header: Header) -> Group:
        if header.place is not Place.INLINE:
            raise StoreError(f"records can't go to place {header.place.name} of this stream")
        return self.shard.group(header)


def _messages(reader: Any, what: What) -> Iterator[tuple[Header, pa.RecordBatch | None]]:
    """The headers and payloads of a stream, until its client ends it or goes."""
    while True:
        try:
            chunk = reader.read_chunk()
        except (StopIteration, flight.FlightCancelledError):
            return
        except (pa.ArrowException, OSError) as error:
            raise StoreError(f"a message can't be read: {error}") from error
        header = wire.decode(chunk.app_metadata)
        if header.what is not what:
            raise StoreError(f"a message is a {header.what.name}, its stream takes {what.name}")
        yield header, chunk.data


def _answer(header: Header) -> bytes:
    return Header(
        what=What.ANSWER,
        epoch=header.epoch,
        instance=header.instance,
        rank=header.rank,
        group=header.group,
        number=header.number,
    ).encode()


@contextmanager
def _telling() -> Iterator[None]:
    """Tells the client what fails, without a traceback.

    `extra_info` has the text as it is, without Flight's.
    """
    try:
        yield
    except flight.FlightError:
        raise
    except BagpipeError as error:
        raise _told(str(error)) from None
    except Exception as error:
        _log.exception("a request failed")
        raise _told(calls.unexpected(error)) from None


def _told(text: str) -> flight.FlightServerError:
    """An error that arrives: one longer than gRPC's headers may be is lost, text and all."""
    if len(text) > _MAX_TEXT:
        text = f"{text[: _MAX_TEXT // 2]} ... {text[-_MAX_TEXT // 2 :]}"
    return flight.FlightServerError(text, extra_info=text.encode())
