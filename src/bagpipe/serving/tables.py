"""Tables in a mapped file, of which a lookup reads the rows that it needs.

Pages come from the disk as they are asked for, so a table may be larger than memory, and processes
that serve one folder share what is cached of it. Rows of a bag are added up in float32 in the order
of its ids, as training does it, so pooled embeddings are the same to the bit.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bagpipe.serving.inputs import Encoded
from bagpipe.serving.manifest import TableEntry
from bagpipe.types import Float32Array, Int32Array, Int64Array

_WORDS = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16}


@dataclass(frozen=True, kw_only=True)
class FeatureTable:
    """The table of a feature, and where it begins in the file."""

    entry: TableEntry
    begin: int

    @property
    def row_bytes(self) -> int:
        """The size of a row."""
        return self.entry.embedding_dim * np.dtype(_WORDS[self.entry.data_type]).itemsize

    @property
    def end(self) -> int:
        """Where it ends."""
        return self.begin + self.entry.num_embeddings * self.row_bytes


@dataclass(frozen=True, kw_only=True)
class _Bag:
    """A feature whose rows have any number of ids."""

    place: int
    """Among those."""
    first_row: int
    columns: slice
    is_mean: bool


@dataclass(frozen=True, kw_only=True)
class _Alike:
    """Features whose tables can be read in one go: of one type and dimension."""

    weights: npt.NDArray[Any]
    """(rows of all of them, D)"""
    is_bf16: bool
    single: Int64Array
    """(S,) the places, among features with one id a row, of these ones."""
    first_rows: Int64Array
    """(S, 1) in `weights`."""
    columns: tuple[slice, ...]
    """(S,) of the pooled embeddings."""
    bags: tuple[_Bag, ...]

    def rows(self, numbers: Int64Array) -> Float32Array:
        """Rows (.., D) as float32, which holds every number of 16 bits."""
        rows = self.weights[numbers]
        if self.is_bf16:
            return (rows.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return rows.astype(np.float32, copy=False)


class MappedTables:
    """The tables of a model's features.

    Args:
        path: the file that holds them.
        tables: that of each feature.
        is_bag: of each feature whether a row has any number of ids.
    """

    def __init__(self, path: Path, tables: Sequence[FeatureTable], is_bag: Sequence[bool]) -> None:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # rows are asked for at random, and pages around them would push others out of memory
        mapped.madvise(mmap.MADV_RANDOM)
        ends = np.cumsum([table.entry.embedding_dim for table in tables]).tolist()
        places = [is_bag[:number].count(bag) for number, bag in enumerate(is_bag)]
        self._width, self._has_bags = ends[-1], any(is_bag)
        alike: dict[tuple[object, ...], list[int]] = {}
        for number, table in enumerate(tables):
            kind = table.entry.data_type, table.entry.embedding_dim, table.begin % table.row_bytes
            alike.setdefault(kind, []).append(number)
        self._alike = []
        for numbers in alike.values():
            begin = min(tables[number].begin for number in numbers)
            end = max(tables[number].end for number in numbers)
            entry, row_bytes = tables[numbers[0]].entry, tables[numbers[0]].row_bytes
            word = np.dtype(_WORDS[entry.data_type])
            weights = np.frombuffer(mapped, word, (end - begin) // word.itemsize, begin)
            first_row = {each: (tables[each].begin - begin) // row_bytes for each in numbers}
            dim = entry.embedding_dim
            columns = {each: slice(ends[each] - dim, ends[each]) for each in numbers}
            single = [number for number in numbers if not is_bag[number]]
            self._alike.append(
                _Alike(
                    weights=weights.reshape(-1, dim),
                    is_bf16=entry.data_type == "bf16",
                    single=np.array([places[each] for each in single], np.int64),
                    first_rows=np.array([[first_row[each]] for each in single], np.int64),
                    columns=tuple(columns[each] for each in single),
                    bags=tuple(
                        _Bag(
                            place=places[each],
                            first_row=first_row[each],
                            columns=columns[each],
                            is_mean=tables[each].entry.pooling == "mean",
                        )
                        for each in numbers
                        if is_bag[each]
                    ),
                )
            )

    def pool(self, encoded: Encoded) -> Float32Array:
        """The pooled embeddings of encoded rows (n,), feature after feature: (n, sum of D)."""
        pooled = np.zeros((encoded.num_rows, self._width), np.float32)
        for alike in self._alike:
            if len(alike.single):
                rows = alike.rows(encoded.single[alike.single] + alike.first_rows)
                if self._has_bags:
                    rows += np.float32(0)  # as to a bag's zero, which makes 0 of -0
                for columns, of_feature in zip(alike.columns, rows, strict=True):
                    pooled[:, columns] = of_feature
            for bag in alike.bags:
                ids, offsets = encoded.bags[bag.place]
                rows = alike.rows(ids + np.int64(bag.first_row))
                _sum_bags(rows, offsets, pooled[:, bag.columns], is_mean=bag.is_mean)
        return pooled


def _sum_bags(rows: Float32Array, offsets: Int32Array, out: Float32Array, *, is_mean: bool) -> None:
    """Adds up bags (n,) of rows, first ids first, all bags' k-th ids at a time."""
    lengths = np.diff(offsets)
    for place in range(int(lengths.max(initial=0))):
        longer = np.flatnonzero(lengths > place)
        out[longer] += rows[offsets[longer] + place]
    if is_mean:
        out *= (1.0 / np.maximum(lengths, 1)).astype(np.float32)[:, None]
