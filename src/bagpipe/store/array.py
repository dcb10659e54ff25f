"""What the stores share: records in one array, of which only touched rows take memory.

This class owns two arrays: records (num_rows, record_width) float32 and flags (num_rows,) uint8. A
store of one shard of several has only that shard's records, so that their memory is divided among
hosts or servers. A subclass makes the records array, erases it, and may reserve room before a
write. The caller's arrays are only borrowed.

A row's flag is zero until it is written. What a write leaves there is `mark`: `TOUCHED`, and what
else the store's owner wants to know of the row (`bagpipe.store.cuts`).

A call takes both arrays at once, as one pair, and keeps them alive while it runs: the loops do not
check bounds, so a `close` from another thread must not change an array under them.

Cost: `record_bytes` for each touched row, in whole pages, and one byte of memory for every row (a
byte, not a bit, so that threads that write neighbouring rows need no atomics). Reading an untouched
row computes its initial record and changes nothing. Gather and scatter are loops without the GIL.
Memory latency bounds them; arithmetic bounds the initial records (0.1 us each at dimension 64).
Threads share the rows of a call that has many.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from bagpipe.errors import StoreError
from bagpipe.native.jit import (
    NUM_MANY_THREADS,
    NUM_PARTS,
    jit,
    parallel_jit,
    part_bounds,
    prange,
    threaded,
)
from bagpipe.native.memory import copy_run
from bagpipe.native.prefetch import PREFETCH_DISTANCE, prefetch_record
from bagpipe.store.arguments import (
    check_arguments,
    check_block_rows,
    check_out,
    check_range,
    check_type,
    closed,
)
from bagpipe.store.base import NO_STEPS, Steps
from bagpipe.store.init import Parameters, RowInitializer, fill_part
from bagpipe.topology import LINE_BITS, lines_of_shard, shard_of
from bagpipe.types import Float32Array, Group, Int32Array, Int64Array, UInt8Array

_SCAN_ROWS = 1 << 20
"""Flags that a snapshot looks at in one go, so that its memory does not grow with the table."""
_SHARED_BYTES = 64 << 20
"""Threads share calls of at least this size, as when a cache fills or is flushed.

A smaller call runs in the caller's thread alone: several are under way at a time, and threads that
meet at the end of each call spin there.
"""
_shared = partial(threaded, num_threads=NUM_MANY_THREADS)
TOUCHED = 1
"""The bit of a row's flag that says that it has been written."""


class Places:
    """Where in a store's array the records of one shard's rows are.

    Attributes:
        num_places: how many records the array holds.
        lines: the place of each line of rows, see `bagpipe.topology.lines_of_shard`; None: the
            store has all rows, each at its own number.
    """

    def __init__(self, group: Group, shard: int = 0, num_shards: int = 1) -> None:
        self.shard, self.num_shards = shard, num_shards
        self.num_places = group.num_rows
        self.lines: Int32Array | None = None
        if num_shards > 1:
            self.lines, num_lines = lines_of_shard(group.num_rows, shard, num_shards)
            self.num_places = max(1, num_lines) << LINE_BITS


