"""A trainer's request, cut into parts: a message each, which goes to one shard and is answered."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np

from bagpipe.errors import StoreError
from bagpipe.native.jit import jit
from bagpipe.native.memory import copy_run
from bagpipe.server import wire
from bagpipe.server.wire import Header, What
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
    """Of the message in its stream."""

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
