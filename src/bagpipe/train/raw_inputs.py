"""Which raw rows a trained model reads: their columns, and what makes ids of their values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bagpipe.config.data import PreparedData
from bagpipe.config.run import RunConfig
from bagpipe.data.manifest import FeatureEntry, PreparedManifest
from bagpipe.errors import DataError
from bagpipe.serving.inputs import Columns, FeatureColumn, Inputs
from bagpipe.serving.manifest import TableEntry
from bagpipe.serving.vocabularies import open_vocabulary
from bagpipe.types import Group


def columns_of(config: RunConfig, groups: Sequence[Group], num_dense: int) -> Columns:
    """The columns that raw rows have, features in the order of pooled embeddings.

    Data that are made on the fly have a column for each feature, of ids.

    Raises:
        DataError: the data are gone, or an older version has prepared them.
    """
    features = [feature for group in groups for feature in group.features]
    if not isinstance(config.data, PreparedData):
        tables = [group.tables[table].name for group in groups for table in group.feature_tables]
        return Columns(
            features=tuple(
                FeatureColumn(
                    feature=name,
                    table=table,
                    column=name,
                    kind="integer",
                    multi_hot=name in config.data.multi_hot,
                )
                for name, table in zip(features, tables, strict=True)
            ),
            dense=tuple(f"I{number}" for number in range(1, num_dense + 1)),
            transform="none",
        )
    manifest = PreparedManifest.load(config.data.folder)
    entries = {entry.name: entry for entry in manifest.features}
    return Columns(
        features=tuple(_column(entries[name], config.data) for name in features),
        dense=manifest.dense_names,
        transform=manifest.dense_transform,
    )


def tables_of(config: RunConfig, groups: Sequence[Group]) -> tuple[TableEntry, ...]:
    """The tables of a run; dictionaries are files of the folder of its data."""
    manifest = (
        PreparedManifest.load(config.data.folder) if isinstance(config.data, PreparedData) else None
    )
    dictionaries = {} if manifest is None else manifest.dictionaries
    return tuple(
        TableEntry(
            name=table.name,
            num_embeddings=table.num_embeddings,
            embedding_dim=table.embedding_dim,
            data_type=table.data_type,
            pooling=table.pooling,
            vocabulary="ids" if manifest is None else manifest.vocabulary,
            dictionary=dictionaries[table.name].name if table.name in dictionaries else None,
        )
        for group in groups
        for table in group.tables
    )


def inputs_of(config: RunConfig, groups: Sequence[Group], num_dense: int) -> Inputs:
    """What encodes raw rows for a run's model.

    Raises:
        DataError: as `columns_of`, or a dictionary can't be read.
    """
    columns, tables = columns_of(config, groups, num_dense), tables_of(config, groups)
    folder = config.data.folder if isinstance(config.data, PreparedData) else Path()
    return Inputs(
        columns,
        {table.name: open_vocabulary(folder, table) for table in tables},
    )


def _column(entry: FeatureEntry, data: PreparedData) -> FeatureColumn:
    if entry.kind is None or entry.column is None:
        raise DataError(
            f"{data.folder}: its manifest does not say which column feature {entry.name!r} was "
            "read from, since an older version has prepared it: prepare the data again, which "
            "gives the same ids"
        )
    return FeatureColumn(
        feature=entry.name,
        table=entry.table,
        column=entry.column,
        kind=entry.kind,
        separator=entry.separator,
        multi_hot=entry.multi_hot,
    )