class ArrayStore(ABC):
    """An `EmbeddingStore` over a records array (num_rows, record_width) float32, all zero.

    Attributes:
        shard: the shard whose rows it has, of `num_shards`.
        mark: the bits that a write sets in a row's flag, `TOUCHED` among them.
    """

    def __init__(
        self,
        group: Group,
        seed: int,
        records: Float32Array,
        touched: UInt8Array | None = None,
        places: Places | None = None,
    ) -> None:
        """Takes over the arrays.

        Args:
            group: the group whose records these are.
            seed: what initial records are drawn from.
            records: (num_rows, record_width) float32, all zero where rows are not touched.
            touched: (num_rows,) uint8, which rows `records` holds already; None: none.
            places: where in records rows are; None: all are in their order.
        """
        places = Places(group) if places is None else places
        self.group, self._lines = group, places.lines
        self.shard, self.num_shards = places.shard, places.num_shards
        self.mark = TOUCHED
        self._initializer = RowInitializer(group, seed)
        self._arrays: tuple[Float32Array, UInt8Array] | None = (  # None: closed
            records,
            _no_row_touched(group) if touched is None else touched,
        )

    def fetch(self, rows: Int64Array, out: Float32Array) -> None:
        """See `EmbeddingStore.fetch`."""
        records, touched = self._open_arrays()
        check_out(self.group, rows, out)
        gather = _gather_shared if out.nbytes >= _SHARED_BYTES else _gather
        gather(records, touched, rows, self._places(rows), self._initializer.parameters, out)

    def ask(
        self, rows: Int64Array, out: Float32Array, fence: Steps = NO_STEPS
    ) -> Callable[[], None]:
        """See `EmbeddingStore.ask`."""
        return partial(self.fetch, rows, out)

    def write(self, rows: Int64Array, records: Float32Array) -> None:
        """See `EmbeddingStore.write`."""
        own, touched = self._open_arrays()
        check_arguments(self.group, rows, records, "records")
        places = self._places(rows)
        self._make_room(places)
        scatter = _scatter_shared if records.nbytes >= _SHARED_BYTES else _scatter
        scatter(own, touched, rows, places, records, self.mark)

    def materialize(self, rows: Int64Array) -> None:
        """Writes the initial records of rows (n,) int64 that were never written, each given once.

        Raises:
            StoreError: as for `fetch`; nothing was written.
        """
        check_type(self.group, rows)
        check_range(self.group, rows)
        fresh = _never_written(rows, self._open_arrays()[1])
        if len(fresh):
            records = np.empty((len(fresh), self.group.record_width), np.float32)
            self.fetch(fresh, records)
            self.write(fresh, records)

    @property
    def flags(self) -> UInt8Array:
        """Each row's flag (num_rows,), not a copy; another array after `clear`."""
        return self._open_arrays()[1]

    def flags_of(self, rows: Int64Array) -> UInt8Array:
        """The flags of rows (n,) int64, a copy. StoreError: a row is out of range."""
        flags = self._open_arrays()[1]
        check_type(self.group, rows)
        check_range(self.group, rows)
        return flags[rows]

    def snapshot(self, block_rows: int = 65_536) -> Iterator[tuple[Int64Array, Float32Array]]:
        """See `EmbeddingStore.snapshot`."""
        self._open_arrays()
        check_block_rows(self.group, block_rows)
        return self._snapshot(block_rows)

    def clear(self) -> None:
        """See `EmbeddingStore.clear`."""
        self._open_arrays()
        # Old memory is released before new is asked for, and a store that can't be cleared stays
        # closed.
        self._arrays = None
        self._arrays = self._erased_records(), self._erased_touched()

    def close(self) -> None:
        """See `EmbeddingStore.close`."""
        self._arrays = None

    @abstractmethod
    def _erased_records(self) -> Float32Array:
        """The records array, all zero again, its memory given back.

        Raises:
            StoreError: the medium refused, and the store stays closed.
        """

    def _erased_touched(self) -> UInt8Array:
        """Flags that say that no row is touched."""
        return _no_row_touched(self.group)

    @abstractmethod
    def _make_room(self, places: Int64Array) -> None:
        """Called before records at these places are written.

        A store whose medium can be full reserves space here.
        """

    def _snapshot(self, block_rows: int) -> Iterator[tuple[Int64Array, Float32Array]]:
        for rows in self._touched_blocks(block_rows):
            out = np.empty((len(rows), self.group.record_width), np.float32)
            self.fetch(rows, out)
            yield rows, out

    def _touched_blocks(self, block_rows: int) -> Iterator[Int64Array]:
        """Touched rows ascending, in blocks of at most `block_rows`, all full but the last."""
        pending = np.empty(0, np.int64)
        for begin in range(0, self.group.num_rows, _SCAN_ROWS):
            _, touched = self._open_arrays()
            found = np.flatnonzero(touched[begin : begin + _SCAN_ROWS]) + begin
            pending = np.concatenate([pending, found])
            while len(pending) >= block_rows:
                yield pending[:block_rows]
                pending = pending[block_rows:]
        if len(pending):
            yield pending

    def _places(self, rows: Int64Array) -> Int64Array:
        """Where in the records rows (n,) are; StoreError for one of another shard."""
        if self._lines is None:
            return rows
        places, bad = _find_places(rows, self._lines)
        if bad >= 0:
            raise StoreError(
                f"row {rows[bad]:,} of {self.group.name} is of shard "
                f"{shard_of(int(rows[bad]), self.num_shards)} of {self.num_shards}, this store has "
                f"shard {self.shard}: ask the host or the server that has the row"
            )
        return places

    def _open_arrays(self) -> tuple[Float32Array, UInt8Array]:
        arrays = self._arrays  # read once: another thread may close
        if arrays is None:
            raise closed(self.group)
        return arrays


