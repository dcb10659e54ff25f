"""Writes one split as Arrow IPC files.

Column 0 is the label, column 1 the dense features, then come the categorical features. Every record
batch has exactly `rows_per_batch` rows, except for a file's last one, so that a reader finds any
row by a division. At most one record batch and one block are held in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa

from bagpipe.data.base import Split
from bagpipe.data.files import HashingFile
from bagpipe.data.manifest import FeatureEntry, FileEntry
from bagpipe.types import Float32Array, Int32Array


def prepared_schema(features: Sequence[FeatureEntry], num_dense: int) -> Any:
    """The Arrow schema of the files of a split."""
    fields = [pa.field("label", pa.float32()), pa.field("dense", pa.list_(pa.float32(), num_dense))]
    kinds = {True: pa.list_(pa.int32()), False: pa.int32()}
    return pa.schema(
        fields + [pa.field(feature.name, kinds[feature.multi_hot]) for feature in features]
    )


def record_batch(
    schema: Any,
    labels: Float32Array,
    dense: Float32Array,
    ids: Sequence[tuple[Int32Array, Int32Array | None]],
) -> Any:
    """A record batch of n rows.

    Args:
        schema: What `prepared_schema` returns.
        labels: (n,).
        dense: (n, D).
        ids: For each feature its ids and, if it is multi-hot, offsets (n + 1,).
    """
    # from_buffers, because FixedSizeListArray.from_arrays divides by the list size, which is 0
    # without dense features.
    numbers = pa.array(dense.reshape(-1))
    columns = [
        pa.array(labels),
        pa.Array.from_buffers(schema.field(1).type, len(labels), [None], children=[numbers]),
    ]
    for values, offsets in ids:
        column = pa.array(values)
        columns.append(
            column if offsets is None else pa.ListArray.from_arrays(pa.array(offsets), column)
        )
    return pa.RecordBatch.from_arrays(columns, schema=schema)


class SplitWriter:
    """A context manager that cuts what it is given into record batches and files of equal sizes.

    Args:
        claim: Makes a file of the given name and returns its path.
        split: What the files are named after.
        schema: What `prepared_schema` returns.
        rows_per_batch: Rows per record batch.
        batches_per_file: Record batches per file.
    """

    def __init__(
        self,
        claim: Callable[[str], Path],
        split: Split,
        schema: Any,
        *,
        rows_per_batch: int,
        batches_per_file: int,
    ) -> None:
        self._claim, self._split, self._schema = claim, split, schema
        self._rows_per_batch = rows_per_batch
        self._rows_per_file = rows_per_batch * batches_per_file
        self._pending: list[Any] = []
        self._num_pending = 0
        self._file: HashingFile | None = None
        self._writer: Any = None
        self._file_rows = 0
        self.entries: list[FileEntry] = []

    def write(self, batch: Any) -> None:
        """Appends the rows of an Arrow record batch."""
        while len(batch):
            taken = min(len(batch), self._rows_per_batch - self._num_pending)
            self._pending.append(batch.slice(0, taken))
            self._num_pending += taken
            batch = batch.slice(taken)
            if self._num_pending == self._rows_per_batch:
                self._flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._flush()
            self._end_file()
        elif self._file is not None:
            self._file.__exit__(kind, error, trace)

    def _flush(self) -> None:
        if not self._num_pending:
            return
        if self._file is None:
            name = f"{self._split}-{len(self.entries):05d}.arrow"
            self._file = HashingFile(self._claim(name))
            self._writer = pa.ipc.new_file(self._file, self._schema)
        self._writer.write_batch(_whole(self._pending))
        self._file_rows += self._num_pending
        self._pending, self._num_pending = [], 0
        if self._file_rows == self._rows_per_file:
            self._end_file()

    def _end_file(self) -> None:
        if self._file is None:
            return
        self._writer.close()
        self._file.close()
        self.entries.append(
            FileEntry(
                name=self._file.path.name,
                num_bytes=self._file.num_bytes,
                checksum=self._file.checksum,
                num_rows=self._file_rows,
            )
        )
        self._file, self._writer, self._file_rows = None, None, 0


def _whole(batches: list[Any]) -> Any:
    """Joins record batches into one."""
    if len(batches) == 1:
        return batches[0]
    return pa.Table.from_batches(batches).combine_chunks().to_batches()[0]
