"""A file of tables, as `save_tables` writes it: its beginning, and reading it block by block.

It is a safetensors file (https://github.com/huggingface/safetensors, "Format"): an 8-byte
little-endian header length, a JSON header, and the raw data. Anybody may have written it, so all of
the header is looked at before a row is changed.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bagpipe.errors import StoreError

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER_BYTES = 100 << 20  # as safetensors has it


@dataclass(frozen=True, kw_only=True)
class FileTable:
    """One table in a file: `shape`, and slices of rows that are tensors."""

    path: Path
    begin: int
    """Its first byte."""
    shape: tuple[int, int]
    dtype: torch.dtype

    def __getitem__(self, rows: slice) -> Tensor:
        """Rows (n, embedding_dim) from the disk. StoreError: they can't be read."""
        first, end, _ = rows.indices(self.shape[0])
        row_bytes = self.shape[1] * self.dtype.itemsize
        num_bytes = (end - first) * row_bytes
        try:
            content = np.fromfile(
                self.path, np.uint8, num_bytes, offset=self.begin + first * row_bytes
            )
        except OSError as error:
            raise _unreadable(self.path, error) from error
        if len(content) != num_bytes:
            raise StoreError(f"{self.path}: has become shorter while it was read")
        return torch.from_numpy(content).view(self.dtype).reshape(-1, self.shape[1])


def weight_key(table: str) -> str:
    """Where TorchRec keeps a table's weights in a state dict."""
    return f"embedding_bags.{table}.weight"


def header_of(
    tables: Mapping[str, tuple[torch.dtype, tuple[int, int]]],
) -> tuple[bytes, int]:
    """The beginning of a file of tables, behind which their weights follow one another.

    It is written here because the library's own writer wants every tensor in memory at once.

    Args:
        tables: data type and shape by key, in the order of their weights.

    Returns:
        The bytes, a multiple of 8; and the size of the whole file.
    """
    header: dict[str, Any] = {}
    end = 0
    for key, (dtype, shape) in tables.items():
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        header[key] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    beginning = struct.pack("<Q", len(encoded)) + encoded
    return beginning, len(beginning) + end


def open_table_file(path: Path, shapes: Mapping[str, tuple[int, int]]) -> dict[str, FileTable]:
    """The tables of a file, by key.

    Args:
        path: the file.
        shapes: by key what it must hold, no more and no less.

    Raises:
        StoreError: it can't be read, is no such file, is cut off, or holds other tables.
    """
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            text = file.read(header_bytes) if header_bytes <= _MAX_HEADER_BYTES else b""
    except OSError as error:
        raise _unreadable(path, error) from error
    begin = 8 + header_bytes
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        found = {key: _table(path, begin, entry) for key, entry in header.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{path}: is not a safetensors file of tables, as save_tables writes it: {error!r}"
        ) from error
    differing = [
        f"{key}: {_shape(found, key)} there and {_shape(shapes, key)} here"
        for key in sorted(found.keys() | shapes.keys())
        if _shape(found, key) != _shape(shapes, key)
    ]
    if differing:
        raise StoreError(f"{path}: holds other tables than these: {'; '.join(differing)}")
    end = max(table.begin + _num_bytes(table) for table in found.values())
    if size_bytes < end:
        raise StoreError(f"{path}: has {size_bytes:,} bytes, its header speaks of {end:,}")
    return found


def _table(path: Path, begin: int, entry: Mapping[str, Any]) -> FileTable:
    first, end = entry["data_offsets"]
    num_rows, dim = entry["shape"]
    table = FileTable(
        path=path, begin=begin + first, shape=(num_rows, dim), dtype=_DTYPES[entry["dtype"]]
    )
    if min(num_rows, dim, first) < 0 or end - first != _num_bytes(table):
        raise ValueError(f"{entry} is of another size")
    return table


def _num_bytes(table: FileTable) -> int:
    return math.prod(table.shape) * table.dtype.itemsize


def _shape(tables: Mapping[str, Any], key: str) -> tuple[int, int] | None:
    table = tables.get(key)
    return table.shape if isinstance(table, FileTable) else table


def _unreadable(path: Path, error: OSError) -> StoreError:
    return StoreError(f"{path}: can't be read: {error.strerror or error}")
