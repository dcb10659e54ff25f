"""Raw files as batches for a trained model: encoded as they are read, nothing is prepared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from bagpipe.config.data import LabelColumn, ParquetFiles, SparseColumn
from bagpipe.data.base import Batch, FeatureSpec
from bagpipe.data.criteo import SPARSE_NAMES, CriteoSource
from bagpipe.data.parquet import BLOCK_ROWS, ParquetSource, schema_of
from bagpipe.data.raw import Problems, RawBlock, RawSource
from bagpipe.errors import DataError
from bagpipe.serving.inputs import Columns, Encoded, FeatureColumn, Inputs, check_column
from bagpipe.types import Jagged


@dataclass(frozen=True, kw_only=True)
class RawRows:
    """Raw files as a `BatchSource` that is read once, front to back.

    Each file begins a new batch. Rows that can't be read are refused, since each is to be scored.
    """

    files: tuple[Path, ...]
    is_criteo: bool
    inputs: Inputs
    features: tuple[FeatureSpec, ...]
    labels: tuple[LabelColumn, ...]
    has_labels: bool
    weight: str | None
    """The column with samples' weights, if each file has it."""
    num_samples: int

    @property
    def num_dense(self) -> int:
        """Number of dense features per sample."""
        return len(self.inputs.columns.dense)

    @property
    def label_names(self) -> tuple[str, ...]:
        """The names of the labels."""
        return tuple(label.label for label in self.labels)

    @property
    def has_weights(self) -> bool:
        """Whether the files have weights."""
        return self.weight is not None

    def batches(
        self, *, batch_size: int, epoch: int = 0, start: int = 0, drop_last: bool = False
    ) -> Iterator[Batch]:
        """Yields all batches; see `BatchSource`. It has one epoch, and begins at its start."""
        for read in self.reads(batch_size=batch_size):
            yield read()

    def reads(
        self, *, batch_size: int, epoch: int = 0, start: int = 0, drop_last: bool = False
    ) -> Iterator[Callable[[], Batch]]:
        """Yields calls that encode a batch each."""
        block_rows = max(1, BLOCK_ROWS // batch_size) * batch_size
        source = _open(self, block_rows)
        names = [feature.name for feature in source.features]
        order = [names.index(each.feature) for each in self.inputs.columns.features]
        problems = Problems(on_error="skip")
        for block in source.blocks(problems, lambda _: None, "predicting"):
            for skipped in problems.skipped.values():
                raise DataError(
                    f"{skipped.first}: each row is to be scored, so repair it or leave it out of "
                    "the file"
                )
            for begin in range(0, len(block.rows), batch_size):
                chosen = np.arange(begin, min(begin + batch_size, len(block.rows)))
                yield partial(self._encode, block.take(chosen), order)

    def _encode(self, block: RawBlock, order: Sequence[int]) -> Batch:
        encoded = self.inputs.encode(block.dense, [block.keys[place] for place in order])
        return Batch(
            dense=encoded.dense,
            sparse=_as_jagged(self.inputs.columns.features, encoded),
            labels=block.labels,
            weights=block.weights,
        )


def open_raw_rows(
    files: Sequence[Path],
    inputs: Inputs,
    features: Sequence[FeatureSpec],
    labels: Sequence[LabelColumn],
    weight: str | None = None,
    *,
    is_criteo: bool,
) -> RawRows:
    """Opens raw files.

    Args:
        files: Parquet files, or Criteo's text.
        inputs: what encodes their rows.
        features: of the model.
        labels: the columns of the labels, which Parquet files need not have.
        weight: the column with samples' weights; nor this one.
        is_criteo: whether they are Criteo's text.

    Raises:
        DataError: a column is missing or of another type than in training, or a file can't be read.
    """
    has_labels = is_criteo or all(_all_have(files, label.column) for label in labels)
    if not is_criteo:
        _check_types(files, inputs.columns)
    rows = RawRows(
        files=tuple(files),
        is_criteo=is_criteo,
        inputs=inputs,
        features=tuple(features),
        labels=tuple(labels),
        has_labels=has_labels,
        weight=weight if weight is not None and _all_have(files, weight) else None,
        num_samples=0,
    )
    num_samples = _open(rows, BLOCK_ROWS).num_rows()
    return RawRows(**{**vars(rows), "num_samples": num_samples})


def _all_have(files: Sequence[Path], column: str) -> bool:
    return all(column in schema_of(file).names for file in files)


def _check_types(files: Sequence[Path], columns: Columns) -> None:
    for file in files:
        schema = schema_of(file)
        for feature in columns.features:
            if schema.names.count(feature.column) == 1:  # else the source refuses the file
                check_column(feature, schema.field(feature.column).type, str(file))


def _open(rows: RawRows, block_rows: int) -> RawSource:
    if rows.is_criteo:
        return CriteoSource(rows.files, [None] * len(SPARSE_NAMES))
    columns = rows.inputs.columns
    config = ParquetFiles(
        kind="parquet",
        files=tuple(map(str, rows.files)),
        labels=rows.labels,
        weight=rows.weight,
        dense=columns.dense,
        sparse=tuple(
            SparseColumn(column=each.column, name=each.feature, separator=each.separator)
            for each in columns.features
        ),
    )
    return ParquetSource(rows.files, config, has_label=rows.has_labels, block_rows=block_rows)


def _as_jagged(features: Sequence[FeatureColumn], encoded: Encoded) -> Jagged:
    """The ids of encoded rows; there are offsets for all features where one has them."""
    of_features = list(encoded.ids(features))
    values = np.concatenate([ids for ids, _ in of_features])
    offsets = None
    if encoded.bags:
        lengths = [
            np.ones(encoded.num_rows, np.int32) if of_feature is None else np.diff(of_feature)
            for _, of_feature in of_features
        ]
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int32)
    names = tuple(feature.feature for feature in features)
    return Jagged(keys=names, values=values, batch_size=encoded.num_rows, offsets=offsets)
