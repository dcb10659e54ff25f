"""Training of a small table with gradients of 1, by any number of trainers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tests.ordered import view_of
from tests.train.ranks import run_ranks

import bagpipe
from bagpipe.distributed.communicator import Communicator
from bagpipe.embeddings.collection import EmbeddingBagCollection
from bagpipe.optimizers import SGD
from bagpipe.store import MemoryStore
from bagpipe.types import Jagged, TableConfig, group_tables

TABLES = [TableConfig(name="t", num_embeddings=50, embedding_dim=2, feature_names=["a"])]
OPTIMIZER = SGD(lr=0.5)
(GROUP,) = group_tables(TABLES, OPTIMIZER)


def batch_of(ids: Any) -> Jagged:
    values = np.asarray(ids, np.int64)
    return Jagged(keys=("a",), values=values, batch_size=len(values))


def random_batches(
    num_batches: int, batch_size: int, num_ids: int = 50, seed: int = 0, skew: float = 1.0
) -> list[Jagged]:
    rng = np.random.default_rng(seed)
    return [batch_of(num_ids * rng.random(batch_size) ** skew) for _ in range(num_batches)]


def make(communicator: Communicator | None, store: MemoryStore) -> EmbeddingBagCollection:
    return EmbeddingBagCollection(
        TABLES,
        optimizer=OPTIMIZER,
        store=lambda *_: view_of(store, communicator),
        communicator=communicator,
    )


def records_of(store: MemoryStore) -> np.ndarray:
    records = np.empty((GROUP.num_rows, GROUP.record_width), np.float32)
    store.fetch(np.arange(GROUP.num_rows), records)
    return records


def train(
    num_trainers: int,
    batches: Sequence[Jagged],
    work: Any = None,
    **options: Any,
) -> np.ndarray:
    """All records after training `batches` with gradients of 1; `work(embeddings, step)` runs
    before each backward.
    """
    store = MemoryStore(GROUP, 1)

    def run(communicator: Communicator | None) -> None:
        embeddings = make(communicator, store)
        with bagpipe.lookahead(batches, embeddings, **options) as stream:
            for step, batch in enumerate(stream):
                if work is not None:
                    work(embeddings, step)
                (embeddings(batch).values().sum() * num_trainers).backward()

    if num_trainers == 1:
        run(None)
    else:
        run_ranks(num_trainers, run)
    return records_of(store)
