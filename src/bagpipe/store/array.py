"""What the memory and the file store share: records in one array, of which only touched rows are ever materialised.

A row costs its record once it is written, and one byte for whether it was. Reading an untouched row computes its initial record
and changes nothing. Gather and scatter are single loops without the GIL: the caller's background threads are the parallelism.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from bagpipe._jit import jit
from bagpipe.errors import StoreError
from bagpipe.store.init import RowInitializer
from bagpipe.types import Float32Array, Group, Int64Array

TouchedArray = npt.NDArray[np.uint8]


class ArrayStore:
    """An `EmbeddingStore` over a records array (num_rows, record_width) float32 and a touched array (num_rows,) uint8."""

    def __init__(self, group: Group, seed: int, records: Float32Array, touched: TouchedArray) -> None:
        self.group = group
        self._initializer = RowInitializer(group, seed)
        self._records: Float32Array | None = records
        self._touched = touched

    @property
    def num_touched(self) -> int:
        """Rows written at least once."""
        self._open_records()
        return int(np.count_nonzero(self._touched))

    def fetch(self, rows: Int64Array, out: Float32Array) -> None:
        """See `EmbeddingStore.fetch`."""
        records = self._checked(rows, out)
        wanted = np.empty(len(rows), np.bool_)
        if _gather(records, self._touched, rows, out, wanted):
            self._initializer.fill_where(rows, wanted, out)

    def write(self, rows: Int64Array, records: Float32Array) -> None:
        """See `EmbeddingStore.write`."""
        self._checked(rows, records)
        self._make_room(rows)
        _scatter(self._open_records(), self._touched, rows, records)

    def snapshot(self, block_rows: int = 65_536) -> Iterator[tuple[Int64Array, Float32Array]]:
        """See `EmbeddingStore.snapshot`."""
        for rows in self._touched_blocks(block_rows):
            out = np.empty((len(rows), self.group.record_width), np.float32)
            self.fetch(rows, out)
            yield rows, out

    def _make_room(self, rows: Int64Array) -> None:
        """Called before rows are written; a store whose medium can be full reserves their place here."""

    def _touched_blocks(self, block_rows: int) -> Iterator[Int64Array]:
        """Touched rows ascending, in blocks of at most `block_rows`, scanning a stretch of the flags at a time."""
        stretch = max(block_rows, 1 << 20)
        pending = np.empty(0, np.int64)
        for begin in range(0, self.group.num_rows, stretch):
            self._open_records()
            found = np.flatnonzero(self._touched[begin : begin + stretch]) + begin
            pending = np.concatenate([pending, found])
            while len(pending) >= block_rows:
                yield pending[:block_rows]
                pending = pending[block_rows:]
        if len(pending):
            yield pending

    def _open_records(self) -> Float32Array:
        if self._records is None:
            raise StoreError(f"the store of {self.group.name} is closed")
        return self._records

    def _checked(self, rows: Int64Array, records: Float32Array) -> Float32Array:
        """Refuses arguments that do not fit before anything is read or written; returns the open records."""
        own = self._open_records()
        wanted = (len(rows), self.group.record_width)
        if rows.dtype != np.int64 or rows.ndim != 1:
            raise StoreError(f"rows must be a 1-D int64 array, are {rows.ndim}-D {rows.dtype}")
        if records.shape != wanted or records.dtype != np.float32 or not records.flags.c_contiguous:
            raise StoreError(
                f"records for {len(rows):,} rows of {self.group.name} must be C-contiguous float32 of shape {wanted}, "
                f"are {records.dtype} of shape {records.shape}"
            )
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(own)):
            bad = int(rows[(rows < 0) | (rows >= len(own))][0])
            raise StoreError(f"row {bad:,} lies outside {self.group.name}, whose rows are 0 to {len(own) - 1:,}")
        return own


@jit
def _gather(
    records: Float32Array,
    touched: TouchedArray,
    rows: Int64Array,
    out: Float32Array,
    wanted: np.ndarray[tuple[int], np.dtype[np.bool_]],
) -> bool:
    """Copies touched rows to `out`, notes in `wanted` which are not; returns whether there are any such."""
    any_wanted = False
    for index in range(len(rows)):
        wanted[index] = touched[np.uint64(rows[index])] == 0
        any_wanted |= wanted[index]
    for index in range(len(rows)):
        if not wanted[index]:
            source = records[np.uint64(rows[index])]
            target = out[index]
            for column in range(len(target)):
                target[column] = source[column]
    return any_wanted


@jit
def _scatter(records: Float32Array, touched: TouchedArray, rows: Int64Array, values: Float32Array) -> None:
    for index in range(len(rows)):
        target = records[np.uint64(rows[index])]
        source = values[index]
        for column in range(len(source)):
            target[column] = source[column]
        touched[np.uint64(rows[index])] = 1
