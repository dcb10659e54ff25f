"""Tables as files, in memory that does not grow with them.

The file of all tables is made at its full size and mapped. Every row gets its initial weights, and
then those of the records that were written, in their order, as a store would take them.
Nothing is kept: the operating system writes the mapped pages out, and they are let go of block by
block. A block of records may have rows of all the tables, each of which would map up to a huge page
around it. So its rows are written in the order of the file, and let go of span by span.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from bagpipe.cache.weights import TORCH_DTYPES
from bagpipe.embeddings.table_file import header_of, open_table_file, weight_key
from bagpipe.exporting.parts import Exported, OnStage
from bagpipe.serving.manifest import TABLES_NAME, TableEntry
from bagpipe.store import RowInitializer
from bagpipe.types import Float32Array, Group, Int64Array

Weights: TypeAlias = npt.NDArray[Any]
BLOCK_ROWS = 65_536
SPAN_BYTES = 64 << 20
"""Of a group's weights, about how much is mapped at a time."""
_DTYPES = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16}
_ARROW_TYPES = {"fp32": pa.float32(), "fp16": pa.float16(), "bf16": pa.uint16()}
"""Arrow has no bfloat16: its 16 bits stand there as a number."""


def num_weight_bytes(groups: Sequence[Group]) -> int:
    """How many bytes the weights of all tables take."""
    return sum(
        group.num_rows * group.embedding_dim * np.dtype(_DTYPES[group.data_type]).itemsize
        for group in groups
    )


def write_safetensors(of: Exported, path: Path, on_stage: OnStage) -> None:
    """Writes the weights of all tables to one file, under the keys of `save_tables`.

    Raises:
        OSError: there is no room.
        CheckpointError: a file of records is damaged.
    """
    shapes = {
        weight_key(table.name): (table.num_embeddings, table.embedding_dim)
        for group in of.groups
        for table in group.tables
    }
    dtypes = [TORCH_DTYPES[table.data_type] for group in of.groups for table in group.tables]
    header, size_bytes = header_of(
        {key: (dtype, shape) for (key, shape), dtype in zip(shapes.items(), dtypes, strict=True)}
    )
    with path.open("w+b") as file:
        file.write(header)
        file.flush()
        os.posix_fallocate(file.fileno(), 0, size_bytes)  # else a full disk ends the process
        mapped = mmap.mmap(file.fileno(), 0)
    begins = {key: table.begin for key, table in open_table_file(path, shapes).items()}
    for number, group in enumerate(of.groups, 1):
        keys = [weight_key(table.name) for table in group.tables]
        views = [_view(mapped, group, begins[key], shapes[key]) for key in keys]
        _fill(group, of.seed, views, mapped, on_stage)
        for rows, records in of.records(group):
            for places in _spans(group, rows):
                _put(group, views, rows[places], records[places])
                mapped.madvise(mmap.MADV_DONTNEED)
        on_stage("records", number, len(of.groups))


def write_arrow(folder: Path, tables: Sequence[TableEntry], on_stage: OnStage) -> None:
    """Writes each table's weights to an Arrow file of its own, from the file of all tables.

    Its column `weights` is a fixed-size list, in record batches of `BLOCK_ROWS` rows.
    """
    path = folder / TABLES_NAME
    shapes = {table.key: (table.num_embeddings, table.embedding_dim) for table in tables}
    found = open_table_file(path, shapes)
    for number, table in enumerate(tables, 1):
        kind = pa.list_(_ARROW_TYPES[table.data_type], table.embedding_dim)
        schema = pa.schema([pa.field("weights", kind)])
        with (
            pa.OSFile(str(folder / str(table.arrow)), "wb") as file,
            pa.ipc.new_file(file, schema) as writer,
        ):
            for weights in _blocks(path, found[table.key].begin, table):
                writer.write_batch(
                    pa.record_batch(
                        [pa.FixedSizeListArray.from_arrays(pa.array(weights), type=kind)],
                        schema=schema,
                    )
                )
        on_stage("Arrow files", number, len(tables))


def _blocks(path: Path, begin: int, table: TableEntry) -> Iterator[Weights]:
    """A table's weights, flat, block by block."""
    dtype = np.dtype(_DTYPES[table.data_type])
    for first in range(0, table.num_embeddings, BLOCK_ROWS):
        num_rows = min(BLOCK_ROWS, table.num_embeddings - first)
        yield np.fromfile(
            path,
            dtype,
            num_rows * table.embedding_dim,
            offset=begin + first * table.embedding_dim * dtype.itemsize,
        )


def _view(mapped: mmap.mmap, group: Group, begin: int, shape: tuple[int, int]) -> Weights:
    dtype = _DTYPES[group.data_type]
    return np.frombuffer(mapped, dtype, shape[0] * shape[1], begin).reshape(shape)


def _fill(
    group: Group, seed: int, views: Sequence[Weights], mapped: mmap.mmap, on_stage: OnStage
) -> None:
    """Gives every row of a group its initial weights."""
    initializer = RowInitializer(group, seed)
    records = np.empty((BLOCK_ROWS, group.record_width), np.float32)
    for begin in range(0, group.num_rows, BLOCK_ROWS):
        rows = np.arange(begin, min(begin + BLOCK_ROWS, group.num_rows))
        initializer.fill(rows, records[: len(rows)])
        _put(group, views, rows, records[: len(rows)])
        mapped.madvise(mmap.MADV_DONTNEED)
        on_stage("rows", int(rows[-1]) + 1, group.num_rows)


def _spans(group: Group, rows: Int64Array) -> list[Int64Array]:
    """Places in rows (n,), those of each span of the group together.

    Of a row that comes again the last place stays the last.
    """
    row_bytes = group.embedding_dim * np.dtype(_DTYPES[group.data_type]).itemsize
    order = np.argsort(rows, kind="stable")
    spans = rows[order] // max(1, SPAN_BYTES // row_bytes)
    return np.split(order, np.flatnonzero(np.diff(spans)) + 1)


def _put(group: Group, views: Sequence[Weights], rows: Int64Array, records: Float32Array) -> None:
    """Puts the weights in records (n, record_width) into the tables that have the rows (n,)."""
    dtype = _DTYPES[group.data_type]
    words = np.ascontiguousarray(records[:, : group.weight_words])
    weights = words.view(dtype)[:, : group.embedding_dim]
    tables = np.searchsorted(group.row_offsets, rows, side="right") - 1
    for table in np.unique(tables):
        mine = tables == table
        views[table][rows[mine] - group.row_offsets[table]] = weights[mine]
