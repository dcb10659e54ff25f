"""Several trainers give what one gives: to the bit where sums are exact, else within the order of
float sums, always the same.

In the exact tests the loss is linear in the embeddings with small integers as coefficients, so that
every gradient is an integer whatever the weights, and its sum the same in any order; what an
optimizer makes of it must then be equal to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tests import strategies
from tests.ordered import view_of
from tests.soon import TIMEOUT_S
from tests.train.equality import OPTIMIZERS, skewed_batch, smallest_caches
from tests.train.ranks import run_ranks
from torch import Tensor

import bagpipe
from bagpipe.distributed.communicator import Communicator
from bagpipe.embeddings.batches import Lookahead
from bagpipe.embeddings.collection import EmbeddingBagCollection
from bagpipe.optimizers import SGD, Adagrad, Adam, AdamW, Optimizer, RowWiseAdagrad
from bagpipe.oracle import dedup, shards
from bagpipe.store import EmbeddingStore, MemoryStore
from bagpipe.types import Group, Jagged, TableConfig, group_tables


def linear_loss(pooled: Sequence[Tensor]) -> Tensor:
    """Its gradients are -1, 0 and 1."""
    flat = torch.cat([group.flatten(1) for group in pooled], dim=1)
    return (flat * ((torch.arange(flat.shape[1], device=flat.device) % 3) - 1.0)).sum()


def curved_loss(pooled: Sequence[Tensor]) -> Tensor:
    return torch.cat([group.flatten(1) for group in pooled], dim=1).sin().sum()


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """One rank of a run."""

    embeddings: EmbeddingBagCollection
    loss: Callable[[Sequence[Tensor]], Tensor]
    num_trainers: int
    options: dict[str, Any]

    def stream(self, batches: Sequence[Jagged]) -> Lookahead[Jagged]:
        return bagpipe.lookahead(batches, self.embeddings, **self.options)

    def losses(self, stream: Lookahead[Jagged]) -> Iterator[tuple[int, Tensor]]:
        """(step, loss). Gradients are averaged over trainers: the sum over all samples is what one
        trainer has.
        """
        for step, batch in enumerate(stream, self.embeddings.step):
            yield step, self.loss(self.embeddings(batch).groups) * self.num_trainers


Loop = Callable[[Trainer, Sequence[Jagged]], None]


def plain(trainer: Trainer, batches: Sequence[Jagged]) -> None:
    with trainer.stream(batches) as stream:
        for _, loss in trainer.losses(stream):
            loss.backward()


def train(
    tables: Sequence[TableConfig],
    optimizer: Optimizer,
    batches: Sequence[Jagged],
    trainers: Sequence[tuple[int, int]],
    *,
    loop: Loop = plain,
    loss: Callable[[Sequence[Tensor]], Tensor] = linear_loss,
    cache: Sequence[int] | None = None,
    timeout_s: float = TIMEOUT_S,
    **options: Any,
) -> list[np.ndarray]:
    """All records at the end, by group; each of `trainers` says how many they are up to which
    batch.
    """
    groups = group_tables(tables, optimizer)
    stores = {group.index: MemoryStore(group, 11) for group in groups}

    def train_part(num_trainers: int, begin: int, end: int) -> None:
        slots = cache or [
            -(-group_slots // num_trainers) for group_slots in smallest_caches(groups, batches)
        ]
        sizes = {"cache": slots, "replicas": [group.num_rows for group in groups]}

        def work(communicator: Communicator | None) -> None:
            embeddings = EmbeddingBagCollection(
                tables,
                optimizer=optimizer,
                store=lambda group, _: view_of(stores[group.index], communicator),
                communicator=communicator,
            )
            embeddings.step = begin
            loop(
                Trainer(
                    embeddings=embeddings,
                    loss=loss,
                    num_trainers=num_trainers,
                    options=sizes | options,
                ),
                batches[begin:end],
            )

        if num_trainers == 1:
            work(None)
        else:
            run_ranks(num_trainers, work, timeout_s=timeout_s)

    begin = 0
    for num_trainers, end in trainers:
        train_part(num_trainers, begin, end)
        begin = end
    return [all_records(group, stores[group.index]) for group in groups]


def all_records(group: Group, store: EmbeddingStore) -> np.ndarray:
    records = np.empty((group.num_rows, group.record_width), np.float32)
    store.fetch(np.arange(group.num_rows), records)
    return records


def assert_equal(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def make_tables(pooling: Any = "sum") -> list[TableConfig]:
    return [
        TableConfig(
            name="wide", num_embeddings=400, embedding_dim=4, feature_names=["a"], pooling=pooling
        ),
        TableConfig(
            name="narrow",
            num_embeddings=50,
            embedding_dim=3,
            feature_names=["b", "c"],
            pooling=pooling,
        ),
    ]


def make_batches(
    num_batches: int, batch_size: int = 12, last_size: int = 7, seed: int = 0
) -> list[Jagged]:
    """Multi-hot and skewed; the last one is ragged."""
    rng = np.random.default_rng(seed)
    sizes = [batch_size] * (num_batches - 1) + [last_size]
    return [
        skewed_batch(rng, rng.integers(0, 4, (3, size)), a=(400, 3.0), b=(50, 3.0), c=(50, 3.0))
        for size in sizes
    ]


@pytest.mark.parametrize(
    ("num_trainers", "optimizer"),
    [*((3, each) for each in OPTIMIZERS), *zip((2, 4, 8), OPTIMIZERS, strict=False)],
)
def test_trainers_equal_one_to_the_bit_where_sums_are_exact(
    num_trainers: int, optimizer: Optimizer
) -> None:
    batches = make_batches(14)
    expected = train(make_tables(), optimizer, batches, [(1, 14)], lookahead=3)
    assert_equal(
        train(make_tables(), optimizer, batches, [(num_trainers, 14)], lookahead=3), expected
    )


@pytest.mark.parametrize("num_trainers", [2, 4])
@pytest.mark.parametrize("extra", [0, 30])
def test_caches_cut_into_shards_equal_one_to_the_bit(
    num_trainers: int, extra: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As only large caches are; the smallest ones evict rows that others need at once."""
    batches, groups = make_batches(14), group_tables(make_tables(), SGD(lr=0.5))
    expected = train(make_tables(), SGD(lr=0.5), batches, [(1, 14)], lookahead=3)
    monkeypatch.setattr(shards, "MIN_SLOTS", 1)
    needed = [
        max(
            shards.num_slots_needed(dedup(group, batch).unique_rows, group.num_rows)
            for batch in batches
        )
        for group in groups
    ]
    cache = [-(-num_slots // num_trainers) + extra for num_slots in needed]
    assert_equal(
        train(make_tables(), SGD(lr=0.5), batches, [(num_trainers, 14)], cache=cache, lookahead=3),
        expected,
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: type(optimizer).__name__)
@pytest.mark.parametrize("num_trainers", [2, 4])
def test_lookups_of_all_ranks_are_those_of_one_trainer_to_the_bit(
    optimizer: Optimizer, num_trainers: int
) -> None:
    """Exact sums come from gradients that do not depend on the rows that were looked up: a stale
    replica shows here alone.
    """
    found: dict[tuple[int, int, int], list[Tensor]] = {}

    def look(trainer: Trainer, batches: Sequence[Jagged]) -> None:
        rank = trainer.embeddings.peers.rank
        with trainer.stream(batches) as stream:
            for step, batch in enumerate(stream):
                pooled = trainer.embeddings(batch).groups
                found[trainer.num_trainers, step, rank] = [
                    group.detach().clone() for group in pooled
                ]
                (trainer.loss(pooled) * trainer.num_trainers).backward()

    batches = make_batches(14)
    for number in (1, num_trainers):
        train(make_tables(), optimizer, batches, [(number, 14)], loop=look, lookahead=3)
    for step in range(14):
        parts = [found[num_trainers, step, rank] for rank in range(num_trainers)]
        for one, several in zip(found[1, step, 0], zip(*parts, strict=True), strict=True):
            torch.testing.assert_close(torch.cat(several), one, rtol=0, atol=0)


@pytest.mark.parametrize("depth", [0, 2])
def test_without_overlap_the_result_is_the_same_to_the_bit(depth: int) -> None:
    batches = make_batches(14)
    options: dict[str, Any] = {"loss": curved_loss, "lookahead": 4, "prefetch_depth": depth}
    expected = train(make_tables(), Adam(lr=0.05), batches, [(3, 14)], **options)
    assert_equal(
        train(make_tables(), Adam(lr=0.05), batches, [(3, 14)], overlap=False, **options), expected
    )


def exact_trace(data: st.DataObject) -> tuple[list[TableConfig], list[Jagged]]:
    """Tables and batches whose sums are exact: without means and weights."""
    tables = [
        table for table in data.draw(strategies.table_lists(max_dims=2)) if table.pooling == "sum"
    ]
    assume(tables)
    batches = data.draw(strategies.traces(tables, max_steps=10))
    assume(all(batch.weights is None for batch in batches))
    return tables, batches


@given(
    st.data(),
    st.sampled_from([2, 3, 4, 8]),
    st.integers(0, 20),
    st.integers(1, 12),
    st.integers(0, 4),
)
@settings(
    max_examples=strategies.examples(15),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
def test_any_trace_equals_one_trainer(
    data: st.DataObject, num_trainers: int, extra: int, lookahead: int, depth: int
) -> None:
    tables, batches = exact_trace(data)
    optimizer = data.draw(st.sampled_from(OPTIMIZERS))
    groups = group_tables(tables, optimizer)
    cache = [-(-slots // num_trainers) + extra for slots in smallest_caches(groups, batches)]
    end = len(batches)
    expected = train(tables, optimizer, batches, [(1, end)])
    options = {"lookahead": lookahead, "prefetch_depth": depth, "check": True}
    assert_equal(
        train(tables, optimizer, batches, [(num_trainers, end)], cache=cache, **options), expected
    )


@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_runs_repeat_to_the_bit_and_are_close_to_one_trainer(pooling: str) -> None:
    batches, options = make_batches(14), {"loss": curved_loss, "lookahead": 4}
    first, again = (
        train(make_tables(pooling), Adagrad(lr=0.1), batches, [(3, 14)], **options)
        for _ in range(2)
    )
    assert_equal(first, again)
    for found, expected in zip(
        first,
        train(make_tables(pooling), Adagrad(lr=0.1), batches, [(1, 14)], **options),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


def test_training_goes_on_with_another_number_of_trainers() -> None:
    batches = make_batches(20)
    expected = train(make_tables(), Adam(lr=0.05), batches, [(1, 20)])
    assert_equal(train(make_tables(), Adam(lr=0.05), batches, [(4, 6), (2, 13), (1, 20)]), expected)


@pytest.mark.parametrize("step", [0, 5])
def test_a_flush_between_steps_changes_nothing(step: int) -> None:
    batches = make_batches(10)
    expected = train(make_tables(), SGD(lr=0.5), batches, [(1, 10)])

    def flush_after_a_step(trainer: Trainer, batches: Sequence[Jagged]) -> None:
        with trainer.stream(batches) as stream:
            for number, loss in trainer.losses(stream):
                loss.backward()
                if number == step:
                    stream.flush()

    assert_equal(
        train(make_tables(), SGD(lr=0.5), batches, [(2, 10)], loop=flush_after_a_step), expected
    )


def break_and_go_on(trainer: Trainer, batches: Sequence[Jagged]) -> None:
    for step, loss in trainer.losses(trainer.stream(batches)):
        loss.backward()
        if step == 5:
            break
    plain(trainer, batches[6:])


def skip_backward(trainer: Trainer, batches: Sequence[Jagged]) -> None:
    with trainer.stream(batches) as stream:
        for step, loss in trainer.losses(stream):
            if step % 3:
                loss.backward()


def flush_in_steps(trainer: Trainer, batches: Sequence[Jagged]) -> None:
    with trainer.stream(batches) as stream:
        for step, loss in trainer.losses(stream):
            if step == 4:
                trainer.embeddings.flush()
            loss.backward()
            if step == 7:
                trainer.embeddings.flush()


def set_rates_after_steps(trainer: Trainer, batches: Sequence[Jagged]) -> None:
    """When gradients of the step are still on their way."""
    with trainer.stream(batches) as stream:
        for step, loss in trainer.losses(stream):
            loss.backward()
            trainer.embeddings.set_learning_rate(0.05 * (1 + step % 3))


@pytest.mark.parametrize(
    "loop", [break_and_go_on, skip_backward, flush_in_steps, set_rates_after_steps]
)
@pytest.mark.parametrize("depth", [0, 2])
def test_loops_of_any_kind(loop: Loop, depth: int) -> None:
    tables, batches = make_tables(), make_batches(14)
    optimizer = AdamW(lr=0.05, weight_decay=0.5)
    options = {"loop": loop, "cache": [300, 50], "lookahead": 3, "prefetch_depth": depth}
    expected = train(tables, optimizer, batches, [(1, 14)], **options)
    assert_equal(train(tables, optimizer, batches, [(2, 14)], **options), expected)


def test_ranks_without_samples_or_lookups_take_part() -> None:
    batches = make_batches(6, batch_size=2, last_size=1)
    expected = train(make_tables(), RowWiseAdagrad(lr=0.1), batches, [(1, 6)])
    assert_equal(train(make_tables(), RowWiseAdagrad(lr=0.1), batches, [(4, 6)]), expected)
