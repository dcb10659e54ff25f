"""From keys to ids, as the manifest of an exported model says for each table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from bagpipe.data.raw import MISSING_KEY
from bagpipe.data.vocabulary import HashVocabulary, Vocabulary
from bagpipe.errors import DataError
from bagpipe.serving.manifest import TableEntry
from bagpipe.types import Int32Array, Int64Array


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
        keys: (n,) of ids 1 to n.
    """

    def __init__(self, keys: Int64Array) -> None:
        order = np.argsort(keys, kind="stable")
        self._keys, self._ids = keys[order], (order + 1).astype(np.int32)
        self.num_embeddings = 1 + len(keys)

    def ids(self, keys: Int64Array) -> Int32Array:
        """The ids (n,) of keys (n,)."""
        if len(self._keys) == 0:
            return np.zeros(len(keys), np.int32)
        places = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.where(self._keys[places] == keys, self._ids[places], np.int32(0))


def open_vocabulary(folder: Path, table: TableEntry) -> Vocabulary:
    """What makes ids of a table's keys.

    Raises:
        DataError: its dictionary can't be read, or is of a table of another size.
    """
    if table.vocabulary == "hash":
        return HashVocabulary(table.num_embeddings)
    if table.vocabulary == "ids":
        return IdVocabulary(table.name, table.num_embeddings)
    known = KnownValues(read_keys(folder / str(table.dictionary)))
    if known.num_embeddings != table.num_embeddings:
        raise DataError(
            f"{folder / str(table.dictionary)}: has {known.num_embeddings:,} ids, table "
            f"{table.name!r} has {table.num_embeddings:,} rows: export the run again"
        )
    return known


def read_keys(path: Path) -> Int64Array:
    """The keys of a dictionary, of ids 1 and up, in their order.

    Raises:
        DataError: the file can't be read.
    """
    try:
        with pa.memory_map(str(path)) as file, pa.ipc.open_file(file) as reader:
            keys: Int64Array = reader.read_all().column("key").to_numpy()
            return keys.copy()
    except (pa.ArrowException, OSError, KeyError) as error:
        raise DataError(f"{path}: can't be read as a dictionary: {error}") from error
