"""All records of a group in a memory-mapped file, for tables beyond RAM.

The plan hides the disk's latency: rows are fetched steps ahead of their use.

A folder holds `records.f32` (num_rows x record_width float32, sparse) and `header.json`, which says
what it is. Which rows are touched is kept in memory, one byte a row: merely looking at a hole of a
mapped file may need a block (on tmpfs), and a full disk then kills the process. A store that is
closed leaves that in `touched.bits`, a bit a row, and can be opened again. The file goes when it
is, since rows then change: after a crash nothing says which rows are whole. A run of `bagpipe
train` restores its stores from a checkpoint, so its files are working state and start empty.

Why a map and not system calls: rows that the page cache holds, most of a skewed stream's, are then
plain memory. On one core and a virtual disk, 20,000 random records of 260 bytes in the page cache
took 5 ms through the map and 110 ms with one `pwrite` or `preadv` each. A map reports a full disk
by killing the process, so blocks are reserved first (`bagpipe.store.sparse_file`), once, at 20 us
a MiB.

Beyond RAM the page cache keeps the pages used last, in the memory that the process itself leaves
free. A row out of cache costs one read of the disk (120 us a row here, 26 us with 16 threads).
Fetches read no pages around the row: with random rows those would push others out of the cache. A
snapshot does read ahead (7.6 us a row without, 1.1 us with).

The kernel writes dirty pages to disk behind the run, a whole page even for a single row, and it
starts long before memory is short: past its limits, by default 10 and 20 % of memory, writes wait
for the disk. Where the file fits the page cache, raise them:
`sysctl -w vm.dirty_background_ratio=85 vm.dirty_ratio=90` took a step from 7.3 ms to 2.3
(docs/results.md).

Do not use it for tables that fit RAM: the memory store takes no disk and needs no write-out. Do not
use it on network file systems, nor on those that copy on write (btrfs, ZFS): there, overwriting a
reserved block needs a new one, and a full disk kills the process all the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash

from bagpipe.errors import StoreError
from bagpipe.native.files import replaced
from bagpipe.store.array import TOUCHED, ArrayStore, Places
from bagpipe.store.sparse_file import SparseFile
from bagpipe.types import Float32Array, Group, Int64Array, UInt8Array

_FORMAT = 1
_DIGEST_BYTES = 16
_HEADER, _RECORDS, _TOUCHED = "header.json", "records.f32", "touched.bits"


class FileStore(ArrayStore):
    """An `EmbeddingStore` in one folder.

    Takes at most `record_bytes` of disk and one byte of memory a row, and what page cache there
    is.

    Args:
        group: the group whose records these are.
        seed: what initial records are drawn from.
        path: the folder, made where it is missing; one that holds other tables' files is refused.
        shard: the shard whose rows it has, of `num_shards`.
        existing: what becomes of rows of the same tables that the folder holds. "refuse": it is
            refused. "reopen": the store goes on with them, where it was closed before; the count
            of steps, which Adam needs, is not among them, see `bagpipe.save`. "overwrite": the
            store starts empty, and is working state: closing it does not wait for the disk, and
            it can't be opened again. A checkpoint may be restored into it.

    Raises:
        StoreError: the folder holds rows that `existing` refuses or that can't be opened, or it is
            another store's, or its disk is full or can't be written.
    """

    def __init__(
        self,
        group: Group,
        seed: int,
        path: str | Path,
        *,
        shard: int = 0,
        num_shards: int = 1,
        existing: Literal["refuse", "reopen", "overwrite"] = "refuse",
    ) -> None:
        if existing not in ("refuse", "reopen", "overwrite"):
            raise StoreError(f"existing is {existing!r}, must be 'refuse', 'reopen' or 'overwrite'")
        self.path = Path(path)
        self._is_kept, self._pid = existing != "overwrite", os.getpid()
        places = Places(group, shard, num_shards)
        self._num_places = places.num_places
        header = _header(group, seed) | {"shard": shard, "num_shards": num_shards}
        _check_folder(self.path, header)
        touched = self._kept_rows(group, existing) if _holds_rows(self.path) else None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            _write_header(self.path / _HEADER, header)
            self._file = SparseFile(
                self.path / _RECORDS,
                self._num_places,
                group.record_bytes,
                is_there=touched is not None,
            )
            (self.path / _TOUCHED).unlink(missing_ok=True)
        except BlockingIOError as error:
            raise StoreError(
                f"{self.path} is open in another store, of this process or another one: close "
                "that first"
            ) from error
        except (OSError, OverflowError) as error:
            size_bytes = self._num_places * group.record_bytes
            raise StoreError(
                f"can't create the file store of {group.name} in {self.path}: {_reason(error)}; "
                f"it needs a writable folder, on a disk that allows files of {size_bytes:,} bytes"
            ) from error
        super().__init__(group, seed, self._mapped_records(group), touched, places)
        if touched is not None:
            for rows in self._touched_blocks(1 << 20):
                self._file.note_reserved(self._places(rows))

    def close(self) -> None:
        """See `EmbeddingStore.close`. The files stay, and can be opened again.

        Raises:
            StoreError: the disk is full or has failed, and they can't.
        """
        arrays = self._arrays
        super().close()
        try:
            if arrays is not None and self._is_kept and os.getpid() == self._pid:
                self._file.sync()  # before what says that rows are there
                _write_touched(self.path / _TOUCHED, arrays[1])
        except OSError as error:
            raise StoreError(
                f"{self.path} can't be kept: {_reason(error)}; it is closed, and can't be opened "
                "again: restore a checkpoint"
            ) from error
        finally:
            self._file.close()

    def _kept_rows(self, group: Group, existing: str) -> UInt8Array | None:
        """Which rows (num_rows,) the folder's files hold; None: it is to start empty."""
        if existing == "overwrite":
            return None
        if existing == "refuse":
            raise StoreError(
                f"{self.path} holds rows of these tables: FileStore(existing='reopen') goes on "
                "with them, 'overwrite' starts empty; or choose another folder"
            )
        return _read_touched(self.path / _TOUCHED, group.num_rows)

    def _mapped_records(self, group: Group) -> Float32Array:
        return np.frombuffer(self._file.map, np.float32).reshape(
            self._num_places, group.record_width
        )

    def _erased_records(self) -> Float32Array:
        try:
            self._file.erase()
        except OSError as error:
            raise StoreError(
                f"can't clear {self._file.path}: {_reason(error)}; the store is closed: make a new "
                "one"
            ) from error
        return self._mapped_records(self.group)

    def _make_room(self, places: Int64Array) -> None:
        try:
            self._file.reserve(places)
        except OSError as error:
            raise StoreError(
                f"can't write {len(places):,} rows to {self._file.path}: {_reason(error)}; nothing "
                f"was written: free space on its disk, up to {self._file.map.size():,} bytes in "
                "all, or choose another store folder"
            ) from error

    def _snapshot(self, block_rows: int) -> Iterator[tuple[Int64Array, Float32Array]]:
        with self._file.reading_ahead():
            yield from super()._snapshot(block_rows)


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _header(group: Group, seed: int) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "num_rows": group.num_rows,
        "record_width": group.record_width,
        "embedding_dim": group.embedding_dim,
        "data_type": group.data_type,
        "optimizer": type(group.optimizer).__name__,
        # In the group's order, which numbers the rows.
        "tables": [[table.name, table.num_embeddings] for table in group.tables],
        "seed": seed,
    }


