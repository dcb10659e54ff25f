"""Turns raw blocks into record batches, and writes each split as Arrow IPC files.

Column 0 is the label, column 1 the dense features, then come the categorical features. Last come
labels beyond the first, and samples' weights, where there are any. Every record batch has exactly
`rows_per_batch` rows, except for a file's last one, so that a reader finds any row by a division.
At most one record batch and one block are held in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa

from bagpipe.data.base import Split
from bagpipe.data.files import HashingFile
from bagpipe.data.manifest import FeatureEntry, FileEntry
from bagpipe.data.observed import LabelClustering, UsedRows
from bagpipe.data.raw import RawBlock, RawFeature
from bagpipe.data.transforms import log_transform
from bagpipe.data.values import GatheredTexts
from bagpipe.data.vocabulary import Vocabulary
from bagpipe.types import Float32Array, Int32Array


def prepared_schema(
    features: Sequence[FeatureEntry],
    num_dense: int,
    *,
    further_labels: Sequence[str] = (),
    has_weights: bool = False,
) -> Any:
    """The Arrow schema of the files of a split; `further_labels` are those beyond the first."""
    fields = [pa.field("label", pa.float32()), pa.field("dense", pa.list_(pa.float32(), num_dense))]
    kinds = {True: pa.list_(pa.int32()), False: pa.int32()}
    fields += [pa.field(feature.name, kinds[feature.multi_hot]) for feature in features]
    further = [f"label {name}" for name in further_labels] + ["weight"] * has_weights
    return pa.schema(fields + [pa.field(name, pa.float32()) for name in further])


def record_batch(
    schema: Any,
    labels: Float32Array,
    dense: Float32Array,
    ids: Sequence[tuple[Int32Array, Int32Array | None]],
    weights: Float32Array | None = None,
) -> Any:
    """A record batch of n rows.

    Args:
        schema: What `prepared_schema` returns.
        labels: (n,), or (n, L) of L labels.
        dense: (n, D).
        ids: For each feature its ids and, if it is multi-hot, offsets (n + 1,).
        weights: (n,), if the schema has them.
    """
    # from_buffers, because FixedSizeListArray.from_arrays divides by the list size, which is 0
    # without dense features.
    numbers = pa.array(dense.reshape(-1))
    first, *further = np.atleast_2d(labels.T)
    columns = [
        pa.array(first),
        pa.Array.from_buffers(schema.field(1).type, len(labels), [None], children=[numbers]),
    ]
    for values, offsets in ids:
        column = pa.array(values)
        columns.append(
            column if offsets is None else pa.ListArray.from_arrays(pa.array(offsets), column)
        )
    columns += map(pa.array, further if weights is None else [*further, weights])
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


class Encoder:
    """Turns blocks of one source into record batches of `schema`.

    Args:
        features: Of the blocks, in their order.
        dense_names: The dense columns, in their order.
        vocabularies: The vocabulary of each table.
        transform: What is done to dense features.
        texts: Takes the texts that have ids.
        further_labels: The names of the labels beyond the first.
        has_weights: Whether the blocks have samples' weights.
    """

    def __init__(
        self,
        features: Sequence[RawFeature],
        dense_names: Sequence[str],
        vocabularies: Mapping[str, Vocabulary],
        transform: Literal["log", "none"],
        texts: GatheredTexts | None = None,
        further_labels: Sequence[str] = (),
        has_weights: bool = False,
    ) -> None:
        self.features = tuple(
            FeatureEntry(
                name=feature.name,
                table=feature.table,
                multi_hot=feature.multi_hot,
                kind=feature.kind,
                column=feature.column,
                separator=feature.separator,
            )
            for feature in features
        )
        self.schema = prepared_schema(
            self.features,
            len(dense_names),
            further_labels=further_labels,
            has_weights=has_weights,
        )
        self.has_weighty_rows = not has_weights
        """Whether a row to train on has a weight above 0."""
        self.used = UsedRows(vocabularies)
        self.clustering = LabelClustering()
        self._vocabularies, self._transform, self._texts = vocabularies, transform, texts
        self._dense_names = dense_names
        self._num_clipped = np.zeros(len(dense_names), np.int64)

    def encode(self, block: RawBlock, split: Split) -> Any:
        """The record batch of a block whose rows all go to `split`."""
        ids = []
        for feature, keys in zip(self.features, block.keys, strict=True):
            values = self._vocabularies[feature.table].ids(keys.values)
            ids.append((values, None if keys.offsets is None else keys.offsets.astype(np.int32)))
            if split == "train":
                self.used.add(feature.table, values)
            if self._texts is not None and keys.texts is not None:
                self._texts.add(feature.table, values, keys.texts)
        if split == "train":
            self.clustering.add(np.atleast_2d(block.labels.T)[0])
            self.has_weighty_rows |= block.weights is not None and bool(block.weights.any())
        dense = block.dense
        if self._transform == "log":
            self._num_clipped += np.count_nonzero(dense < 0, axis=0)
            dense = log_transform(dense)
        return record_batch(self.schema, block.labels, dense, ids, block.weights)

    @property
    def num_clipped(self) -> dict[str, int]:
        """How many values below 0 the transform has made 0, by dense feature."""
        counts = zip(self._dense_names, self._num_clipped.tolist(), strict=True)
        return {name: count for name, count in counts if count}
