"""Criteo-Kaggle's tables, and a synthetic stream over them, made beforehand and kept in memory."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np

from bagpipe.data.base import Batch
from bagpipe.data.criteo import CARDINALITIES
from bagpipe.data.synthetic import SyntheticSource
from bagpipe.optimizers import RowWiseAdagrad
from bagpipe.store import MemoryStore
from bagpipe.types import Float32Array, Group, Int64Array, TableConfig, group_tables
from benchmarks.measure import Progress

SKEW = 1.01
"""Zipf exponent with which 16,384 samples of the 26 uncut tables have about 85,000 unique rows."""
EMBEDDING_LR = 0.01
_LOAD_ROWS = 1 << 18


def kaggle_group(*, max_rows: int | None = None, embedding_dim: int = 64) -> Group:
    """The 26 tables of Criteo-Kaggle with row-wise Adagrad.

    Args:
        max_rows: the most rows of a table; longer ones are cut. None: none is.
        embedding_dim: of all tables.
    """
    tables = [
        TableConfig(
            name=f"C{index}",
            num_embeddings=size if max_rows is None else min(size, max_rows),
            embedding_dim=embedding_dim,
            feature_names=[f"C{index}"],
        )
        for index, size in enumerate(CARDINALITIES["kaggle"], start=1)
    ]
    return group_tables(tables, RowWiseAdagrad(lr=EMBEDDING_LR))[0]


def make_batches(
    group: Group, *, num_batches: int, batch_size: int, skew: float = SKEW, progress: Progress
) -> list[Batch]:
    """The first `num_batches` of a synthetic stream, features in the group's order."""
    sizes = [table.num_embeddings for table in group.tables]
    source = SyntheticSource(sizes, split="train", num_samples=num_batches * batch_size, skew=skew)
    batches = []
    for batch in islice(source.batches(batch_size=batch_size), num_batches):
        batches.append(batch)
        progress(f"making batches of {batch_size:,}", len(batches), num_batches)
    return batches


def initial_records(group: Group, rows: Int64Array) -> Iterator[tuple[Int64Array, Float32Array]]:
    """What every arm starts from, in blocks: rows (n,) int64 and records (n, record_width)."""
    store = MemoryStore(group, 0)
    for begin in range(0, len(rows), _LOAD_ROWS):
        block = rows[begin : begin + _LOAD_ROWS]
        records = np.empty((len(block), group.record_width), np.float32)
        store.fetch(block, records)
        yield block, records
    store.close()