def _no_row_touched(group: Group) -> UInt8Array:
    """Flags (num_rows,), zero and not yet backed by memory."""
    try:
        return np.zeros(group.num_rows, np.uint8)
    except MemoryError as error:
        raise StoreError(
            f"can't get {group.num_rows:,} bytes of memory, one for each row of {group.name}: use "
            "fewer rows or more memory"
        ) from error


@jit
def _find_places(rows: Int64Array, lines: Int32Array) -> tuple[Int64Array, int]:
    """The place of each row (n,), and the index of the last row whose line has none, or -1."""
    places, bad = np.empty(len(rows), np.int64), -1
    for index in range(len(rows)):
        row = rows[index]
        line = np.int64(lines[np.uint64(row >> LINE_BITS)])
        places[index] = (line << LINE_BITS) + (row & ((1 << LINE_BITS) - 1))
        bad = index if line < 0 else bad
    return places, bad


@jit
def _never_written(rows: Int64Array, touched: UInt8Array) -> Int64Array:
    fresh, num_fresh = np.empty(len(rows), np.int64), 0
    for index in range(len(rows)):
        fresh[num_fresh] = rows[index]
        num_fresh += touched[np.uint64(rows[index])] == 0
    return fresh[:num_fresh]


@_shared
@parallel_jit
def _gather_shared(
    records: Float32Array,
    touched: UInt8Array,
    rows: Int64Array,
    places: Int64Array,
    initial: Parameters,
    out: Float32Array,
) -> None:
    """Copies touched rows to `out` from their `places` and computes the others."""
    for part in prange(NUM_PARTS):
        begin, end = part_bounds(part, len(rows))
        _gather(records, touched, rows[begin:end], places[begin:end], initial, out[begin:end])


@jit
def _gather(
    records: Float32Array,
    touched: UInt8Array,
    rows: Int64Array,
    places: Int64Array,
    initial: Parameters,
    out: Float32Array,
) -> None:
    """Copies touched rows first, then computes all initial records in one go, for vectors."""
    untouched = np.empty(len(rows), np.bool_)
    any_untouched = False
    for index in range(len(rows)):
        # Unsigned, so that numba leaves out its test for negative indices; the same below.
        untouched[index] = touched[np.uint64(rows[index])] == 0
        any_untouched |= untouched[index]
    for index in range(len(rows)):
        ahead = min(index + PREFETCH_DISTANCE, len(rows) - 1)
        prefetch_record(records, places[ahead])
        if not untouched[index]:
            copy_run(records[np.uint64(places[index])], out[index])
    if any_untouched:
        fill_part(rows, untouched, initial, out)


@_shared
@parallel_jit
def _scatter_shared(
    records: Float32Array,
    touched: UInt8Array,
    rows: Int64Array,
    places: Int64Array,
    values: Float32Array,
    mark: int,
) -> None:
    """Copies `values` to `records[places]` and sets the bits of `mark` in the rows' flags."""
    for part in prange(NUM_PARTS):
        begin, end = part_bounds(part, len(rows))
        _scatter(records, touched, rows[begin:end], places[begin:end], values[begin:end], mark)


@jit
def _scatter(
    records: Float32Array,
    touched: UInt8Array,
    rows: Int64Array,
    places: Int64Array,
    values: Float32Array,
    mark: int,
) -> None:
    for index in range(len(rows)):
        ahead = min(index + PREFETCH_DISTANCE, len(rows) - 1)
        prefetch_record(records, places[ahead])
        row = np.uint64(rows[index])
        copy_run(values[index], records[np.uint64(places[index])])
        touched[row] |= np.uint8(mark)
