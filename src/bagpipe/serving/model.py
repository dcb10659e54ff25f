"""An exported model, loaded to answer requests."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bagpipe.embeddings.table_file import open_table_file
from bagpipe.errors import DataError, StoreError
from bagpipe.serving.inputs import Columns, Encoded, Inputs
from bagpipe.serving.manifest import DENSE_NAME, TABLES_NAME, ExportManifest
from bagpipe.serving.requests import WHERE, Requests, as_record_batch
from bagpipe.serving.tables import FeatureTable, MappedTables
from bagpipe.serving.together import Apart, ArrowRows, DictRows
from bagpipe.serving.vocabularies import open_vocabulary
from bagpipe.types import Float32Array


class ServedModel:
    """Predicts raw rows; `load` makes one. Several threads may call it at a time."""

    def __init__(
        self,
        manifest: ExportManifest,
        inputs: Inputs,
        tables: MappedTables,
        dense_part: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        """Takes the parts."""
        self.manifest = manifest
        self._inputs, self._tables, self._dense_part = inputs, tables, dense_part

    def __repr__(self) -> str:
        told = self.manifest
        num_rows = sum(table.num_embeddings for table in told.tables)
        return (
            f"<ServedModel of step {told.step:,}: {', '.join(told.labels)} from "
            f"{', '.join(self.columns.names)}; {num_rows:,} rows in {len(told.tables)} tables>"
        )

    @property
    def columns(self) -> Columns:
        """What each row of a request has."""
        return self.manifest.columns

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of what is predicted."""
        return self.manifest.labels

    def predict(self, requests: Requests) -> Float32Array:
        """The probability of each row.

        The rows are one batch. `bagpipe predict` gives the same bits for batches of the same rows;
        in others the dense part may add up in another order.

        Args:
            requests: a list of dicts from column to value, or a pyarrow Table or RecordBatch. None,
                or null, is a missing value. Further columns are passed over.

        Returns:
            (n,) float32, or (n, L) of L labels, in the order of `labels`.

        Raises:
            DataError: a row lacks a column, or has a value of another type than in training.
        """
        encoded = self._encode(requests)
        if encoded.num_rows == 0:
            return np.empty((0,) if len(self.labels) == 1 else (0, len(self.labels)), np.float32)
        pooled = torch.from_numpy(self._tables.pool(encoded))
        with torch.inference_mode():
            logits = self._dense_part(torch.from_numpy(encoded.dense), pooled)
            scores: Float32Array = probabilities(logits).numpy()
        return scores

    def _encode(self, requests: Requests) -> Encoded:
        """Encodes requests, with columns read together where that can be."""
        inputs = self._inputs
        are_dicts = isinstance(requests, list) and all(isinstance(row, dict) for row in requests)
        if are_dicts and requests:
            with suppress(Apart):
                return inputs.encode_together(DictRows(requests), WHERE)
        rows = as_record_batch(requests, self.columns.names)
        if len(rows):
            with suppress(Apart):
                return inputs.encode_together(ArrowRows(rows), WHERE)
        return inputs.encode_arrow(rows, WHERE)


def probabilities(logits: Tensor) -> Tensor:
    """What is told of logits: float32 of the same shape."""
    return torch.sigmoid(logits)


def load(folder: str | Path, *, verify: bool = False) -> ServedModel:
    """Opens a folder that `bagpipe export` has written. Its tables are mapped, not read.

    Args:
        folder: the folder, which must stay as it is.
        verify: whether the checksums of the tables are compared, too, which reads all of them.

    Raises:
        DataError: it is no exported model, a file is missing, cut off or damaged, or versions do
            not fit.
    """
    folder = Path(folder)
    manifest = ExportManifest.load(folder)
    manifest.check_files(folder, verify=verify)
    shapes = {table.key: (table.num_embeddings, table.embedding_dim) for table in manifest.tables}
    try:
        found = open_table_file(folder / TABLES_NAME, shapes)
    except StoreError as error:
        raise DataError(f"{error}: export the run again") from error
    entries = {table.name: table for table in manifest.tables}
    of_features = [entries[feature.table] for feature in manifest.columns.features]
    tables = MappedTables(
        folder / TABLES_NAME,
        [FeatureTable(entry=entry, begin=found[entry.key].begin) for entry in of_features],
        [feature.multi_hot for feature in manifest.columns.features],
    )
    inputs = Inputs(
        manifest.columns,
        {table.name: open_vocabulary(folder, table) for table in manifest.tables},
    )
    return ServedModel(
        manifest,
        inputs,
        tables,
        _load_dense_part(folder / DENSE_NAME, manifest),
    )


def _load_dense_part(path: Path, manifest: ExportManifest) -> Callable[[Tensor, Tensor], Tensor]:
    from torch.export import load as load_program  # a second, and not needed to look at a request

    try:
        with warnings.catch_warnings():
            # torch 2.11 reads constants from bytes, to which nothing writes
            warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
            program: Any = load_program(path)
    except Exception as error:  # torch raises what it likes
        raise DataError(
            f"{path}: torch {torch.__version__} can't read it, which torch "
            f"{manifest.versions.get('torch')} has written: {error}: install that version, or "
            "export the run again with this one"
        ) from error
    part: Callable[[Tensor, Tensor], Tensor] = program.module()
    return part
