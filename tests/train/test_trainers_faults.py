"""What goes wrong with several trainers, and must not: circles of waiting, late plans, failures of
one rank.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from tests.soon import TIMEOUT_S, ends_soon, wait_until
from tests.train.one_table import GROUP, batch_of, make, random_batches, records_of, train
from tests.train.ranks import run_ranks

import bagpipe
from bagpipe.cache.exchange import Exchange
from bagpipe.cache.exchange_messages import RowMessages
from bagpipe.cache.executor import Executor
from bagpipe.cache.moved import MovedArray
from bagpipe.distributed import communicator as communicator_module
from bagpipe.distributed.communicator import Communicator, Moment
from bagpipe.embeddings.collection import EmbeddingBagCollection
from bagpipe.errors import BackgroundError, DataError
from bagpipe.feed.stream import StreamOptions, plan_stream
from bagpipe.native.pipeline import BackgroundIterator
from bagpipe.plan import StepPlan
from bagpipe.store import MemoryStore
from bagpipe.topology import Topology
from bagpipe.types import Jagged


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_a_row_evicted_late_and_fetched_at_the_same_tick_is_no_circle(depth: int) -> None:
    """It leaves while nobody knows that it is needed so soon."""
    batches = random_batches(60, 3, num_ids=12)
    topology = Topology(num_trainers=2, ranks=(0,), num_replica_slots=(50,))
    options = StreamOptions(
        groups=(GROUP,), num_slots=(4,), topology=topology, lookahead=1, prefetch_depth=depth
    )
    plans = [planned.plan for (planned,) in plan_stream(batches, options)]
    # or it shows nothing
    assert any(plan.groups[0].overlapped.fence_tick == plan.issue_tick for plan in plans)
    found = train(2, batches, cache=[4], replicas=50, lookahead=1, prefetch_depth=depth)
    np.testing.assert_array_equal(found, train(1, batches, cache=[8], lookahead=1))


@pytest.mark.parametrize(("depth", "seed"), [(4, 0), (4, 1), (3, 2), (2, 3)])
def test_plans_that_come_late_on_one_rank_change_nothing(
    depth: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0's plans are always there, rank 1's never before they are needed."""
    batches = random_batches(120, 3, num_ids=40, seed=seed, skew=1.5)
    local, original = threading.local(), BackgroundIterator.next_if_ready
    store = MemoryStore(GROUP, 1)

    def next_if_ready(self: BackgroundIterator[Any]) -> Any:
        rank = getattr(local, "rank", None)
        return original(self) if rank is None else self.next_or_none() if rank == 0 else None

    monkeypatch.setattr(BackgroundIterator, "next_if_ready", next_if_ready)

    def run(communicator: Communicator) -> None:
        local.rank = communicator.rank
        embeddings = make(communicator, store)
        with bagpipe.lookahead(
            batches, embeddings, cache=[3], replicas=50, lookahead=2, prefetch_depth=depth
        ) as stream:
            for batch in stream:
                (embeddings(batch).values().sum() * 2).backward()

    run_ranks(2, run)
    np.testing.assert_array_equal(records_of(store), train(1, batches, cache=[6], lookahead=2))


