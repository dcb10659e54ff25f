"""What an own loop says of its raw rows: columns by example, and how values become ids."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa

from bagpipe.data.arrow_keys import is_list, key_kind, single_keys, value_kind
from bagpipe.data.raw import ValueKind
from bagpipe.data.vocabulary import HashVocabulary, Vocabulary
from bagpipe.errors import ConfigError, DataError
from bagpipe.serving.inputs import Columns, FeatureColumn, Inputs
from bagpipe.serving.manifest import TableEntry
from bagpipe.serving.requests import arrow_values, as_record_batch
from bagpipe.serving.vocabularies import GivenIds, IdVocabulary
from bagpipe.types import Group, TableConfig

OwnVocabulary: TypeAlias = Literal["ids", "hash"] | Mapping[Any, int]
_WHERE = "the example"


@dataclass(frozen=True, kw_only=True)
class OwnInputs:
    """The columns and tables of an own loop's raw rows."""

    columns: Columns
    tables: tuple[TableEntry, ...]
    given: Mapping[str, _Given]
    """By table, the ids of values that are given one by one."""

    def write_dictionary(self, table: TableEntry, path: Path) -> None:
        """Writes which value has which id."""
        given = self.given[table.name]
        columns = [pa.array(given.ids), given.values, pa.array(given.keys)]
        rows = pa.record_batch(columns, names=["id", "value", "key"])
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, rows.schema) as writer:
            writer.write_batch(rows)


@dataclass(frozen=True, kw_only=True)
class _Given:
    """Values, their keys and their ids, each (n,)."""

    values: Any
    keys: Any
    ids: Any

    @classmethod
    def of(cls, table: TableConfig, ids: Mapping[Any, int]) -> _Given:
        where = f"vocabulary[{table.name!r}]"
        try:
            values = arrow_values(list(ids))
            found = np.array([operator.index(each) for each in ids.values()], np.int64)
        except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{where}: its values are of no common type, or its ids no integers: {error}"
            ) from error
        outside = np.flatnonzero((found < 0) | (found >= table.num_embeddings))
        if len(outside):
            raise ConfigError(
                f"{where}: {list(ids)[outside[0]]!r} has the id {found[outside[0]]}, must be from "
                f"0 to {table.num_embeddings - 1:,}, the table's last row"
            )
        if key_kind(values.type) not in ("integer", "text") or is_list(values.type):
            raise ConfigError(
                f"{where}: its values are of type {values.type}, must be integers, strings or "
                "booleans, and some of them no None"
            )
        keys = single_keys(values, where).values
        return cls(values=values, keys=keys, ids=found.astype(np.int32))


def own_inputs(
    groups: Sequence[Group],
    example: Any,
    vocabulary: Mapping[str, OwnVocabulary],
    columns: Mapping[str, str],
    transform: Literal["log", "none"],
) -> OwnInputs:
    """What example rows and vocabularies say; see `bagpipe.export`.

    Raises:
        ConfigError: a name is unknown, or a vocabulary does not fit its table.
        DataError: an example row can't be read.
    """
    tables = {table.name: table for group in groups for table in group.tables}
    of_features = {
        feature: group.tables[table].name
        for group in groups
        for feature, table in zip(group.features, group.feature_tables, strict=True)
    }
    _check_names("vocabulary", "table", vocabulary, tables)
    _check_names("columns", "feature", columns, of_features)
    given = {
        name: _Given.of(tables[name], ids)
        for name, ids in vocabulary.items()
        if isinstance(ids, Mapping)
    }
    by_feature = {feature: columns.get(feature, feature) for feature in of_features}
    rows = _as_rows(example, list(by_feature.values()))
    found = Columns(
        features=tuple(
            FeatureColumn(
                feature=feature,
                table=table,
                column=by_feature[feature],
                kind=_kind(
                    vocabulary.get(table, "ids"), given.get(table), rows, by_feature[feature]
                ),
                multi_hot=is_list(rows.schema.field(by_feature[feature]).type),
            )
            for feature, table in of_features.items()
        ),
        dense=tuple(name for name in rows.schema.names if name not in by_feature.values()),
        transform=transform,
    )
    entries = tuple(
        TableEntry(
            name=table.name,
            num_embeddings=table.num_embeddings,
            embedding_dim=table.embedding_dim,
            data_type=table.data_type,
            pooling=table.pooling,
            vocabulary="given" if name in given else _named(name, vocabulary.get(name, "ids")),
            dictionary=f"dictionary-{number:05d}.arrow" if name in given else None,
        )
        for number, (name, table) in enumerate(tables.items())
    )
    opened = {entry.name: _opened(entry, given) for entry in entries}
    Inputs(found, opened).encode_arrow(rows, _WHERE)  # refuses what a request could not have
    return OwnInputs(columns=found, tables=entries, given=given)


def _as_rows(example: Any, needed: Sequence[str]) -> Any:
    if isinstance(example, Sequence) and example and isinstance(example[0], Mapping):
        needed = [*needed, *(name for name in example[0] if name not in needed)]
    rows = as_record_batch(example, needed, _WHERE)
    if len(rows) == 0:
        raise DataError(f"{_WHERE}: has no rows, must have one at least, as requests will be")
    missing = [name for name in needed if name not in rows.schema.names]
    if missing:
        raise DataError(
            f"{_WHERE}: has no column {missing[0]!r}, which a feature is read from; it has "
            f"{', '.join(rows.schema.names)}: name another by `columns`"
        )
    return rows


def _check_names(
    what: str, kind: str, names: Mapping[str, object], known: Mapping[str, object]
) -> None:
    unknown = sorted(names.keys() - known.keys())
    if unknown:
        raise ConfigError(
            f"{what}: there is no {kind} {unknown[0]!r}; there are {', '.join(known)}"
        )


def _named(table: str, vocabulary: object) -> Literal["ids", "hash"]:
    if vocabulary == "ids":
        return "ids"
    if vocabulary == "hash":
        return "hash"
    raise ConfigError(
        f"vocabulary[{table!r}] is {vocabulary!r}, must be 'ids', 'hash', or a mapping from values "
        "to ids"
    )


def _kind(vocabulary: object, given: _Given | None, rows: Any, column: str) -> ValueKind:
    if given is not None:
        return value_kind([given.values.type])
    if vocabulary != "hash":
        return "integer"
    kind = value_kind([rows.schema.field(column).type])
    if kind == "nothing":
        raise DataError(
            f"{_WHERE}: column {column!r} is to be hashed and holds no value that does: give a row "
            "with an integer or a string there"
        )
    return kind


def _opened(entry: TableEntry, given: Mapping[str, _Given]) -> Vocabulary:
    if entry.vocabulary == "hash":
        return HashVocabulary(entry.num_embeddings)
    if entry.name in given:
        of_table = given[entry.name]
        return GivenIds(entry.name, of_table.keys, of_table.ids, entry.num_embeddings)
    return IdVocabulary(entry.name, entry.num_embeddings)
