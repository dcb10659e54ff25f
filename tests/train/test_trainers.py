"""Several trainers give what one gives: to the bit where sums are exact, else within the order of float sums, always the same.

In the exact tests the loss is linear in the embeddings with small integers as coefficients, so that every gradient is an integer
whatever the weights, and its sum the same in any order; what an optimizer makes of it must then be equal to the last bit.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests import strategies
from tests.train.ranks import run_ranks
from tests.train.test_equality import smallest_caches
from torch import Tensor

import bagpipe
from bagpipe.cache.collection import EmbeddingBagCollection
from bagpipe.cache.communicator import Communicator
from bagpipe.cache.exchange import Exchange
from bagpipe.errors import BackgroundError, ConfigError
from bagpipe.oracle.ranks import RankPlanner
from bagpipe.store import MemoryStore
from bagpipe.types import SGD, Adagrad, Adam, Group, Jagged, Optimizer, RowWiseAdagrad, TableConfig, group_tables

OPTIMIZERS = [SGD(lr=0.5), Adagrad(lr=0.1), RowWiseAdagrad(lr=0.1), Adam(lr=0.05)]


def linear_loss(pooled: Sequence[Tensor]) -> Tensor:
    """Its gradients are -1, 0 and 1."""
    flat = torch.cat([group.flatten(1) for group in pooled], dim=1)
    return (flat * ((torch.arange(flat.shape[1]) % 3) - 1.0)).sum()


def curved_loss(pooled: Sequence[Tensor]) -> Tensor:
    return torch.cat([group.flatten(1) for group in pooled], dim=1).sin().sum()


def train(
    tables: Sequence[TableConfig],
    optimizer: Optimizer,
    batches: Sequence[Jagged],
    trainers: Sequence[tuple[int, int]],
    *,
    is_exact: bool = True,
    flush_at: int = -1,
    cache: Sequence[int] | None = None,
    store: type[MemoryStore] = MemoryStore,
    **options: Any,
) -> list[np.ndarray]:
    """All records at the end, by group; each of `trainers` says how many they are up to which batch."""
    groups = group_tables(tables, optimizer)
    stores = {group.index: store(group, 11) for group in groups}
    begin = 0
    for num_trainers, end in trainers:
        slots = cache or [-(-group_slots // num_trainers) for group_slots in smallest_caches(groups, batches)]

        def work(communicator: Communicator | None, begin: int = begin, end: int = end, slots: Any = slots) -> None:
            num_trainers = 1 if communicator is None else communicator.num_trainers
            embeddings = EmbeddingBagCollection(
                tables, optimizer=optimizer, store=lambda group, _: stores[group.index], communicator=communicator
            )
            embeddings.step = begin
            replicas = {"replicas": [group.num_rows for group in groups]}
            with bagpipe.lookahead(batches[begin:end], embeddings, cache=slots, **replicas, **options) as stream:
                for number, batch in enumerate(stream, begin):
                    pooled = embeddings(batch).groups
                    # Gradients are averaged over trainers: the sum over all samples is what one trainer has.
                    loss = (linear_loss if is_exact else curved_loss)(pooled) * num_trainers
                    loss.backward()
                    if number == flush_at:
                        stream.flush()

        if num_trainers == 1:
            work(None)
        else:
            run_ranks(num_trainers, work)
        begin = end
    return [all_records(group, stores[group.index]) for group in groups]


def all_records(group: Group, store: MemoryStore) -> np.ndarray:
    records = np.empty((group.num_rows, group.record_width), np.float32)
    store.fetch(np.arange(group.num_rows), records)
    return records


def assert_equal(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def make_tables(pooling: Any = "sum") -> list[TableConfig]:
    return [
        TableConfig(name="wide", num_embeddings=400, embedding_dim=4, feature_names=["a"], pooling=pooling),
        TableConfig(name="narrow", num_embeddings=50, embedding_dim=3, feature_names=["b", "c"], pooling=pooling),
    ]


def make_batches(num_batches: int, batch_size: int = 12, last_size: int = 7, seed: int = 0) -> list[Jagged]:
    """Multi-hot and skewed; the last one is ragged."""
    rng = np.random.default_rng(seed)
    batches = []
    for number in range(num_batches):
        size = last_size if number == num_batches - 1 else batch_size
        lengths = rng.integers(0, 4, (3, size))
        ids = [(rows * rng.random(int(lengths[index].sum())) ** 3).astype(np.int64) for index, rows in enumerate((400, 50, 50))]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        batches.append(Jagged(keys=("a", "b", "c"), values=np.concatenate(ids), batch_size=size, offsets=offsets))
    return batches


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: type(optimizer).__name__)
@pytest.mark.parametrize("num_trainers", [2, 3, 4, 8])
def test_trainers_equal_one_to_the_bit_where_sums_are_exact(optimizer: Optimizer, num_trainers: int) -> None:
    batches = make_batches(14)
    expected = train(make_tables(), optimizer, batches, [(1, 14)], lookahead=3)
    assert_equal(train(make_tables(), optimizer, batches, [(num_trainers, 14)], lookahead=3), expected)


@given(st.data(), st.sampled_from([2, 3, 4, 8]), st.integers(0, 20), st.integers(1, 12), st.integers(0, 4))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_trace_equals_one_trainer(data: st.DataObject, num_trainers: int, extra: int, lookahead: int, depth: int) -> None:
    tables = [table for table in data.draw(strategies.table_lists(max_dims=2)) if table.pooling == "sum"]
    if not tables:
        return
    batches = data.draw(strategies.traces(tables, max_steps=10))
    if any(batch.weights is not None for batch in batches):
        return  # sums are not exact
    optimizer = data.draw(st.sampled_from(OPTIMIZERS))
    groups = group_tables(tables, optimizer)
    cache = [-(-slots // num_trainers) + extra for slots in smallest_caches(groups, batches)]
    end = len(batches)
    expected = train(tables, optimizer, batches, [(1, end)])
    options = {"lookahead": lookahead, "prefetch_depth": depth}
    assert_equal(train(tables, optimizer, batches, [(num_trainers, end)], cache=cache, **options), expected)


@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_runs_repeat_to_the_bit_and_are_close_to_one_trainer(pooling: str) -> None:
    batches, options = make_batches(14), {"is_exact": False, "lookahead": 4}
    first, again = (train(make_tables(pooling), Adagrad(lr=0.1), batches, [(3, 14)], **options) for _ in range(2))
    assert_equal(first, again)
    for found, expected in zip(first, train(make_tables(pooling), Adagrad(lr=0.1), batches, [(1, 14)], **options), strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


def test_training_goes_on_with_another_number_of_trainers() -> None:
    batches = make_batches(20)
    expected = train(make_tables(), Adam(lr=0.05), batches, [(1, 20)])
    assert_equal(train(make_tables(), Adam(lr=0.05), batches, [(4, 6), (2, 13), (1, 20)]), expected)


@pytest.mark.parametrize("step", [0, 5])
def test_a_flush_between_steps_changes_nothing(step: int) -> None:
    batches = make_batches(10)
    expected = train(make_tables(), SGD(lr=0.5), batches, [(1, 10)])
    assert_equal(train(make_tables(), SGD(lr=0.5), batches, [(2, 10)], flush_at=step), expected)


class SlowStore(MemoryStore):
    """Whose write-backs come late."""

    def write(self, rows: Any, records: Any) -> None:
        time.sleep(0.04)
        super().write(rows, records)


@pytest.mark.parametrize("waits", [True, False], ids=["waiting", "not waiting"])
def test_a_row_that_another_rank_has_evicted_is_fetched_once_it_is_written(waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = make_batches(25, batch_size=8)
    expected = train(make_tables(), SGD(lr=0.5), batches, [(1, 25)])
    if not waits:  # a planted fault
        monkeypatch.setattr(Communicator, "wait_written", lambda *_: None)
    options = {"lookahead": 1, "prefetch_depth": 2, "store": SlowStore}
    found = train(make_tables(), SGD(lr=0.5), batches, [(3, 25)], **options)
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True)) == waits


def break_and_go_on(embeddings: EmbeddingBagCollection, batches: Sequence[Jagged], scale: int, options: Any) -> None:
    for number, batch in enumerate(bagpipe.lookahead(batches, embeddings, **options)):
        (linear_loss(embeddings(batch).groups) * scale).backward()
        if number == 5:
            break
    with bagpipe.lookahead(batches[6:], embeddings, **options) as stream:
        for batch in stream:
            (linear_loss(embeddings(batch).groups) * scale).backward()


def skip_backward(embeddings: EmbeddingBagCollection, batches: Sequence[Jagged], scale: int, options: Any) -> None:
    with bagpipe.lookahead(batches, embeddings, **options) as stream:
        for number, batch in enumerate(stream):
            loss = linear_loss(embeddings(batch).groups) * scale
            if number % 3:
                loss.backward()


def flush_in_steps(embeddings: EmbeddingBagCollection, batches: Sequence[Jagged], scale: int, options: Any) -> None:
    with bagpipe.lookahead(batches, embeddings, **options) as stream:
        for number, batch in enumerate(stream):
            loss = linear_loss(embeddings(batch).groups) * scale
            if number == 4:
                embeddings.flush()
            loss.backward()
            if number == 7:
                embeddings.flush()


@pytest.mark.parametrize("loop", [break_and_go_on, skip_backward, flush_in_steps])
@pytest.mark.parametrize("depth", [0, 2])
def test_loops_of_any_kind(loop: Any, depth: int) -> None:
    tables, batches, optimizer = make_tables(), make_batches(14), Adam(lr=0.05)
    groups = group_tables(tables, optimizer)
    found = []
    for num_trainers in (1, 2):
        stores = {group.index: MemoryStore(group, 11) for group in groups}

        def work(communicator: Communicator | None, stores: Any = stores, scale: int = num_trainers) -> None:
            embeddings = EmbeddingBagCollection(
                tables, optimizer=optimizer, store=lambda each, _: stores[each.index], communicator=communicator
            )
            options = {"cache": [300, 50], "replicas": [400, 50], "lookahead": 3, "prefetch_depth": depth}
            loop(embeddings, batches, scale, options)
            embeddings.stop()

        if num_trainers == 1:
            work(None)
        else:
            run_ranks(num_trainers, work)
        found.append([all_records(group, stores[group.index]) for group in groups])
    assert_equal(found[1], found[0])


def test_ranks_without_samples_or_lookups_take_part() -> None:
    batches = make_batches(6, batch_size=2, last_size=1)
    expected = train(make_tables(), RowWiseAdagrad(lr=0.1), batches, [(1, 6)])
    assert_equal(train(make_tables(), RowWiseAdagrad(lr=0.1), batches, [(4, 6)]), expected)


def send_all_replicas_early(monkeypatch: pytest.MonkeyPatch) -> None:
    original = RankPlanner.__init__

    def init(self: RankPlanner, group: Any, planned: Any, cache: Any, *, step: int) -> None:
        planned.was_used_before[:] = False
        original(self, group, planned, cache, step=step)

    monkeypatch.setattr(RankPlanner, "__init__", init)


def defer_all_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    original = RankPlanner.__init__

    def init(self: RankPlanner, group: Any, planned: Any, cache: Any, *, step: int) -> None:
        planned.is_used_next[:] = False
        original(self, group, planned, cache, step=step)

    monkeypatch.setattr(RankPlanner, "__init__", init)


def drop_a_contribution(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Exchange._apply_later

    def apply_later(self: Exchange, step: Any) -> None:
        for sums in step.sums.values():
            sums[:1] = 0.0
        original(self, step)

    monkeypatch.setattr(Exchange, "_apply_later", apply_later)


@pytest.mark.parametrize("fault", [send_all_replicas_early, defer_all_gradients, drop_a_contribution])
def test_a_planted_fault_is_found(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = make_batches(14)
    expected = train(make_tables(), SGD(lr=0.5), batches, [(1, 14)], is_exact=False)
    fault(monkeypatch)
    found = train(make_tables(), SGD(lr=0.5), batches, [(3, 14)], is_exact=False)
    assert any(np.abs(one - other).max() > 1e-3 for one, other in zip(found, expected, strict=True))


def test_a_rank_that_fails_ends_the_others_with_an_error_that_says_what_they_waited_for() -> None:
    tables, batches = make_tables(), make_batches(14)
    stores = {group.index: MemoryStore(group, 11) for group in group_tables(tables, SGD(lr=0.5))}
    messages = {}

    def work(communicator: Communicator) -> None:
        embeddings = EmbeddingBagCollection(
            tables, optimizer=SGD(lr=0.5), store=lambda group, _: stores[group.index], communicator=communicator
        )
        stream = bagpipe.lookahead(batches, embeddings, cache=[200, 50], lookahead=3)
        try:
            for number, batch in enumerate(stream):
                if communicator.rank == 1 and number == 5:
                    raise RuntimeError("rank 1 is broken")
                linear_loss(embeddings(batch).groups).backward()
        except BackgroundError as error:
            messages[communicator.rank] = str(error)
        finally:
            embeddings.fail(RuntimeError("the test is over"))  # nothing can be written back together any more
            stream.close()

    started = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 1 is broken"):
        run_ranks(2, work, timeout_s=3.0)
    assert time.monotonic() - started < 30
    assert "rank 0: exchanging" in messages[0]
    assert "of step 5" in messages[0] or "of step 4" in messages[0] or "of step 6" in messages[0]


def test_too_many_replicas_are_refused_with_step_need_and_limit() -> None:
    batches = make_batches(5)

    def work(communicator: Communicator) -> None:
        embeddings = EmbeddingBagCollection(make_tables(), optimizer=SGD(lr=0.5), communicator=communicator)
        with bagpipe.lookahead(batches, embeddings, cache=[200, 50], replicas=1, lookahead=3) as stream:
            for batch in stream:
                linear_loss(embeddings(batch).groups).backward()

    with pytest.raises(ConfigError, match=r"step 0: rank \d needs \d+ rows of group \d .* has room for 1 replicas"):
        run_ranks(2, work, timeout_s=3.0)