def test_a_late_plan_releases_none_that_is_still_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step's overlapped gradients are sent as its plan says up to the second tick after it; its
    place is reused then."""
    released: list[tuple[int, bool]] = []  # (step, whether its gradients are still on their way)
    submit = Executor.submit

    def watched(
        self: Executor,
        plan: StepPlan,
        release: Callable[[], None] | None = None,
        along: Sequence[MovedArray] = (),
    ) -> None:
        assert isinstance(self._exchange, Exchange)
        steps = self._exchange._steps
        submit(self, plan, lambda: released.append((plan.step, plan.step in steps)))

    monkeypatch.setattr(Executor, "submit", watched)
    monkeypatch.setattr(BackgroundIterator, "next_if_ready", lambda plans: None)
    train(2, random_batches(20, 6), cache=[50], replicas=50, lookahead=3)
    assert len(released) >= 30
    assert not [step for step, is_read in released if is_read]


@pytest.mark.parametrize(
    "seed",
    [0, 1, 2, 3, 4, 11, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(12, 40))],
)
def test_tight_caches_of_any_number_of_trainers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_trainers, depth, lookahead = (
        int(rng.choice([2, 3, 4])),
        int(rng.integers(0, 6)),
        int(rng.integers(1, 8)),
    )
    batches = [batch_of(50 * rng.random(int(rng.integers(0, 9))) ** 2) for _ in range(30)]
    need = max(len(np.unique(batch.values)) for batch in batches)
    slots = -(-need // num_trainers) + int(rng.integers(0, 3))
    found = train(
        num_trainers, batches, cache=[slots], replicas=50, lookahead=lookahead, prefetch_depth=depth
    )
    np.testing.assert_array_equal(found, train(1, batches, cache=[50]))


def test_a_learning_rate_is_that_of_the_gradients_step() -> None:
    batches = random_batches(20, 8)

    def set_rate(embeddings: EmbeddingBagCollection, step: int) -> None:
        embeddings.set_learning_rate(0.5 ** (step % 4 + 1))

    expected = train(1, batches, set_rate, cache=[50])
    for _ in range(4):
        np.testing.assert_array_equal(
            train(2, batches, set_rate, cache=[50], replicas=50, lookahead=3), expected
        )


def test_a_late_gradient_has_the_rate_of_its_step_when_the_next_one_is_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batches = random_batches(20, 8)
    original = RowMessages.sync

    def rate_of(step: int) -> float:
        return 0.5 ** (step % 4 + 1)

    def sync_all(messages: RowMessages, step: Any, moment: Moment) -> None:
        # behind the last one none sets another rate
        if moment == "overlapped" and step.plan.step < len(batches) - 1:
            wait_until(lambda: messages._caches[0].group.optimizer.lr != rate_of(step.plan.step))
        original(messages, step, moment)

    def set_rate(embeddings: EmbeddingBagCollection, step: int) -> None:
        embeddings.set_learning_rate(rate_of(step))

    monkeypatch.setattr(RowMessages, "sync", sync_all)
    np.testing.assert_array_equal(
        train(2, batches, set_rate, cache=[50], replicas=50, lookahead=3),
        train(1, batches, set_rate, cache=[50]),
    )


def test_an_error_on_one_rank_is_raised_there_at_once_as_it_is() -> None:
    batches, store, ended = random_batches(20, 8), MemoryStore(GROUP, 1), {}

    def run(communicator: Communicator) -> None:
        embeddings = make(communicator, store)
        try:
            with bagpipe.lookahead(
                batches, embeddings, cache=[50], replicas=50, lookahead=3
            ) as stream:
                for step, batch in enumerate(stream):
                    if communicator.rank == 1 and step == 5:
                        raise ValueError("rank 1 is broken")
                    embeddings(batch).values().sum().backward()
        except BaseException as error:
            ended[communicator.rank] = error

    with ends_soon():
        run_ranks(2, run)
    assert isinstance(ended[1], ValueError)
    assert isinstance(ended[0], BackgroundError)


def read_until_bad(batches: Sequence[Jagged]) -> Iterator[Jagged]:
    yield from batches
    raise DataError("the data are bad")


def test_an_error_of_the_plans_that_all_ranks_have_loses_nothing() -> None:
    batches, store = random_batches(12, 8), MemoryStore(GROUP, 1)

    def run(communicator: Communicator) -> None:
        embeddings = make(communicator, store)
        stream = bagpipe.lookahead(
            read_until_bad(batches[:7]), embeddings, cache=[10], replicas=50, lookahead=3
        )
        with pytest.raises(DataError, match="the data are bad"):
            train_all(stream, embeddings)
        assert stream.has_failed_alike
        assert embeddings.step == 7
        train_all(bagpipe.lookahead(batches[7:], embeddings, cache=[10], replicas=50), embeddings)

    def train_all(stream: Any, embeddings: EmbeddingBagCollection) -> None:
        with stream:
            for batch in stream:
                (embeddings(batch).values().sum() * 2).backward()

    run_ranks(2, run)
    np.testing.assert_array_equal(records_of(store), train(1, batches))


def test_a_rank_that_stops_alone_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(communicator_module, "_STOPS_WITHIN", timedelta(seconds=1))

    def stop(communicator: Communicator) -> list[bool]:
        alone = communicator.rank == 1 and communicator.all_stop_before(7)
        if communicator.rank == 1:  # then they may be long in coming
            monkeypatch.setattr(communicator_module, "_STOPS_WITHIN", timedelta(seconds=TIMEOUT_S))
        communicator.barrier("the test")
        return [alone, communicator.all_stop_before(8)]

    assert run_ranks(2, stop) == [[False, True]] * 2


def test_rows_read_after_backward_are_as_of_that_step() -> None:
    batches = random_batches(8, 8)
    read: dict[int, list[np.ndarray]] = {}

    def run(communicator: Communicator | None) -> None:
        num_trainers = 1 if communicator is None else 2
        embeddings = make(communicator, stores[num_trainers])
        found = []
        with bagpipe.lookahead(
            batches,
            embeddings,
            cache=[50],
            lookahead=3,
            **({"replicas": 50} if communicator else {}),
        ) as stream:
            for batch in stream:
                (embeddings(batch).values().sum() * num_trainers).backward()
                embeddings.eval()
                found.append(embeddings(batch_of(range(50))).values().numpy().copy())
                embeddings.train()
        if communicator is None or communicator.rank == 0:
            read[num_trainers] = found

    stores = {number: MemoryStore(GROUP, 1) for number in (1, 2)}
    run(None)
    run_ranks(2, run)
    for one, two in zip(read[1], read[2], strict=True):
        np.testing.assert_array_equal(two, one)
