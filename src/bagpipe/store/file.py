"""All records of a group in memory-mapped files, for tables beyond RAM; the plan hides the disk's latency.

A folder holds `records.f32` (num_rows x record_width float32) and `touched.u8` (num_rows), both sparse, and `header.json`, which
says what they are. They are working state, not a checkpoint: a run starts them empty or restores them from its checkpoint.

Writing through a map to a hole of a sparse file on a full disk kills the process (SIGBUS), so each stretch of the file is reserved
with `posix_fallocate` before it is first written; a full disk is then a StoreError before anything is changed.
"""

from __future__ import annotations

import json
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bagpipe.errors import StoreError
from bagpipe.store.array import ArrayStore
from bagpipe.types import Group, Int64Array

_FORMAT = 1
_STRETCH_BYTES = 1 << 20
"""Reserved at a time: much more than a page, so that reserving is rare, and little enough that sparse rows stay sparse."""


class FileStore(ArrayStore):
    """An `EmbeddingStore` in the files of one folder, created anew; a folder that holds another table's files is refused."""

    def __init__(self, group: Group, seed: int, path: str | Path) -> None:
        self.path = Path(path)
        self._records_path, self._touched_path = self.path / "records.f32", self.path / "touched.u8"
        header = _header(group, seed)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            _check_header(self.path / "header.json", header)
            (self.path / "header.json").write_text(json.dumps(header, indent=1))
            super().__init__(group, seed, *self._create(group))
        except OSError as error:
            raise StoreError(f"can't create the file store in {self.path}: {error.strerror or error}") from error

    def clear(self) -> None:
        """See `EmbeddingStore.clear`."""
        self._open_records()
        try:
            self._records, self._touched = self._create(self.group)
        except OSError as error:
            raise StoreError(f"can't clear the file store in {self.path}: {error.strerror}") from error

    def close(self) -> None:
        """See `EmbeddingStore.close`."""
        self._records, self._touched = None, np.empty(0, np.uint8)

    def _create(self, group: Group) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
        """Empty files, mapped."""
        records = _map(self._records_path, np.dtype(np.float32), (group.num_rows, group.record_width))
        touched = _map(self._touched_path, np.dtype(np.uint8), (group.num_rows,))
        with self._touched_path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, group.num_rows)
        self._reserved = np.zeros(-(-records.nbytes // _STRETCH_BYTES), np.bool_)
        return records, touched

    def _make_room(self, rows: Int64Array) -> None:
        """Reserves the stretches of the file that `rows` lie in. Raises StoreError when the disk is full."""
        first = rows * self.group.record_bytes // _STRETCH_BYTES
        last = ((rows + 1) * self.group.record_bytes - 1) // _STRETCH_BYTES
        stretches = np.concatenate([first, last])
        missing = np.unique(stretches[~self._reserved[stretches]])
        if len(missing) == 0:
            return
        try:
            with self._records_path.open("r+b") as file:
                size = os.fstat(file.fileno()).st_size
                for stretch in missing.tolist():
                    begin = stretch * _STRETCH_BYTES
                    os.posix_fallocate(file.fileno(), begin, min(_STRETCH_BYTES, size - begin))
                    self._reserved[stretch] = True
        except OSError as error:
            raise StoreError(f"can't write to {self._records_path}: {error.strerror}; free some space on its disk") from error


def _map(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """A new sparse file of zeros, mapped for random access; the map outlives the file's name and handle."""
    path.unlink(missing_ok=True)
    size = int(np.prod(shape)) * dtype.itemsize
    with path.open("x+b") as file:
        file.truncate(size)
        mapped = mmap.mmap(file.fileno(), size)
    mapped.madvise(mmap.MADV_RANDOM)  # a fault reads one page, not the pages around it
    return np.frombuffer(mapped, dtype).reshape(shape)


def _header(group: Group, seed: int) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "num_rows": group.num_rows,
        "record_width": group.record_width,
        "embedding_dim": group.embedding_dim,
        "optimizer": type(group.optimizer).__name__,
        "tables": {table.name: table.num_embeddings for table in group.tables},
        "seed": seed,
    }


def _check_header(path: Path, header: dict[str, Any]) -> None:
    """Refuses a folder that belongs to other tables, so that a mistyped path destroys nothing."""
    if not path.exists():
        return
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise StoreError(f"{path} is not a file store's header ({error}): choose another folder or delete this one") from error
    differing = [key for key in header if found.get(key) != header[key]]
    if differing:
        key = differing[0]
        raise StoreError(
            f"{path.parent} holds the file store of other tables: {key} is {found.get(key)!r}, this run's is {header[key]!r}; "
            "choose another folder or delete this one"
        )
