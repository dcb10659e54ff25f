"""From keys to ids, as the manifest of an exported model says for each table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from bagpipe.data.raw import MISSING_KEY
from bagpipe.data.transforms import hash_ids
from bagpipe.data.vocabulary import HashVocabulary, Vocabulary
from bagpipe.errors import DataError
from bagpipe.types import Int32Array, Int64Array

if TYPE_CHECKING:
    from bagpipe.serving.manifest import TableEntry


class IdVocabulary:
    """Values are ids already, as in data that are made on the fly.

    Args:
        table: what messages call the table.
        num_embeddings: ids are below it.
    """

    def __init__(self, table: str, num_embeddings: int) -> None:
        self._table, self.num_embeddings = table, num_embeddings

    def ids(self, keys: Int64Array) -> Int32Array:
        """The ids (n,) of keys (n,). DataError: one is missing, or outside of the table."""
        bad = np.flatnonzero((keys < 0) | (keys >= self.num_embeddings))
        if len(bad):
            value = "missing" if keys[bad[0]] == MISSING_KEY else keys[bad[0]]
            raise DataError(
                f"table {self._table!r}: an id is {value}, must be from 0 to "
                f"{self.num_embeddings - 1:,}: the model was trained on ids, so give ids"
            )
        return keys.astype(np.int32)


class KnownValues:
    """The ids of a dictionary that has been made; 0 is every other value.

    Args:
        keys: (n,) of ids 1 to n, or of `ids`.
        ids: (n,)
    """

    def __init__(self, keys: Int64Array, ids: Int32Array | None = None) -> None:
        order = np.argsort(keys, kind="stable")
        of_order = (order + 1).astype(np.int32) if ids is None else ids[order]
        # keys beyond the last one find one more, whose id is that of every other value
        self._keys = np.append(keys[order], MISSING_KEY)
        self._ids = np.append(of_order, np.int32(0))
        self.num_embeddings = 1 + len(keys)

    def ids(self, keys: Int64Array) -> Int32Array:
        """The ids (n,) of keys (n,)."""
        places = self._keys[:-1].searchsorted(keys)
        return np.where(self._keys[places] == keys, self._ids[places], np.int32(0))


class GivenIds(KnownValues):
    """Ids that an own loop has given to values, one by one.

    Id 0 is every other value, unless a value has it: then others are refused.

    Args:
        table: what messages call the table.
        keys: (n,)
        ids: (n,) of these keys.
        num_embeddings: ids are below it.
    """

    def __init__(self, table: str, keys: Int64Array, ids: Int32Array, num_embeddings: int) -> None:
        super().__init__(keys, ids)
        self._table, self._is_closed = table, bool((ids == 0).any())
        self.num_embeddings = num_embeddings

    def ids(self, keys: Int64Array) -> Int32Array:
        """The ids (n,) of keys (n,). DataError: one is unknown, and id 0 is of another value."""
        if self._is_closed and not (known := np.isin(keys, self._keys[:-1])).all():
            raise DataError(
                f"table {self._table!r}: of {len(keys)} values {np.count_nonzero(~known)} are "
                "missing or not in the vocabulary that the model was exported with, which gives "
                "id 0 to a value of its own: give known values"
            )
        return super().ids(keys)


class Vocabularies:
    """The vocabularies of several features, asked together where they are of one kind."""

    def __init__(self, of_features: Sequence[Vocabulary]) -> None:
        places = range(len(of_features))
        hashed = [place for place in places if isinstance(of_features[place], HashVocabulary)]
        of_ids = [place for place in places if isinstance(of_features[place], IdVocabulary)]
        sizes = np.array([each.num_embeddings for each in of_features], np.int64)[:, None]
        self._of_features, self._sizes = tuple(of_features), sizes
        self._hashed, self._of_ids = np.array(hashed, np.intp), np.array(of_ids, np.intp)
        self._others = [place for place in places if place not in {*hashed, *of_ids}]

    def ids(self, keys: Int64Array) -> Int32Array:
        """The ids (F, n) of keys (F, n). DataError: a vocabulary refuses one of them."""
        ids = np.empty(keys.shape, np.int32)
        if len(self._hashed):
            ids[self._hashed] = hash_ids(keys[self._hashed], self._sizes[self._hashed])
        if len(self._of_ids):
            of_ids, sizes = keys[self._of_ids], self._sizes[self._of_ids]
            if ((of_ids < 0) | (of_ids >= sizes)).any():
                for place in self._of_ids:  # the first that has a bad one says so
                    self._of_features[place].ids(keys[place])
            ids[self._of_ids] = of_ids
        for place in self._others:
            ids[place] = self._of_features[place].ids(keys[place])
        return ids


def open_vocabulary(folder: Path, table: TableEntry) -> Vocabulary:
    """What makes ids of a table's keys.

    Raises:
        DataError: its dictionary can't be read, or is of a table of another size.
    """
    if table.vocabulary == "hash":
        return HashVocabulary(table.num_embeddings)
    if table.vocabulary == "ids":
        return IdVocabulary(table.name, table.num_embeddings)
    if table.vocabulary == "given":
        keys, ids = _read(folder / str(table.dictionary), "key", "id")
        if len(ids) and not 0 <= ids.min() <= ids.max() < table.num_embeddings:
            raise DataError(
                f"{folder / str(table.dictionary)}: has ids outside of table {table.name!r}, which "
                f"has {table.num_embeddings:,} rows: export the model again"
            )
        return GivenIds(table.name, keys, ids, table.num_embeddings)
    (keys,) = _read(folder / str(table.dictionary), "key")
    known = KnownValues(keys)
    if known.num_embeddings != table.num_embeddings:
        raise DataError(
            f"{folder / str(table.dictionary)}: has {known.num_embeddings:,} ids, table "
            f"{table.name!r} has {table.num_embeddings:,} rows: export the run again"
        )
    return known


def _read(path: Path, *columns: str) -> tuple[Any, ...]:
    """Columns of a dictionary.

    Raises:
        DataError: the file can't be read.
    """
    try:
        with pa.memory_map(str(path)) as file, pa.ipc.open_file(file) as reader:
            table = reader.read_all()
            return tuple(table.column(name).to_numpy().copy() for name in columns)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise DataError(f"{path}: can't be read as a dictionary: {error}") from error
