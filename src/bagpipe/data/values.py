"""The values behind keys: told by the key, or gathered while the data are written.

Integers and Criteo's categories are told by their keys. For texts, the first one that gets an id is
kept, in a file without a name that goes with the process. Memory holds texts of BUFFER_BYTES, those
of one run of RUN_IDS ids while they are written, and a byte for each id.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bagpipe.data.arrow_keys import text_key
from bagpipe.data.raw import MISSING_KEY, Texts, ValueKind
from bagpipe.types import Int32Array, Int64Array

RUN_IDS: Final = 1 << 18
BUFFER_BYTES: Final = 64 << 20
_HEX_DIGITS: Final = 8
_SCHEMA: Final = pa.schema([("id", pa.int32()), ("value", pa.large_binary())])

TableKind: TypeAlias = ValueKind | Literal["mixed"]


def table_kind(kinds: Iterable[ValueKind]) -> TableKind:
    """What the values of a table are, by the kinds of its features.

    "mixed" is a table of features with texts and others with integers.
    """
    found: set[ValueKind] = set(kinds) - {"nothing"}
    if "unsigned" in found:
        found.discard("integer")
    return "mixed" if len(found) > 1 else next(iter(found), "nothing")


def has_texts(kind: TableKind) -> bool:
    """Whether keys do not tell the values."""
    return kind in ("text", "mixed")


def values_of_keys(keys: Int64Array, kind: TableKind) -> Any:
    """The values (n,) of keys (n,), as an Arrow array; null where a value is missing.

    They are int64, or uint64 of the kind "unsigned". Those of the kind "hexadecimal" are strings of
    8 digits, and those of a table with texts are integers in decimal digits.
    """
    missing = keys == MISSING_KEY
    if kind == "hexadecimal":
        return _hexadecimal(keys, missing)
    numbers: Any = keys.copy()
    if kind == "unsigned":
        numbers = numbers.view(np.uint64)
        numbers[keys == text_key(str(2**63).encode())] = 2**63
    else:
        numbers[keys == text_key(str(-(2**63)).encode())] = -(2**63)
    values = pa.array(numbers, mask=missing)
    return values.cast(pa.large_string()) if has_texts(kind) else values


def _hexadecimal(keys: Int64Array, missing: Any) -> Any:
    shifts = np.arange(4 * (_HEX_DIGITS - 1), -1, -4)
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)[(keys[:, None] >> shifts) & 15]
    offsets = np.arange(0, _HEX_DIGITS * len(keys) + 1, _HEX_DIGITS)
    buffers = [None, pa.py_buffer(offsets.astype(np.int64)), pa.py_buffer(digits.tobytes())]
    values = pa.Array.from_buffers(pa.large_string(), len(keys), buffers)
    return pc.if_else(pa.array(missing), pa.scalar(None, pa.large_string()), values)


class GatheredTexts:
    """A context manager that keeps one text of each id of some tables.

    Args:
        folder: Where there is room for all texts.
        num_known: For each table how many ids need no text, from 0 on.
        num_embeddings: For each table how many ids it has.
    """

    def __init__(
        self, folder: Path, num_known: Mapping[str, int], num_embeddings: Mapping[str, int]
    ) -> None:
        self._folder = folder
        self._done = {}
        for table, known in num_known.items():
            self._done[table] = np.zeros(num_embeddings[table], np.bool_)
            self._done[table][: max(known, 1)] = True  # id 0 has no value of its own
        self._pending: dict[str, list[tuple[Int32Array, Any]]] = {table: [] for table in num_known}
        self._pending_bytes = 0
        self._batches: dict[tuple[str, int], list[int]] = {}
        self._num_batches = 0
        self._binary: set[str] = set()
        self._stack = ExitStack()
        self._file: Any = None
        self._writer: Any = None
        self._reader: Any = None

    def __enter__(self) -> Self:
        self._file = self._stack.enter_context(tempfile.TemporaryFile(dir=self._folder))
        self._writer = pa.ipc.new_file(pa.PythonFile(self._file, "w"), _SCHEMA)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def add(self, table: str, ids: Int32Array, texts: Texts) -> None:
        """Takes ids (n,) and their texts (n,); a table that needs none is passed over."""
        done = self._done.get(table)
        if done is None:
            return
        new = np.flatnonzero(~done[ids])
        if not len(new):
            return
        uniques, firsts = np.unique(ids[new], return_index=True)
        done[uniques] = True
        values = texts.take(new[firsts]).array().cast(pa.large_binary())
        self._pending[table].append((uniques, values))
        self._pending_bytes += values.nbytes
        if not is_utf8(values):
            self._binary.add(table)
        if self._pending_bytes > BUFFER_BYTES:
            self._flush()

    def is_utf8(self, table: str) -> bool:
        """Whether all texts of a table are strings."""
        return table not in self._binary

    def run(self, table: str, number: int) -> Any:
        """The texts (RUN_IDS,) of ids from ``number * RUN_IDS + 1`` on, as a large_binary array.

        It is null where there is none. Nothing can be added after the first call.
        """
        if self._writer is not None:
            self._flush()
            self._writer.close()
            self._writer = None
            self._file.seek(0)
            self._reader = pa.ipc.open_file(pa.PythonFile(self._file, "r"))
        batches = [self._reader.get_batch(at) for at in self._batches.get((table, number), [])]
        if not batches:
            return pa.nulls(RUN_IDS, pa.large_binary())
        found = pa.Table.from_batches(batches)
        places = np.full(RUN_IDS, -1, np.int64)
        rows = found.column("id").to_numpy() - 1 - number * RUN_IDS
        places[rows] = np.arange(len(rows))
        taken = found.column("value").take(pa.array(places, mask=places < 0))
        return taken.combine_chunks()

    def _flush(self) -> None:
        for table, parts in self._pending.items():
            if not parts:
                continue
            ids = np.concatenate([ids for ids, _ in parts])
            order = np.argsort(ids)
            values = pa.concat_arrays([values for _, values in parts]).take(pa.array(order))
            ids = ids[order]
            runs, begins = np.unique((ids - 1) // RUN_IDS, return_index=True)
            for run, begin, end in zip(runs, begins, [*begins[1:], len(ids)], strict=True):
                columns = [pa.array(ids[begin:end]), values.slice(begin, end - begin)]
                self._writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
                self._batches.setdefault((table, int(run)), []).append(self._num_batches)
                self._num_batches += 1
            parts.clear()
        self._pending_bytes = 0


def is_utf8(values: Any) -> bool:
    """Whether all of an Arrow array of bytes are strings."""
    try:
        values.cast(pa.large_string())
    except pa.ArrowInvalid:
        return False
    return True
