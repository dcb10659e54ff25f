"""The test that matters most: training through the cache equals training with whole tables in
memory, bit for bit.

Every step's loss, all weights and all optimizer state must be equal to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests import reference, strategies
from tests.device_oracle.test_device_oracle import keep
from tests.train.equality import (
    OPTIMIZERS,
    OTHERS,
    TABLES,
    check_equal,
    dense_loss,
    make_dense,
    skewed_batches,
    smallest_caches,
    torch_pooled,
    torch_twin,
    train_cached,
    train_in_memory,
)
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


@given(
    data=st.data(),
    optimizer=st.sampled_from(OPTIMIZERS + OTHERS),
    extra_slots=st.sampled_from([0, 1, 5, 1000]),
    lookahead=st.sampled_from([1, 2, 7, 200, "auto"]),
    prefetch_depth=st.integers(0, 4),
    dedup_threads=st.integers(1, 3),
    oracle=st.sampled_from(["thread", "thread", "device"]),
    index=st.sampled_from(["array", "map"]),
)
@settings(max_examples=strategies.examples(60), suppress_health_check=[HealthCheck.too_slow])
def test_any_trace_cache_lookahead_depth_threads_and_restarts(
    data: st.DataObject,
    optimizer: Optimizer,
    extra_slots: int,
    lookahead: int,
    prefetch_depth: int,
    dedup_threads: int,
    oracle: str,
    index: str,
) -> None:
    tables = data.draw(strategies.table_lists(max_dims=2))
    batches = data.draw(strategies.traces(tables, max_steps=12))
    restarts = data.draw(st.lists(st.integers(0, len(batches)), max_size=2))
    with pytest.MonkeyPatch.context() as patch:
        keep(index, patch)
        check_equal(
            tables,
            optimizer,
            batches,
            extra_slots=extra_slots,
            restarts=restarts,
            lookahead=lookahead,
            prefetch_depth=prefetch_depth,
            dedup_threads=dedup_threads,
            oracle=oracle,
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
@settings(max_examples=strategies.examples(25))
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


@pytest.mark.parametrize("optimizer", OTHERS, ids=lambda optimizer: type(optimizer).__name__)
def test_decay_clipping_and_other_adams(optimizer: Optimizer) -> None:
    check_equal(TABLES, optimizer, skewed_batches(20), extra_slots=20, restarts=[9], lookahead=10)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: type(optimizer).__name__)
@pytest.mark.parametrize(
    ("kind", "extra_slots"), [("memory", 0), ("memory", 40), ("memory", 2000), ("file", 0)]
)
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


@pytest.mark.parametrize(
    ("lookahead", "prefetch_depth"), [(1, 0), (1, 6), (3, 1), (50, 0), (50, 6), (200, 1)]
)
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
