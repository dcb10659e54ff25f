"""Tables in mapped files, of which a lookup reads the rows that it needs.

Pages come from the disk as they are asked for, so a table may be larger than memory, and processes
that serve one folder share what is cached of it. Rows of a bag are added up in float32 in the order
of its ids, as training does it, so pooled embeddings are the same to the bit.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bagpipe.errors import DataError
from bagpipe.serving.inputs import Encoded
from bagpipe.serving.manifest import TableEntry
from bagpipe.types import Float32Array, Int32Array

_WORDS = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16}


class MappedTable:
    """One table's weights.

    Args:
        entry: what the manifest says of it.
        path: the file that holds it.
        begin: the first byte there.
    """

    def __init__(self, entry: TableEntry, path: Path, begin: int) -> None:
        self.entry = entry
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # rows are asked for at random, and pages around them would push others out of memory
        mapped.madvise(mmap.MADV_RANDOM)
        shape = entry.num_embeddings, entry.embedding_dim
        self._weights: npt.NDArray[Any] = np.frombuffer(
            mapped, _WORDS[entry.data_type], shape[0] * shape[1], begin
        ).reshape(shape)

    def rows(self, ids: Int32Array) -> Float32Array:
        """The rows (n, D) of ids (n,), as float32, which holds every number of 16 bits.

        Raises:
            DataError: an id lies outside of the table, as where values are ids already.
        """
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.entry.num_embeddings:
            outside = ids[(ids < 0) | (ids >= self.entry.num_embeddings)]
            raise DataError(
                f"id {outside[0]} lies outside table {self.entry.name!r}, whose ids are 0 to "
                f"{self.entry.num_embeddings - 1}"
            )
        rows = self._weights[ids]
        if self.entry.data_type == "bf16":
            return (rows.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return rows.astype(np.float32, copy=False)


def pool(tables: Sequence[MappedTable], encoded: Encoded) -> Float32Array:
    """The pooled embeddings of encoded rows.

    Args:
        tables: that of each feature.
        encoded: the rows (n,).

    Returns:
        (n, sum of D), feature after feature.
    """
    ends = np.cumsum([table.entry.embedding_dim for table in tables]).tolist()
    pooled = np.zeros((encoded.num_rows, ends[-1]), np.float32)
    is_jagged = any(offsets is not None for _, offsets in encoded.ids)
    for table, end, (ids, offsets) in zip(tables, ends, encoded.ids, strict=True):
        out, rows = pooled[:, end - table.entry.embedding_dim : end], table.rows(ids)
        if offsets is not None:
            _sum_bags(rows, offsets, out, is_mean=table.entry.pooling == "mean")
        elif is_jagged:
            out += rows  # to a zero, as a bag of one id is, which makes 0 of -0
        else:
            out[:] = rows
    return pooled


def _sum_bags(rows: Float32Array, offsets: Int32Array, out: Float32Array, *, is_mean: bool) -> None:
    """Adds up bags (n,) of rows, first ids first, all bags' k-th ids at a time."""
    lengths = np.diff(offsets)
    for place in range(int(lengths.max(initial=0))):
        longer = np.flatnonzero(lengths > place)
        out[longer] += rows[offsets[longer] + place]
    if is_mean:
        out *= (1.0 / np.maximum(lengths, 1)).astype(np.float32)[:, None]
