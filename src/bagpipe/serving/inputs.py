"""From raw rows to what a model reads, as preparing did it for training.

A raw row has a value for each column: that of a categorical feature, or a dense number. Keys, ids
and the transform come from the code that prepares data, so that a value that is missing, or that
training has not seen, means what it meant there.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, Self

import numpy as np
import pyarrow as pa

from bagpipe.data.arrow_keys import is_list, key_kind
from bagpipe.data.arrow_numbers import dense_values
from bagpipe.data.parquet import feature_keys
from bagpipe.data.raw import MISSING_KEY, BlockPlace, Keys, Problems, ValueKind
from bagpipe.data.transforms import log_transform
from bagpipe.data.vocabulary import Vocabulary
from bagpipe.errors import DataError
from bagpipe.serving.together import Apart, Rows, dense_numbers
from bagpipe.serving.vocabularies import Vocabularies
from bagpipe.types import Float32Array, Int32Array, Int64Array

_HEX_DIGITS: Final = 8
_HOLDS: Final = {
    "integer": "integers",
    "unsigned": "integers",
    "hexadecimal": f"strings of up to {_HEX_DIGITS} hexadecimal digits",
    "text": "strings",
    "nothing": "nothing but missing values",
}
_ALIKE: Final = {"unsigned": "integer"}
"""Kinds whose columns are of the types of another kind."""


@dataclass(frozen=True, kw_only=True)
class FeatureColumn:
    """A categorical feature, and the column of raw rows that it is read from."""

    feature: str
    table: str
    column: str
    kind: ValueKind
    """What the column held in training; "nothing" there takes anything."""
    separator: str | None = None
    """What splits a string into several values."""
    multi_hot: bool = False

    @property
    def is_list(self) -> bool:
        """Whether a row has a list of values."""
        return self.multi_hot and self.separator is None


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Rows as a model reads them."""

    dense: Float32Array  # (n, D)
    single: Int32Array  # (S, n) the ids of each feature with one id a row
    bags: tuple[tuple[Int32Array, Int32Array], ...]
    """The ids and offsets (n + 1,) of each other feature."""

    @property
    def num_rows(self) -> int:
        return len(self.dense)

    def ids(self, features: Sequence[FeatureColumn]) -> Iterator[tuple[Any, Any]]:
        """Yields of each feature its ids, and offsets (n + 1,); None where it has one id a row."""
        single, bags = iter(self.single), iter(self.bags)
        for feature in features:
            yield next(bags) if feature.multi_hot else (next(single), None)


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns that a model reads of raw rows."""

    features: tuple[FeatureColumn, ...]
    dense: tuple[str, ...]
    transform: Literal["log", "none"]

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Makes them from what `as_dict` has made."""
        features = tuple(FeatureColumn(**feature) for feature in values["features"])
        return cls(features=features, dense=tuple(values["dense"]), transform=values["transform"])

    @property
    def names(self) -> tuple[str, ...]:
        """The columns, each once: dense ones, then those of features."""
        columns = (feature.column for feature in self.features)
        return tuple(dict.fromkeys((*self.dense, *columns)))


