"""What a trainer has of the shard servers: one store a group, over all shards.

A call is divided by shard and goes to all of them at once, in pieces, so that several requests are
under way. Writes go on one stream a shard, in order, with this rank's marks between them. Fetches
go on others, so that a fetch that waits for its fence holds up neither writes nor other fetches.
While there are few fetches, each takes a stream of its own.

Nothing is repeated. Once anything has failed (a server that is gone or was restarted, an epoch that
has ended, a rank that stands still), all streams end, and every call raises the same error: the
trainers must be started again. No wait is longer than `timeout_s` without an answer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.flight as flight

from bagpipe.errors import StoreError
from bagpipe.server import wire
from bagpipe.server.channels import Channel, FlightChannel, StagingChannel
from bagpipe.server.control import ServerControl
from bagpipe.server.memory import StagingMemory
from bagpipe.server.parts import Part, Pending, merged, pieces_of
from bagpipe.server.staging import MAX_ROWS, StagingStream, is_near
from bagpipe.server.streams import Stream
from bagpipe.server.wire import Header, What
from bagpipe.store.arguments import check_arguments, check_block_rows, check_out, closed
from bagpipe.store.base import NO_STEPS, Steps
from bagpipe.types import Float32Array, Group, Int64Array

MAX_FETCH_STREAMS = 8
"""Streams of fetches to one server; another one is opened where all wait for answers."""


class ShardServers:
    """All shard servers of an epoch, as one trainer sees them. It is a context manager.

    Attributes:
        stores: One `RemoteStore` a group.
        memory: What is shared with the servers of this host; None: there are none. Records that
            come from and go to arrays of it are copied once less. After a failure a server may
            still write to it for a moment.
    """

    def __init__(
        self,
        control: ServerControl,
        groups: Sequence[Group],
        epoch: int,
        instances: Sequence[str],
        *,
        rank: int = 0,
        staging: bool = True,
    ) -> None:
        """Opens this rank's streams, once an epoch: the servers take no second one for its writes.

        Args:
            control: Its connections are used; borrowed.
            groups: All groups of the run.
            epoch: The number of the epoch, which has begun.
            instances: What `ServerControl.begin` returned to rank 0.
            rank: This trainer's.
            staging: Whether servers of this host are reached by shared memory.

        Raises:
            StoreError: A server is gone.
        """
        self.groups, self.epoch, self.rank = tuple(groups), epoch, rank
        self.stores = tuple(RemoteStore(self, group, i) for i, group in enumerate(self.groups))
        self._control, self._instances = control, tuple(instances)
        control.epoch = epoch
        self._error: StoreError | None = None
        self._failing, self._ending = threading.Lock(), threading.Event()
        self._is_near = [staging and is_near(address) for address in control.staging]
        self.memory = StagingMemory() if any(self._is_near) else None
        self._most_rows = wire.MAX_FETCH_ROWS if self.memory is None else MAX_ROWS
        self._writes: list[Stream] = []
        self._fetches: list[list[Stream]] = [[] for _ in range(control.num_shards)]
        self._opening = threading.Lock()
        for shard in range(control.num_shards):
            self._writes.append(self._stream(shard, wire.WRITE))
        self._watch = threading.Thread(target=self._watch_streams, name="watch", daemon=True)
        self._watch.start()

    @property
    def num_shards(self) -> int:
        """How many servers there are."""
        return self._control.num_shards

    def mark(self, steps: Steps) -> None:
        """Says that all which this rank's transfers up to these steps evict has been sent.

        It is sent behind the writes that have been sent, and not waited for.

        Raises:
            StoreError: Something has failed before.
        """
        self._raise_failure()
        for shard, stream in enumerate(self._writes):
            stream.send(Part(pending=Pending(1), header=self._header(shard, What.WRITE, 0, steps)))

    def ask(
        self, group: int, rows: Int64Array, out: Float32Array, fence: Steps
    ) -> Callable[[], None]:
        """See `RemoteStore.ask`; arguments are checked."""
        self._raise_failure()
        pieces = list(pieces_of(rows, self.num_shards, self._most_rows))
        pending = Pending(len(pieces))
        streams = {shard: self._fetch_stream(shard) for shard in {piece[0] for piece in pieces}}
        for shard, first, of_piece, places in pieces:
            streams[shard].send_later(
                Part(
                    pending=pending,
                    header=self._header(shard, What.FETCH, group, fence),
                    rows=of_piece,
                    records=out,
                    places=places,
                    first=first,
                )
            )
        return pending.wait

    def send(self, group: int, rows: Int64Array, records: Float32Array) -> Callable[[], None]:
        """See `RemoteStore.send`; arguments are checked."""
        self._raise_failure()
        most_rows = self._most_rows  # of records that the server reads right there
        if self.num_shards > 1 or self.memory is None or self.memory.offset_of(records) is None:
            most_rows = min(most_rows, wire.piece_rows(self.groups[group]))
        pieces = list(pieces_of(rows, self.num_shards, most_rows))
        pieces.sort(key=lambda piece: piece[1])  # shards in turn, so that all have work
        pending = Pending(len(pieces))
        for shard, first, of_piece, places in pieces:
            self._writes[shard].send(
                Part(
                    pending=pending,
                    header=self._header(shard, What.WRITE, group, NO_STEPS),
                    rows=of_piece,
                    records=records,
                    places=places,
                    first=first,
                )
            )
        return pending.wait

    def snapshot(self, group: int) -> Iterator[tuple[Int64Array, Float32Array]]:
        """The touched rows of all shards, ascending, with their records, in blocks of any size."""
        self._raise_failure()
        of_shards = [self._snapshot_of(shard, group) for shard in range(self.num_shards)]
        if self.num_shards == 1:
            yield from of_shards[0]
            return
        yield from merged(of_shards)

    def clear(self, group: int) -> None:
        """See `RemoteStore.clear`."""
        self._raise_failure()
        self._control.clear(self._instances, group)

    def close(self) -> None:
        """Ends all streams; what is under way fails. Closing twice is allowed."""
        self._ending.set()
        with self._failing:
            self._error = self._error or StoreError(
                f"rank {self.rank} has closed its streams to the shard servers"
            )
        with self._opening:
            streams = list(self._streams())
        for stream in streams:
            if stream.num_owed:
                stream.cancel(self._error)
        for stream in streams:
            stream.close()
        self._watch.join()
        if self.memory is not None:
            self.memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _streams(self) -> Iterator[Stream]:
        yield from self._writes
        for streams in self._fetches:
            yield from streams

    def _header(self, shard: int, what: What, group: int, steps: Steps) -> Header:
        return Header(
            what=what,
            epoch=self.epoch,
            instance=self._instances[shard],
            rank=self.rank,
            group=group,
            steps=steps,
        )

    def _stream(self, shard: int, command: bytes) -> Stream:
        def fail(error: Exception) -> StoreError:
            return self._fail(self._failed(shard, command, error))

        try:
            channel = self._channel(shard, command)
        except (flight.FlightError, pa.ArrowException, StoreError) as error:
            raise fail(error) from error
        return Stream(channel, self.groups, fail, of_fetches=command == wire.FETCH)

    def _channel(self, shard: int, command: bytes) -> Channel:
        if self.memory is None or not self._is_near[shard]:
            return FlightChannel(self._control.clients[shard], command, self.groups)
        what = What.FETCH if command == wire.FETCH else What.WRITE
        stream = StagingStream(
            self._control.staging[shard],
            self.memory,
            self._header(shard, what, 0, NO_STEPS),
            timeout_s=self._control.start_timeout_s,
        )
        return StagingChannel(stream, self.memory, self.groups)

    def _fetch_stream(self, shard: int) -> Stream:
        """A stream that owes no answers if there is one or may be one more."""
        streams = self._fetches[shard]
        stream = min(streams, key=lambda each: each.num_owed, default=None)
        if stream is not None and (not stream.num_owed or len(streams) == MAX_FETCH_STREAMS):
            return stream
        with self._opening:
            self._raise_failure()
            stream = self._stream(shard, wire.FETCH)
            streams.append(stream)
        if self._error is not None:  # since then, by a thread that did not see this stream
            stream.cancel(self._error)
        return stream

    def _failed(self, shard: int, command: bytes, error: Exception) -> StoreError:
        doing = f"in a {command.decode()} of rank {self.rank} in epoch {self.epoch}"
        return self._control.failed(shard, doing, error)

    def _fail(self, error: StoreError) -> StoreError:
        """Ends all streams; the first reason is the one that all calls raise."""
        with self._failing:
            is_first = self._error is None
            self._error = self._error or error
        if is_first:
            for stream in self._streams():
                stream.cancel(self._error)
        return self._error

    def _raise_failure(self) -> None:
        if self._error is not None:
            raise StoreError(str(self._error)) from self._error

    def _watch_streams(self) -> None:
        """Ends everything when a server owes an answer for too long."""
        timeout_s = self._control.timeout_s
        while not self._ending.wait(min(1.0, timeout_s / 4)):
            for shard, streams in enumerate(self._fetches):
                stalled_s = max(each.stalled_s() for each in [self._writes[shard], *streams])
                if stalled_s > timeout_s:
                    late = StoreError(f"it has answered nothing for {stalled_s:.1f} s")
                    self._fail(self._failed(shard, b"message", late))
                    return

    def _snapshot_of(self, shard: int, group: int) -> Iterator[tuple[Int64Array, Float32Array]]:
        """The touched rows of one shard, ascending, with their records."""
        options = flight.FlightCallOptions(timeout=self._control.begin_timeout_s)
        of_group = self.groups[group]
        most_rows = wire.piece_rows(of_group)
        writer, reader = self._control.clients[shard].do_exchange(
            flight.FlightDescriptor.for_command(wire.SNAPSHOT), options
        )
        try:
            writer.begin(wire.SCHEMA)
            writer.write_metadata(self._header(shard, What.FETCH, group, NO_STEPS).encode())
            writer.done_writing()
            while (chunk := _next(reader)) is not None:
                rows, data = wire.unpack(
                    chunk.data, most_rows=most_rows, most_bytes=wire.PIECE_BYTES
                )
                yield rows, wire.as_records(data, len(rows), of_group)
        except (flight.FlightError, pa.ArrowException) as error:
            raise self._failed(shard, wire.SNAPSHOT, error) from error
        finally:
            reader.cancel()
            with suppress(flight.FlightError, pa.ArrowException, OSError):
                writer.close()


class RemoteStore:
    """An `OrderedStore` whose records the shard servers have; see `ShardServers`.

    Attributes:
        group: The group whose records these are.
    """

    def __init__(self, servers: ShardServers, group: Group, index: int) -> None:
        self.group = group
        self._servers, self._index = servers, index
        self._is_closed = False

    @property
    def memory(self) -> StagingMemory | None:
        """See `ShardServers.memory`; None where records of several shards are put together."""
        return self._servers.memory if self._servers.num_shards == 1 else None

    def fetch(self, rows: Int64Array, out: Float32Array) -> None:
        """See `EmbeddingStore.fetch`."""
        self.ask(rows, out)()

    def ask(
        self, rows: Int64Array, out: Float32Array, fence: Steps = NO_STEPS
    ) -> Callable[[], None]:
        """See `EmbeddingStore.ask`. Records come while nobody waits; this does not block."""
        self._check_open()
        check_out(self.group, rows, out)
        return self._servers.ask(self._index, rows, out, fence)

    def write(self, rows: Int64Array, records: Float32Array) -> None:
        """See `EmbeddingStore.write`."""
        self.send(rows, records)()

    def send(self, rows: Int64Array, records: Float32Array) -> Callable[[], None]:
        """As `write`, but returns what waits until the servers have written them.

        A mark may follow at once, since it can't overtake. The arrays are borrowed until what waits
        returns.

        Raises:
            StoreError: As for `write`, at once or from what waits.
        """
        self._check_open()
        check_arguments(self.group, rows, records, "records")
        return self._servers.send(self._index, rows, records)

    def mark(self, steps: Steps) -> None:
        """See `OrderedStore.mark`."""
        self._check_open()
        self._servers.mark(steps)

    def snapshot(self, block_rows: int = 65_536) -> Iterator[tuple[Int64Array, Float32Array]]:
        """See `EmbeddingStore.snapshot`."""
        self._check_open()
        check_block_rows(self.group, block_rows)
        return self._snapshot(block_rows)

    def clear(self) -> None:
        """See `EmbeddingStore.clear`; one rank alone calls it, while no other reads or writes."""
        self._check_open()
        self._servers.clear(self._index)

    def close(self) -> None:
        """See `EmbeddingStore.close`. The servers keep the records."""
        self._is_closed = True

    def _snapshot(self, block_rows: int) -> Iterator[tuple[Int64Array, Float32Array]]:
        for rows, records in self._servers.snapshot(self._index):
            for begin in range(0, len(rows), block_rows):
                self._check_open()
                yield rows[begin : begin + block_rows], records[begin : begin + block_rows]
        self._check_open()

    def _check_open(self) -> None:
        if self._is_closed:
            raise closed(self.group)


def _next(reader: Any) -> Any:
    try:
        return reader.read_chunk()
    except StopIteration:
        return None
