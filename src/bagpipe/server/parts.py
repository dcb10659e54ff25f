"""A trainer's request, cut into parts: a message each, which goes to one shard and is answered.

What comes from several shards is put together here, too.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from bagpipe.errors import StoreError
from bagpipe.native.jit import jit
from bagpipe.native.memory import copy_run
from bagpipe.server import wire
from bagpipe.server.wire import Header, What
from bagpipe.topology import by_shard
from bagpipe.types import Float32Array, Group, Int64Array, UInt8Array


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
    """One message, and what its answer brings."""

    pending: Pending
    header: Header
    rows: Int64Array | None = None
    """(n,); None: a mark alone."""
    records: Float32Array | None = None
    """(m, record_width) of the whole request: where a fetch's go, or a write's come from."""
    places: Int64Array | None = None
    """(n,) in `records`; None: they lie there in order from `first` on."""
    first: int = 0
    num_received: int = 0
    number: int = 0
    """The message's number in its stream."""

    @property
    def num_rows(self) -> int:
        """Rows that the message names."""
        return 0 if self.rows is None else len(self.rows)

    @property
    def run(self) -> Float32Array | None:
        """The part's own records (n, record_width), where they lie in order."""
        if self.records is None or self.places is not None:
            return None
        return self.records[self.first : self.first + self.num_rows]

    def gather(self, out: Float32Array) -> None:
        """Copies the records of a write to `out` (n, record_width)."""
        assert self.records is not None
        if self.places is None:
            out[:] = self.records[self.first : self.first + len(out)]
        else:
            _gather(self.records, self.places, out)

    def receive(self, data: UInt8Array, group: Group) -> bool:
        """Puts records where they belong; returns whether all have come."""
        if self.header.what is What.FETCH:
            num_records, odd_bytes = divmod(len(data), group.record_bytes)
            begin, end = self.num_received, self.num_received + num_records
            if not num_records or odd_bytes or end > self.num_rows:
                raise StoreError(
                    f"{end:,} records and {odd_bytes} bytes came for {self.num_rows:,} rows"
                )
            assert self.records is not None
            # As bytes, since they may begin between words.
            if self.places is None:
                wire.as_bytes(self.records[self.first + begin : self.first + end])[:] = data
            else:
                of_records = data.reshape(num_records, group.record_bytes)
                _scatter(of_records, self.places[begin:end], self.records.view(np.uint8))
            self.num_received = end
            return end == self.num_rows
        return True


def pieces_of(
    rows: Int64Array, num_shards: int, most_rows: int
) -> Iterator[tuple[int, int, Int64Array, Int64Array | None]]:
    """Divides rows (n,) by shard, and each shard's into pieces of at most `most_rows`.

    Yields:
        The shard, where the piece begins among the shard's rows, its rows, and their places in
        `rows`; None: they lie there in order from where the piece begins.
    """
    if num_shards == 1:
        for first in range(0, len(rows), most_rows):
            yield 0, first, rows[first : first + most_rows], None
        return
    order, counts = by_shard(rows, num_shards)
    ordered = rows[order]
    end = 0
    for shard, count in enumerate(counts.tolist()):
        begin, end = end, end + count
        for first in range(begin, end, most_rows):
            of_piece = slice(first, min(end, first + most_rows))
            yield shard, first - begin, ordered[of_piece], order[of_piece]


def merged(
    streams: Sequence[Iterator[tuple[Int64Array, Float32Array]]],
) -> Iterator[tuple[Int64Array, Float32Array]]:
    """Merges streams of blocks of rows that each ascend, and have none in common."""
    blocks = {index: block for index, each in enumerate(streams) if (block := next(each, None))}
    while blocks:
        # all rows up to the end of the block that ends first are here
        first = min(blocks, key=lambda index: blocks[index][0][-1])
        last = blocks[first][0][-1]
        ends = {
            index: int(np.searchsorted(rows, last, "right")) for index, (rows, _) in blocks.items()
        }
        rows = np.concatenate([blocks[index][0][:end] for index, end in ends.items()])
        records = np.concatenate([blocks[index][1][:end] for index, end in ends.items()])
        order = np.argsort(rows)
        yield rows[order], records[order]
        for index, end in ends.items():
            if end < len(blocks[index][0]):
                blocks[index] = blocks[index][0][end:], blocks[index][1][end:]
            elif (block := next(streams[index], None)) is not None:
                blocks[index] = block
            else:
                del blocks[index]


@jit
def _scatter(records: UInt8Array, places: Int64Array, out: UInt8Array) -> None:
    """Copies record i of (n, record_bytes) to out[places[i]]."""
    for index in range(len(places)):
        copy_run(records[index], out[np.uint64(places[index])])


@jit
def _gather(records: Float32Array, places: Int64Array, out: Float32Array) -> None:
    """Copies records[places[i]] to record i of out (n, width)."""
    for index in range(len(places)):
        copy_run(records[np.uint64(places[index])], out[index])
