"""Tiny stand-ins: a store made of a dict, and embeddings that only hold stores and a step."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bagpipe.optimizers import Adagrad
from bagpipe.types import Float32Array, Group, Int64Array, TableConfig, group_tables


class DictStore:
    """A store that starts with zeros."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.records: dict[int, Float32Array] = {}

    def fetch(self, rows: Int64Array, out: Float32Array) -> None:
        for index, row in enumerate(rows.tolist()):
            out[index] = self.records.get(row, 0.0)

    def write(self, rows: Int64Array, records: Float32Array) -> None:
        self.records |= {
            row: record.copy() for row, record in zip(rows.tolist(), records, strict=True)
        }

    def snapshot(self, block_rows: int = 65_536) -> Iterator[tuple[Int64Array, Float32Array]]:
        rows = np.array(sorted(self.records), dtype=np.int64)
        for start in range(0, len(rows), block_rows):
            block = rows[start : start + block_rows]
            yield block, np.stack([self.records[row] for row in block.tolist()])

    def clear(self) -> None:
        self.records = {}

    def close(self) -> None:
        pass


class StoredEmbeddings:
    """What a checkpoint reads and writes of an embedding collection."""

    def __init__(self, *dims: int, num_embeddings: int = 100) -> None:
        tables = [
            TableConfig(
                name=f"t{i}",
                num_embeddings=num_embeddings,
                embedding_dim=dim,
                feature_names=[f"f{i}"],
            )
            for i, dim in enumerate(dims)
        ]
        self.groups = group_tables(tables, Adagrad(lr=0.1))
        self.stores = tuple(DictStore(group) for group in self.groups)
        self.step = 0
        self.num_skipped = [0] * len(self.groups)
        self.num_flushes = 0

    def flush(self) -> None:
        self.num_flushes += 1

    def touch(self, *rows: int, seed: int = 0) -> None:
        """Writes random records to these rows of every store."""
        generator = np.random.default_rng(seed)
        for group, store in zip(self.groups, self.stores, strict=True):
            records = generator.random((len(rows), group.record_width), dtype=np.float32)
            store.write(np.array(rows, dtype=np.int64), records)