class Inputs:
    """Encodes raw rows.

    Args:
        columns: what is read of them.
        vocabularies: by table what makes ids of keys.
    """

    def __init__(self, columns: Columns, vocabularies: Mapping[str, Vocabulary]) -> None:
        self.columns = columns
        self._single = tuple(each for each in columns.features if not each.multi_hot)
        self._bags = tuple(each for each in columns.features if each.multi_hot)
        self._of_single = Vocabularies([vocabularies[each.table] for each in self._single])
        self._of_bags = tuple(vocabularies[each.table] for each in self._bags)
        alike: dict[str, list[int]] = {}
        for place, feature in enumerate(self._single):
            alike.setdefault(_ALIKE.get(feature.kind, feature.kind), []).append(place)
        self._alike = tuple(alike.values())
        """Places of features in `_single` whose columns may be of one type."""

    def encode_together(self, rows: Rows, where: str) -> Encoded:
        """Encodes rows, whose columns of one type are read in one call.

        Raises:
            Apart: columns must be read one by one, or be told what is wrong with them.
            DataError: something is wrong with them.
        """
        dense = dense_numbers(rows, self.columns.dense)
        keys = np.empty((len(self._single), rows.num_rows), np.int64)
        for places in self._alike:
            names = [self._single[place].column for place in places]
            for columns, array in rows.pieces(names):
                feature = self._single[places[columns[0]]]
                try:
                    found = self._keys(feature, array, where)
                except DataError:  # which would name the first column
                    raise Apart from None
                chosen = [places[column] for column in columns]
                keys[chosen] = found.values.reshape(len(chosen), rows.num_rows)
        bags = [
            self._keys(feature, array, where)
            for feature in self._bags
            for _, array in rows.pieces([feature.column])
        ]
        return self._encode(dense, keys, bags)

    def encode_arrow(self, rows: Any, where: str) -> Encoded:
        """Encodes an Arrow record batch that has the columns.

        Args:
            rows: the record batch (n,); further columns are passed over.
            where: what messages call it.

        Raises:
            DataError: a column is missing or of another type than in training, or a number is not
                finite.
        """
        names = rows.schema.names
        for name in self.columns.names:
            if (count := names.count(name)) != 1:
                has = f"has {count} columns named" if count else "has no column"
                raise DataError(
                    f"{where} {has} {name!r}, of which the model reads one; it has "
                    f"{', '.join(names) or 'none'}: give each column, null where a value is missing"
                )
        problems, good = Problems(on_error="skip"), np.ones(len(rows), np.bool_)
        dense = np.empty((len(rows), len(self.columns.dense)), np.float32)
        place = BlockPlace(where, 0, problems)
        for index, name in enumerate(self.columns.dense):
            dense[:, index] = dense_values(rows.column(name), name, good, place)
        for skipped in problems.skipped.values():
            raise DataError(skipped.first)
        keys = [
            self._keys(feature, rows.column(feature.column), where)
            for feature in self.columns.features
        ]
        return self.encode(dense, keys)

    def encode(self, dense: Float32Array, keys: Sequence[Keys]) -> Encoded:
        """Encodes rows whose keys have been read.

        Args:
            dense: numbers as read, 0 where missing: (n, D).
            keys: of each feature.
        """
        keys_of = list(zip(self.columns.features, keys, strict=True))
        single = [each.values for feature, each in keys_of if not feature.multi_hot]
        bags = [each for feature, each in keys_of if feature.multi_hot]
        found = np.array(single, np.int64).reshape(len(single), len(dense))
        return self._encode(dense, found, bags)

    def _encode(self, dense: Float32Array, single: Int64Array, bags: Sequence[Keys]) -> Encoded:
        if self.columns.transform == "log":
            dense = log_transform(dense)
        of_bags = []
        for each, vocabulary in zip(bags, self._of_bags, strict=True):
            assert each.offsets is not None
            of_bags.append((vocabulary.ids(each.values), each.offsets.astype(np.int32)))
        return Encoded(dense=dense, single=self._of_single.ids(single), bags=tuple(of_bags))

    def _keys(self, feature: FeatureColumn, values: Any, where: str) -> Keys:
        if feature.kind == "hexadecimal":
            return _hexadecimal_keys(feature, values, where)
        check_column(feature, values.type, where)
        return feature_keys(values, feature, feature.multi_hot, where)


def check_column(feature: FeatureColumn, kind: Any, where: str) -> None:
    """Raises DataError where a column of an Arrow type means other values than in training."""
    found, expected = key_kind(kind), feature.kind
    is_empty = pa.types.is_null(kind)
    if not is_empty and is_list(kind) != feature.is_list:
        one, many = "one value a row", "a list of values a row"
        has, had = (many, one) if is_list(kind) else (one, many)
        raise _other(feature, kind, where, f"has {has}, in training it had {had}")
    texts = {"text": "text", "nothing": found}.get(expected, "integer")
    if found not in ("nothing", texts) or found == "other":
        raise _other(feature, kind, where, f"in training it held {_HOLDS[expected]}")


def _other(feature: FeatureColumn, kind: Any, where: str, what: str) -> DataError:
    return DataError(
        f"{where}, column {feature.column!r} (feature {feature.feature!r}) is of type {kind}: "
        f"{what}, and values of another type would get other ids: convert it"
    )


def _hexadecimal_keys(feature: FeatureColumn, values: Any, where: str) -> Keys:
    """Keys of Criteo's categories: a string is the number that it writes, an empty one missing."""
    if key_kind(values.type) not in ("text", "nothing") or is_list(values.type):
        raise _other(feature, values.type, where, f"in training it held {_HOLDS[feature.kind]}")
    keys = np.full(len(values), MISSING_KEY, np.int64)
    for row, text in enumerate(values.cast(pa.large_string()).to_pylist()):
        if not text:
            continue
        if len(text) > _HEX_DIGITS or not set(text) <= set(string.hexdigits):
            raise DataError(
                f"{where}, row {row} (from 0): column {feature.column!r} is {text!r}, must be 1 to "
                f"{_HEX_DIGITS} hexadecimal digits, or null"
            )
        keys[row] = int(text, 16)
    return Keys(values=keys, offsets=None)
