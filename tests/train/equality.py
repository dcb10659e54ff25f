"""The two arms of the test that matters most: training in memory, and through the cache.

The in-memory arm is `tests.reference.InMemoryTables`, which shares no code with the library's data
plane. Both arms run the same small dense model.
"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from tests import reference
from torch import Tensor

import bagpipe
from bagpipe.embeddings.collection import EmbeddingBagCollection
from bagpipe.optimizers import (
    SGD,
    Adagrad,
    Adam,
    AdamW,
    Optimizer,
    PartialRowWiseAdam,
    RowWiseAdagrad,
)
from bagpipe.store import MemoryStore
from bagpipe.store.base import EmbeddingStore
from bagpipe.types import Group, Jagged, TableConfig, group_tables

OPTIMIZERS = [SGD(lr=0.5), Adagrad(lr=0.1), RowWiseAdagrad(lr=0.1), Adam(lr=0.05)]
OTHERS = [
    AdamW(lr=0.05, weight_decay=0.5),
    PartialRowWiseAdam(lr=0.05, weight_decay=0.5),
    RowWiseAdagrad(lr=0.1, weight_decay=0.3, max_grad_norm=0.01),
]


def dense_loss(pooled: Sequence[Tensor], dense: torch.nn.Linear) -> Tensor:
    """A small model over all groups' pooled embeddings (B, F, D) with gradients that differ from
    bag to bag.
    """
    flat = torch.cat([group.flatten(1) for group in pooled], dim=1)
    return dense(torch.tanh(flat)).square().mean() + flat.sin().mean()


def make_dense(groups: Sequence[Group]) -> torch.nn.Linear:
    generator = torch.Generator().manual_seed(3)
    dense = torch.nn.Linear(
        sum(len(group.features) * group.embedding_dim for group in groups), 3, bias=False
    )
    with torch.no_grad():
        dense.weight.copy_(torch.randn(dense.weight.shape, generator=generator))
    return dense


def train_in_memory(
    groups: Sequence[Group], batches: Sequence[Jagged], seed: int
) -> tuple[list[float], list[np.ndarray]]:
    """Per-step losses and, by group, all records at the end; for all tests with the same tables and
    batches these are the same lists, trained once.
    """
    return _trained_in_memory(pickle.dumps((groups, batches, seed)))


@lru_cache(maxsize=32)
def _trained_in_memory(arguments: bytes) -> tuple[list[float], list[np.ndarray]]:
    groups: Sequence[Group]
    batches: Sequence[Jagged]
    groups, batches, seed = pickle.loads(arguments)
    tables = []
    for group in groups:
        records = np.empty((group.num_rows, group.record_width), np.float32)
        MemoryStore(group, seed).fetch(np.arange(group.num_rows), records)
        tables.append(reference.InMemoryTables(group, records))
    dense = make_dense(groups)
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.1)
    losses = []
    for batch in batches:
        pooled = [torch.from_numpy(table.lookup(batch)).requires_grad_() for table in tables]
        loss = dense_loss(pooled, dense)
        loss.backward()
        for table, leaf in zip(tables, pooled, strict=True):
            assert leaf.grad is not None
            table.update(batch, leaf.grad.numpy())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, [table.records() for table in tables]


def train_cached(
    embeddings: EmbeddingBagCollection,
    batches: Sequence[Jagged],
    dense: torch.nn.Linear,
    *,
    check: bool = True,
    **options: object,
) -> list[float]:
    """Per-step losses; trains `dense` and `embeddings` in place."""
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.1)
    losses = []
    with bagpipe.lookahead(batches, embeddings, check=check, **options) as stream:  # type: ignore[arg-type]
        for batch in stream:
            loss = dense_loss(embeddings(batch).groups, dense)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


def all_records(embeddings: EmbeddingBagCollection) -> list[np.ndarray]:
    result = []
    for group, store in zip(embeddings.groups, embeddings.stores, strict=True):
        records = np.empty((group.num_rows, group.record_width), np.float32)
        store.fetch(np.arange(group.num_rows), records)
        result.append(records)
    return result


def smallest_caches(groups: Sequence[Group], batches: Sequence[Jagged]) -> list[int]:
    return [
        max(1, *(len(reference.unique_rows(group, batch)) for batch in batches)) for group in groups
    ]


def check_equal(
    tables: Sequence[TableConfig],
    optimizer: Optimizer,
    batches: Sequence[Jagged],
    *,
    extra_slots: int,
    restarts: Sequence[int] = (),
    store: Callable[[Group, int], EmbeddingStore] = MemoryStore,
    **options: object,
) -> None:
    """Trains both arms; the cached one starts anew on the same stores at each step in
    `restarts`.
    """
    groups = group_tables(tables, optimizer)
    expected_losses, expected_records = train_in_memory(groups, batches, seed=11)
    cache = [slots + extra_slots for slots in smallest_caches(groups, batches)]
    embeddings = EmbeddingBagCollection(tables, optimizer=optimizer, seed=11, store=store)
    dense = make_dense(groups)
    bounds = [0, *sorted(restarts), len(batches)]
    losses = []
    for begin, end in itertools.pairwise(bounds):
        losses += train_cached(embeddings, batches[begin:end], dense, cache=cache, **options)
    assert losses == expected_losses
    for records, expected in zip(all_records(embeddings), expected_records, strict=True):
        np.testing.assert_array_equal(records, expected)
    embeddings.close()


TABLES = [
    TableConfig(
        name="users", num_embeddings=300, embedding_dim=8, feature_names=["user", "friend"]
    ),
    TableConfig(
        name="items", num_embeddings=1000, embedding_dim=8, feature_names=["item"], pooling="mean"
    ),
    TableConfig(name="hours", num_embeddings=24, embedding_dim=3, feature_names=["hour"]),
]


def skewed_batch(
    rng: np.random.Generator, lengths: np.ndarray, **features: tuple[int, float]
) -> Jagged:
    """Bags of `lengths` (F, B); each feature says how many ids it has and how skewed they are:
    evenly drawn with 1, more above.
    """
    ids = [
        (num_ids * rng.random(int(of_bags.sum())) ** skew).astype(np.int64)
        for (num_ids, skew), of_bags in zip(features.values(), lengths, strict=True)
    ]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Jagged(
        keys=tuple(features),
        values=np.concatenate(ids),
        batch_size=lengths.shape[1],
        offsets=offsets,
    )


def skewed_batches(num_batches: int, batch_size: int = 48, seed: int = 5) -> list[Jagged]:
    """Jagged batches over TABLES with enough churn that a small cache evicts and fetches rows again
    all the time.
    """
    rng = np.random.default_rng(seed)
    batches = []
    for _ in range(num_batches):
        lengths = rng.integers(0, 4, (4, batch_size))
        lengths[3] = 1
        batches.append(
            skewed_batch(
                rng, lengths, user=(300, 2.0), friend=(300, 1.0), item=(1000, 2.0), hour=(24, 1.0)
            )
        )
    return batches


def torch_twin(
    tables: Sequence[TableConfig], embeddings: EmbeddingBagCollection
) -> dict[str, torch.nn.EmbeddingBag]:
    """Plain torch modules with the same weights, by table."""
    twins = {}
    for table in tables:
        weights = embeddings.tables()[table.name][:]
        twins[table.name] = torch.nn.EmbeddingBag.from_pretrained(
            weights, freeze=False, mode=table.pooling, sparse=True, include_last_offset=True
        )
    return twins


def torch_pooled(
    groups: Sequence[Group], twins: dict[str, torch.nn.EmbeddingBag], batch: Jagged
) -> list[Tensor]:
    assert batch.offsets is not None
    size = batch.batch_size
    result = []
    for group in groups:
        parts = []
        for feature, table in zip(group.features, group.feature_tables, strict=True):
            key = batch.keys.index(feature)
            offsets = torch.from_numpy(batch.offsets[key * size : (key + 1) * size + 1])
            values = torch.from_numpy(batch.values[offsets[0] : offsets[-1]])
            parts.append(twins[group.tables[table].name](values, offsets - offsets[0]))
        result.append(torch.stack(parts, dim=1))
    return result
