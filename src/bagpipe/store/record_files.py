"""Files of records: Arrow IPC, rows int64 and records fixed_size_list<float32>.

Checkpoints are made of them. Records pass through in blocks, so memory is bounded by one block
whatever the size of the tables. Nothing here needs torch: servers write and read such files, too.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import xxhash

from bagpipe.errors import CheckpointError
from bagpipe.native.files import is_file_name
from bagpipe.types import Float32Array, Int64Array


@dataclass(frozen=True, kw_only=True)
class RecordFile:
    """What a checkpoint's manifest says of a file of records of one group."""

    name: str
    size_bytes: int
    xxh3_128: str
    shard: int
    """The shard whose rows it has, of `num_shards`."""
    num_shards: int
    num_records: int | None
    """None where the manifest, one of format 1, does not say."""
    is_whole: bool
    """Whether it has every touched row of its shard, so that the shard needs no file before it."""

    def __post_init__(self) -> None:
        if not is_file_name(self.name):
            raise ValueError(f"{self.name!r} must be the name of a file in the checkpoint's folder")
        if not 0 <= self.shard < self.num_shards:
            raise ValueError(f"{self.name} is of shard {self.shard} of {self.num_shards}")


def files_of_shard(
    files: Iterable[RecordFile], shard: int, num_shards: int
) -> tuple[RecordFile, ...]:
    """Those files of a group that can have rows of the shard, in their order.

    They are the shard's own, and all that were written when there were more or fewer shards.
    """
    return tuple(file for file in files if file.num_shards != num_shards or file.shard == shard)


def next_files(base: Iterable[RecordFile], written: Sequence[RecordFile]) -> tuple[RecordFile, ...]:
    """The files of a group's next checkpoint, in order: the last one that has a row counts for it.

    Args:
        base: the files of the checkpoint before.
        written: the new ones, one of each shard, which have all rows written since.

    Returns:
        The new ones, and before them those of the base that are still needed: not those of a shard
        that was written as a whole, and none at all once all shards were.
    """
    whole = {(file.shard, file.num_shards) for file in written if file.is_whole}
    if any(len(whole) == num_shards for _, num_shards in whole):
        return tuple(written)
    return (*(file for file in base if (file.shard, file.num_shards) not in whole), *written)


class HashingFile(io.RawIOBase):
    """Passes what is written on to a file, and hashes it on the way."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self.hash = xxhash.xxh3_128()
        self.size = 0

    def writable(self) -> bool:
        """Whether it takes bytes: yes."""
        return True

    def tell(self) -> int:
        """How many bytes it has taken."""
        return self.size

    def write(self, data: Any) -> int:
        """Writes all of `data`."""
        view = memoryview(data).cast("B")
        self._file.write(view)
        self.hash.update(view)
        self.size += len(view)
        return len(view)


@contextmanager
def new_file(path: Path) -> Iterator[HashingFile]:
    """Makes a file, which is on disk when the body ends. OSError: the system refuses."""
    with open(path, "xb") as raw:
        yield HashingFile(raw)
        raw.flush()
        os.fsync(raw.fileno())


def write_records(
    file: HashingFile, blocks: Iterable[tuple[Int64Array, Float32Array]], record_width: int
) -> int:
    """Writes records and returns how many there are.

    They come in blocks: rows (n,) int64, records (n, record_width) float32.
    """
    num_records = 0
    schema = _record_schema(record_width)
    with pa.ipc.new_file(pa.PythonFile(file, "w"), schema) as writer:
        for rows, records in blocks:
            values = pa.FixedSizeListArray.from_arrays(pa.array(records.reshape(-1)), record_width)
            writer.write_batch(pa.record_batch([pa.array(rows), values], schema=schema))
            num_records += len(rows)
    return num_records


def read_records(path: Path, record_width: int) -> Iterator[tuple[Int64Array, Float32Array]]:
    """The blocks that `write_records` wrote, memory-mapped.

    Yields rows (n,) int64 and records (n, record_width) float32.

    Raises:
        CheckpointError: it is not a file of such records.
    """
    try:
        with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
            if not reader.schema.equals(_record_schema(record_width)):
                raise CheckpointError(
                    f"{path}: holds other columns than rows and records of {record_width} floats"
                )
            for index in range(reader.num_record_batches):
                batch = reader.get_batch(index)
                records = (
                    batch.column(1)
                    .flatten()
                    .to_numpy(zero_copy_only=True)
                    .reshape(-1, record_width)
                )
                yield batch.column(0).to_numpy(zero_copy_only=True), records
    except (OSError, pa.ArrowInvalid) as error:
        raise CheckpointError(f"{path}: can't be read: {error}") from error


def check_num_records(checkpoint: Path, file: RecordFile, num_read: int) -> None:
    """Raises CheckpointError unless a file has as many records as its manifest says."""
    if file.num_records not in (None, num_read):
        raise CheckpointError(
            f"{checkpoint / file.name}: is damaged: has {num_read:,} records, the manifest says "
            f"{file.num_records:,}"
        )


def _record_schema(record_width: int) -> pa.Schema:
    item = pa.field("item", pa.float32())
    return pa.schema(
        [pa.field("row", pa.int64()), pa.field("record", pa.list_(item, record_width))]
    )
