"""`dictionary-N.arrow`, the dictionary of a table: which value has which id, in the order of ids.

An Arrow IPC file in record batches of `values.RUN_IDS` rows, with the columns

    id     int32    1, 2, 3, ..; id 0 is every other value, and has no row
    value  int64, uint64, large_string or large_binary (not UTF-8); null: the value is missing
    key    int64    what ids are looked up by (`bagpipe.data.raw`)
    count  int64    how often the value came in training, in all data that made the dictionary

Files of older versions have keys and counts only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bagpipe.data.files import HashingFile
from bagpipe.data.manifest import PreparedManifest, check_file
from bagpipe.data.values import (
    RUN_IDS,
    GatheredTexts,
    TableKind,
    has_texts,
    values_of_keys,
)
from bagpipe.errors import DataError
from bagpipe.types import Int64Array


@dataclass(frozen=True, kw_only=True)
class Dictionary:
    """A table's dictionary as it lies in its file, which is mapped.

    Row i is of id i + 1.
    """

    path: Path
    keys: Int64Array
    """(n,)"""
    counts: Int64Array
    """(n,)"""
    values: Any
    """(n,) a pyarrow.ChunkedArray; None in a file of an older version."""

    @classmethod
    def open(cls, folder: Path, table: str, *, verify: bool = True) -> Self:
        """Opens the dictionary of a table of prepared data.

        Args:
            folder: The folder of prepared data.
            table: The table's name.
            verify: Whether the file's checksum is compared.

        Raises:
            DataError: There is none, since ids are hashed; or the file is missing or altered.
        """
        manifest = PreparedManifest.load(folder)
        entry = manifest.dictionaries.get(table)
        if entry is None:
            raise DataError(
                f"{folder} has no dictionary of table {table!r}, but of "
                f"{', '.join(map(repr, manifest.dictionaries)) or 'none'} "
                f"(vocabulary.kind = {manifest.vocabulary!r})"
            )
        path = check_file(folder, entry, verify=verify)
        try:
            found = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
            keys, counts = (found.column(name).to_numpy() for name in ("key", "count"))
        except (pa.ArrowException, OSError, KeyError) as error:
            raise DataError(
                f"{path} can't be read as a dictionary: {error}: prepare the data again"
            ) from error
        values = found.column("value") if "value" in found.column_names else None
        return cls(path=path, keys=keys, counts=counts, values=values)

    def __len__(self) -> int:
        """How many ids there are, without id 0."""
        return len(self.keys)

    def require_values(self) -> Any:
        """The values (n,), which a file of an older version does not have.

        Raises:
            DataError: This is one.
        """
        if self.values is None:
            raise DataError(
                f"{self.path} has keys but no values, since an older version wrote it: prepare the "
                "data again, which gives the same ids"
            )
        return self.values


@dataclass(frozen=True, kw_only=True)
class TableValues:
    """The values of a table's ids, from the earlier dictionary, what was gathered, and the keys."""

    table: str
    kind: TableKind
    keys: Int64Array
    """(n,) by id."""
    texts: GatheredTexts
    known: Dictionary | None
    """The earlier dictionary, whose ids come first."""

    @property
    def type(self) -> Any:
        """Their Arrow type."""
        if not has_texts(self.kind):
            return values_of_keys(self.keys[:0], self.kind).type
        known = self._known_texts
        is_text = self.texts.is_utf8(self.table) and (
            known is None or pa.types.is_large_string(known.type)
        )
        return pa.large_string() if is_text else pa.large_binary()

    def rows(self, begin: int, end: int) -> Any:
        """The values of rows from `begin`, where a run begins, up to `end` in the same run."""
        keys = self.keys[begin:end]
        if not has_texts(self.kind):
            return values_of_keys(keys, self.kind)
        values = self.texts.run(self.table, begin // RUN_IDS).slice(0, end - begin)
        known = self._known_texts
        if known is not None and begin < len(known):
            earlier = known.slice(begin, end - begin).cast(pa.large_binary())
            values = pa.concat_arrays([*earlier.chunks, values.slice(len(earlier))])
        if self.kind == "mixed":
            numbers = values_of_keys(keys, self.kind).cast(pa.large_binary())
            values = pc.coalesce(values, numbers)
        return values.cast(self.type)

    @property
    def _known_texts(self) -> Any:
        if self.known is None or pa.types.is_integer(self.known.require_values().type):
            return None
        return self.known.values


def write_dictionary(path: Path, values: TableValues, counts: Int64Array) -> HashingFile:
    """Writes the dictionary of a table, run by run, and returns its file, closed.

    Args:
        path: The file, which is there and empty.
        values: Keys and values of the table.
        counts: (n,) by id.
    """
    keys = values.keys
    schema = pa.schema(
        [
            ("id", pa.int32()),
            ("value", values.type),
            ("key", pa.int64()),
            ("count", pa.int64()),
        ]
    )
    with HashingFile(path) as file, pa.ipc.new_file(file, schema) as writer:
        for begin in range(0, len(keys), RUN_IDS):
            end = min(begin + RUN_IDS, len(keys))
            columns = [
                pa.array(np.arange(begin + 1, end + 1, dtype=np.int32)),
                values.rows(begin, end),
                pa.array(keys[begin:end]),
                pa.array(counts[begin:end]),
            ]
            writer.write_batch(pa.record_batch(columns, schema=schema))
    return file
