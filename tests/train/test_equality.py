"""The test that matters most: training through the cache equals training with whole tables in
memory, bit for bit.

The in-memory arm is `tests.reference.InMemoryTables`, which shares no code with the library's data
plane. Both arms run the same small dense model; every step's loss, all weights and all optimizer
state must be equal to the last bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests import reference, strategies
from torch import Tensor

import bagpipe
from bagpipe.embeddings.collection import EmbeddingBagCollection
from bagpipe.native.pipeline import BackgroundIterator
from bagpipe.optimizers import SGD, Adagrad, Adam, Optimizer, RowWiseAdagrad
from bagpipe.oracle import shards
from bagpipe.oracle.policy import POLICIES
from bagpipe.oracle.ranks import RankPlanner
from bagpipe.plan import GroupPlan
from bagpipe.store import FileStore, MemoryStore
from bagpipe.store.base import EmbeddingStore
from bagpipe.types import Group, Jagged, TableConfig, group_tables

OPTIMIZERS = [SGD(lr=0.5), Adagrad(lr=0.1), RowWiseAdagrad(lr=0.1), Adam(lr=0.05)]


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
    """Per-step losses and, by group, all records at the end."""
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


@given(
    data=st.data(),
    optimizer=st.sampled_from(OPTIMIZERS),
    extra_slots=st.sampled_from([0, 1, 5, 1000]),
    lookahead=st.sampled_from([1, 2, 7, 200, "auto"]),
    prefetch_depth=st.integers(0, 4),
    dedup_threads=st.integers(1, 3),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
def test_any_trace_cache_lookahead_depth_threads_and_restarts(
    data: st.DataObject,
    optimizer: Optimizer,
    extra_slots: int,
    lookahead: int,
    prefetch_depth: int,
    dedup_threads: int,
) -> None:
    tables = data.draw(strategies.table_lists(max_dims=2))
    batches = data.draw(strategies.traces(tables, max_steps=12))
    restarts = data.draw(st.lists(st.integers(0, len(batches)), max_size=2))
    check_equal(
        tables,
        optimizer,
        batches,
        extra_slots=extra_slots,
        restarts=restarts,
        lookahead=lookahead,
        prefetch_depth=prefetch_depth,
        dedup_threads=dedup_threads,
    )


@pytest.mark.parametrize("extra_slots", [160, 250, 2000])
@pytest.mark.parametrize("prefetch_depth", [0, 2])
def test_a_cache_cut_into_shards(
    extra_slots: int, prefetch_depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As only large caches are."""
    monkeypatch.setattr(shards, "MIN_SLOTS", 1)
    options = {"lookahead": 10, "prefetch_depth": prefetch_depth}
    check_equal(
        TABLES,
        RowWiseAdagrad(lr=0.1),
        skewed_batches(40),
        extra_slots=extra_slots,
        restarts=[17],
        **options,
    )


def test_a_late_plan_whose_late_fetch_fills_a_slot_that_its_early_eviction_empties(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(BackgroundIterator, "next_if_ready", lambda plans: None)
    tables = [TableConfig(name="t", num_embeddings=12, embedding_dim=4, feature_names=["f"])]
    ids = [[11, 10, 8, 3], [6, 9, 7, 10], [6, 0, 9, 11], [0, 9, 8, 4], [3, 9, 2, 11], [9, 6, 11, 3]]
    batches = [Jagged(keys=("f",), values=np.array(row), batch_size=4) for row in ids]
    check_equal(tables, SGD(lr=1.0), batches, extra_slots=3, lookahead=1, prefetch_depth=2)


@given(
    data=st.data(),
    prefetch_depth=st.integers(0, 3),
    extra_slots=st.integers(0, 5),
    lookahead=st.integers(1, 6),
)
@settings(max_examples=40)
def test_plans_that_come_late(
    data: st.DataObject, prefetch_depth: int, extra_slots: int, lookahead: int
) -> None:
    """As with a slow loader: a plan often reaches the executor only when its step is due."""
    tables = data.draw(strategies.table_lists())
    batches = data.draw(strategies.traces(tables, max_steps=15))
    is_ready = np.random.default_rng(data.draw(st.integers(0, 1000))).random(10_000) < data.draw(
        st.sampled_from([0.0, 0.5])
    )
    ready, next_if_ready = iter(is_ready.tolist()), BackgroundIterator.next_if_ready
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            BackgroundIterator,
            "next_if_ready",
            lambda plans: next_if_ready(plans) if next(ready) else None,
        )
        check_equal(
            tables,
            SGD(lr=0.5),
            batches,
            extra_slots=extra_slots,
            lookahead=lookahead,
            prefetch_depth=prefetch_depth,
        )


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


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: type(optimizer).__name__)
@pytest.mark.parametrize("kind", ["memory", "file"])
@pytest.mark.parametrize("extra_slots", [0, 40, 2000])
def test_every_optimizer_and_store(
    optimizer: Optimizer, kind: str, extra_slots: int, tmp_path: Path
) -> None:
    def file_store(group: Group, seed: int) -> EmbeddingStore:
        return FileStore(group, seed, tmp_path / str(group.index))

    check_equal(
        TABLES,
        optimizer,
        skewed_batches(40),
        extra_slots=extra_slots,
        restarts=[17],
        lookahead=10,
        store=MemoryStore if kind == "memory" else file_store,
    )


@pytest.mark.parametrize("lookahead", [1, 3, 50, 200])
@pytest.mark.parametrize("prefetch_depth", [0, 1, 6])
def test_every_lookahead_and_prefetch_depth(lookahead: int, prefetch_depth: int) -> None:
    check_equal(
        TABLES,
        RowWiseAdagrad(lr=0.1),
        skewed_batches(60),
        extra_slots=20,
        lookahead=lookahead,
        prefetch_depth=prefetch_depth,
    )