def _write_header(path: Path, header: dict[str, Any]) -> None:
    """Writes the header and renames it into place: a folder never holds half a header."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(header, indent=1), encoding="utf-8")
    os.replace(partial, path)


def _check_folder(folder: Path, header: dict[str, Any]) -> None:
    """Refuses a folder that belongs to other tables, so that a mistyped path destroys nothing."""
    remedy = "choose another folder or delete this one"
    try:
        found = json.loads((folder / _HEADER).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        if (folder / _RECORDS).exists():
            raise StoreError(
                f"{folder} holds {_RECORDS} but no {_HEADER}, so it is no file store's: {remedy}"
            ) from None
        return
    except (OSError, ValueError) as error:
        raise StoreError(
            f"can't read {folder / _HEADER} as a file store's header ({error}): {remedy}"
        ) from error
    if not isinstance(found, dict):
        raise StoreError(f"{folder / _HEADER} is not a file store's header: {remedy}")
    found = {"shard": 0, "num_shards": 1, **found}  # older versions had all rows
    differing = [key for key in header if found.get(key) != header[key]]
    if differing:
        key = differing[0]
        raise StoreError(
            f"{folder} holds the file store of another run or other tables: {key} is "
            f"{found.get(key)!r} there and {header[key]!r} here; {remedy}"
        )


def _holds_rows(folder: Path) -> bool:
    """Whether any row was ever written to a folder's file: only then it has blocks."""
    try:
        return (folder / _RECORDS).stat().st_blocks > 0
    except (FileNotFoundError, NotADirectoryError):
        return False


def _write_touched(path: Path, touched: UInt8Array) -> None:
    """Writes which rows are touched, a bit a row, behind a checksum of that."""
    bits = np.packbits(touched & TOUCHED)
    with replaced(path, StoreError) as partial, partial.open("wb") as file:
        file.write(xxhash.xxh3_128(bits.data).digest())
        file.write(bits.data)


def _read_touched(path: Path, num_rows: int) -> UInt8Array:
    """Flags (num_rows,) of the rows that are touched. StoreError: it can't be told."""
    remedy = "restore a checkpoint into it, with existing='overwrite'"
    try:
        content = np.fromfile(path, np.uint8)
    except FileNotFoundError as error:
        raise StoreError(
            f"{path.parent} can't be opened again: it is open, or its store was not closed, as by "
            f"a process that was killed, so nothing says which rows are whole: {remedy}"
        ) from error
    digest, bits = content[:_DIGEST_BYTES].tobytes(), content[_DIGEST_BYTES:]
    if len(bits) != -(-num_rows // 8) or xxhash.xxh3_128(bits.data).digest() != digest:
        raise StoreError(f"{path} is damaged: {remedy}")
    return np.unpackbits(bits, count=num_rows)
