"""All records of a group in memory-mapped files, for tables beyond RAM; the plan hides the disk's latency.

A folder holds `records.f32` (num_rows x record_width float32) and `touched.u8` (num_rows), both sparse, and `header.json`, which
says what they are. They are working state, not a checkpoint: a store starts empty, and a run restores it from its checkpoint.

Why a map and not system calls: rows that the page cache holds, most of a skewed stream's, are then plain memory. Measured on one
core and a virtual disk, 20,000 random records of 260 bytes in cache: 5 ms through the map, 110 ms by one `pwrite` or `preadv` each.
A map reports a full disk by killing the process, so blocks are reserved first (`bagpipe.store.sparse_file`), at 20 us a MiB, once.

Not for tables that fit RAM: the memory store gathers faster and takes no disk. Not on network file systems.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from bagpipe.errors import StoreError
from bagpipe.store.array import ArrayStore
from bagpipe.store.sparse_file import SparseFile
from bagpipe.types import Group, Int64Array

_FORMAT = 1
_HEADER, _RECORDS, _TOUCHED = "header.json", "records.f32", "touched.u8"


class FileStore(ArrayStore):
    """An `EmbeddingStore` in the files of one folder: `record_bytes` + 1 bytes a row of disk at most, and page cache as there is.

    Starts empty, whatever the folder held for these tables before. A folder that holds other tables' files is refused.

    Raises:
        StoreError: the folder is another store's, or its disk is full or can't be written.
    """

    def __init__(self, group: Group, seed: int, path: str | Path) -> None:
        self.path = Path(path)
        header = _header(group, seed)
        _check_folder(self.path, header)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            _write_header(self.path / _HEADER, header)
            self._records_file = SparseFile(self.path / _RECORDS, group.num_rows * group.record_bytes)
            self._touched_file = SparseFile(self.path / _TOUCHED, group.num_rows)
        except (OSError, OverflowError) as error:
            size_bytes = group.num_rows * (group.record_bytes + 1)
            raise StoreError(
                f"can't create the file store of {group.name} in {self.path}: {_reason(error)}; "
                f"it needs a writable folder, on a disk that allows files of {size_bytes:,} bytes"
            ) from error
        records = np.frombuffer(self._records_file.map, np.float32).reshape(group.num_rows, group.record_width)
        super().__init__(group, seed, records, np.frombuffer(self._touched_file.map, np.uint8))

    def close(self) -> None:
        """See `EmbeddingStore.close`. The files stay."""
        super().close()
        self._records_file.close()
        self._touched_file.close()

    def _erase(self) -> None:
        for file in (self._touched_file, self._records_file):
            try:
                file.erase()
            except OSError as error:
                raise StoreError(f"can't clear {file.path}: {_reason(error)}") from error

    def _make_room(self, rows: Int64Array) -> None:
        begin = rows * self.group.record_bytes
        try:
            self._touched_file.reserve(rows, rows)
            self._records_file.reserve(begin, begin + self.group.record_bytes - 1)
        except OSError as error:
            raise StoreError(
                f"can't write {len(rows):,} rows to {self._records_file.path}: {_reason(error)}; nothing was written: "
                f"free space on its disk, up to {self._records_file.map.size():,} bytes in all, or choose another store folder"
            ) from error


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _header(group: Group, seed: int) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "num_rows": group.num_rows,
        "record_width": group.record_width,
        "embedding_dim": group.embedding_dim,
        "optimizer": type(group.optimizer).__name__,
        "tables": [[table.name, table.num_embeddings] for table in group.tables],  # in order, which numbers the rows
        "seed": seed,
    }


def _write_header(path: Path, header: dict[str, Any]) -> None:
    """Renamed into place, so that a folder never holds half a header."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(header, indent=1), encoding="utf-8")
    os.replace(partial, path)


def _check_folder(folder: Path, header: dict[str, Any]) -> None:
    """Refuses a folder that belongs to other tables, so that a mistyped path destroys nothing."""
    remedy = "choose another folder or delete this one"
    try:
        found = json.loads((folder / _HEADER).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        present = [name for name in (_RECORDS, _TOUCHED) if (folder / name).exists()]
        if present:
            raise StoreError(f"{folder} holds {present[0]} but no {_HEADER}, so it is no file store's: {remedy}") from None
        return
    except (OSError, ValueError) as error:
        raise StoreError(f"can't read {folder / _HEADER} as a file store's header ({error}): {remedy}") from error
    if not isinstance(found, dict):
        raise StoreError(f"{folder / _HEADER} is not a file store's header: {remedy}")
    differing = [key for key in header if found.get(key) != header[key]]
    if differing:
        key = differing[0]
        raise StoreError(
            f"{folder} holds the file store of another run or other tables: {key} is {found.get(key)!r} there and "
            f"{header[key]!r} here; {remedy}"
        )