@pytest.mark.parametrize("lookahead", [1, 20])
def test_another_eviction_policy_trains_the_same(
    lookahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(POLICIES, "min", reference.LeastRecentlyUsed)
    check_equal(
        TABLES, RowWiseAdagrad(lr=0.1), skewed_batches(40), extra_slots=20, lookahead=lookahead
    )


def broken_plans(fault: Callable[[GroupPlan], GroupPlan], monkeypatch: pytest.MonkeyPatch) -> None:
    plan = RankPlanner.plan
    monkeypatch.setattr(RankPlanner, "plan", lambda step, rank: fault(plan(step, rank)))


def flip_a_slot(plan: GroupPlan) -> GroupPlan:
    """Of the last lookup, which is in another bag than the first."""
    inverse = plan.inverse.copy()
    inverse[[0, -1]] = inverse[[-1, 0]]
    return replace(plan, inverse=inverse)


def drop_a_write_back(plan: GroupPlan) -> GroupPlan:
    overlapped, urgent = (
        replace(moved, evict_rows=moved.evict_rows[1:], evict_slots=moved.evict_slots[1:])
        for moved in (plan.overlapped, plan.urgent)
    )
    return replace(plan, overlapped=overlapped, urgent=urgent)


def drop_a_gradient(plan: GroupPlan) -> GroupPlan:
    offsets = plan.schedule.piece_offsets.copy()
    offsets[0] = 1
    return replace(plan, schedule=replace(plan.schedule, piece_offsets=offsets))


@pytest.mark.parametrize("fault", [flip_a_slot, drop_a_write_back, drop_a_gradient])
def test_equality_fails_when_a_fault_is_planted(
    fault: Callable[[GroupPlan], GroupPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = group_tables(TABLES, SGD(lr=0.5))
    batches = skewed_batches(40)
    cache = [slots + 5 for slots in smallest_caches(groups, batches)]
    losses, _ = train_in_memory(groups, batches, seed=11)

    def train() -> list[float]:
        embeddings = EmbeddingBagCollection(TABLES, optimizer=SGD(lr=0.5), seed=11)
        return train_cached(
            embeddings, batches, make_dense(groups), cache=cache, lookahead=10, check=False
        )

    assert train() == losses
    broken_plans(fault, monkeypatch)
    assert train() != losses


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


@pytest.mark.parametrize(
    ("optimizer", "make_torch"),
    [
        (SGD(lr=0.5), lambda parameters: torch.optim.SGD(parameters, lr=0.5)),
        (Adagrad(lr=0.1), lambda parameters: torch.optim.Adagrad(parameters, lr=0.1)),
        (Adam(lr=0.05), lambda parameters: torch.optim.SparseAdam(parameters, lr=0.05)),
    ],
    ids=["SGD", "Adagrad", "Adam"],
)
def test_close_to_torch_embedding_bag_and_torch_optim(
    optimizer: Optimizer, make_torch: Callable[[list[Tensor]], torch.optim.Optimizer]
) -> None:
    batches = skewed_batches(30)
    embeddings = EmbeddingBagCollection(TABLES, optimizer=optimizer, seed=2)
    twins = torch_twin(TABLES, embeddings)
    torch_optimizer = make_torch(
        [parameter for twin in twins.values() for parameter in twin.parameters()]
    )
    groups = embeddings.groups
    dense = make_dense(groups)
    cache = [slots + 10 for slots in smallest_caches(groups, batches)]
    for batch in bagpipe.lookahead(batches, embeddings, cache=cache):
        dense_loss(embeddings(batch).groups, dense).backward()
        dense_loss(torch_pooled(groups, twins, batch), dense).backward()
        with torch.sparse.check_sparse_tensor_invariants():
            torch_optimizer.step()
        torch_optimizer.zero_grad()
    for name, twin in twins.items():
        # Adam divides a gradient by its own size, so where one is nearly zero the order of its sum
        # shows in the update.
        torch.testing.assert_close(
            embeddings.tables()[name][:], twin.weight.detach(), rtol=1e-4, atol=1e-4
        )


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


def test_exactly_torch_where_sums_are_exact() -> None:
    """Integer gradients, powers of two as rates and weights: every sum is exact in any order, so
    nothing may differ.
    """
    tables = [
        TableConfig(
            name="t",
            num_embeddings=50,
            embedding_dim=4,
            feature_names=["f"],
            init=bagpipe.Uniform(low=0, high=0),
        )
    ]
    rng = np.random.default_rng(0)
    batches: list[Jagged] = []
    for _ in range(20):
        lengths = rng.integers(0, 5, 32)
        batches.append(
            Jagged(
                keys=("f",),
                values=rng.integers(0, 50, lengths.sum()),
                batch_size=32,
                offsets=np.concatenate([[0], np.cumsum(lengths)]),
            )
        )
    embeddings = EmbeddingBagCollection(tables, optimizer=SGD(lr=0.25))
    twin = torch_twin(tables, embeddings)["t"]
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.25)
    targets = torch.from_numpy(rng.integers(-2, 3, (20, 32, 1, 4)).astype(np.float32))
    for batch, target in zip(
        bagpipe.lookahead(batches, embeddings, cache=50), targets, strict=True
    ):
        (embeddings(batch).groups[0] * target).sum().backward()
        (torch_pooled(embeddings.groups, {"t": twin}, batch)[0] * target).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(embeddings.tables()["t"][:], twin.weight.detach())
    assert twin.weight.abs().max() > 0
