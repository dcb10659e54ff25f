"""What goes wrong with several trainers, and must not: circles of waiting, late plans, failures of
one rank, different settings.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from tests.ordered import view_of
from tests.soon import TIMEOUT_S, ends_soon, wait_until
from tests.train.ranks import run_ranks

import bagpipe
from bagpipe.cache.device_plan import MovedArray
from bagpipe.cache.exchange import Exchange
from bagpipe.cache.executor import Executor
from bagpipe.distributed import communicator as communicator_module
from bagpipe.distributed.communicator import Communicator
from bagpipe.embeddings import capacity
from bagpipe.embeddings.collection import EmbeddingBagCollection
from bagpipe.errors import BackgroundError, ConfigError, DataError, UsageError
from bagpipe.feed.stream import StreamOptions, plan_stream
from bagpipe.native.pipeline import BackgroundIterator
from bagpipe.optimizers import SGD
from bagpipe.plan import StepPlan
from bagpipe.store import MemoryStore
from bagpipe.topology import Topology
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


@pytest.mark.parametrize("seed", range(12))
def test_tight_caches_of_any_number_of_trainers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_trainers, depth, lookahead = (
        int(rng.choice([2, 3, 4])),
        int(rng.integers(0, 6)),
        int(rng.integers(1, 8)),
    )
    batches = [batch_of(50 * rng.random(int(rng.integers(0, 9))) ** 2) for _ in range(60)]
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
    original = Exchange._apply_overlapped

    def rate_of(step: int) -> float:
        return 0.5 ** (step % 4 + 1)

    def apply_overlapped(exchange: Exchange, step: Any) -> None:
        if step.plan.step < len(batches) - 1:  # behind which none sets another rate
            wait_until(lambda: exchange._caches[0].group.optimizer.lr != rate_of(step.plan.step))
        original(exchange, step)

    def set_rate(embeddings: EmbeddingBagCollection, step: int) -> None:
        embeddings.set_learning_rate(rate_of(step))

    monkeypatch.setattr(Exchange, "_apply_overlapped", apply_overlapped)
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


def test_too_many_replicas_are_refused_on_all_ranks_at_once() -> None:
    batches, messages = random_batches(20, 14), {}

    def train_all(embeddings: EmbeddingBagCollection) -> None:
        with bagpipe.lookahead(batches, embeddings, cache=[50], replicas=2, lookahead=3) as stream:
            for batch in stream:
                embeddings(batch).values().sum().backward()

    def run(communicator: Communicator) -> None:
        embeddings = make(communicator, MemoryStore(GROUP, 1))
        with pytest.raises(
            ConfigError,
            match=r"step \d+: rank \d needs \d+ rows of group 0 .* has room for 2 replicas",
        ) as raised:
            train_all(embeddings)
        messages[communicator.rank] = str(raised.value)

    with ends_soon():
        run_ranks(2, run)
    assert messages[0] == messages[1]


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


def test_an_automatic_cache_is_that_of_the_rank_with_least_memory_and_all_share_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    local = threading.local()
    monkeypatch.setattr(capacity, "_free_bytes", lambda _: local.free)
    batches, slots = random_batches(10, 4, num_ids=10), {}

    def run(communicator: Communicator) -> None:
        local.free = 1000 if communicator.rank == 0 else 4000
        embeddings = make(communicator, MemoryStore(GROUP, 1))
        with bagpipe.lookahead(batches, embeddings, replicas=50, lookahead=3) as stream:
            assert embeddings.executor is not None
            slots[communicator.rank] = embeddings.executor.caches[0].num_slots
            for batch in stream:
                embeddings(batch).values().sum().backward()

    run_ranks(2, run)
    assert slots[0] == slots[1] == 1000 // 2 // 2 // GROUP.record_bytes


@pytest.mark.parametrize(
    ("name", "values"), [("cache", ([20], [25])), ("lookahead", (3, 4)), ("prefetch_depth", (2, 3))]
)
def test_ranks_with_other_settings_are_refused(name: str, values: tuple[Any, Any]) -> None:
    def run(communicator: Communicator) -> None:
        options = {"cache": [20], "replicas": 50, "lookahead": 3} | {
            name: values[communicator.rank]
        }
        with pytest.raises(ConfigError, match="ranks plan with other settings"):
            bagpipe.lookahead(
                random_batches(5, 4), make(communicator, MemoryStore(GROUP, 1)), **options
            )

    run_ranks(2, run)


def test_ranks_that_read_other_batches_are_refused() -> None:
    """As where each rank's loader yields its own share already."""

    def run(communicator: Communicator) -> None:
        batches = random_batches(5, 8, seed=communicator.rank)
        with pytest.raises(DataError, match="ranks read other batches"):
            for _ in bagpipe.lookahead(
                batches,
                make(communicator, MemoryStore(GROUP, 1)),
                cache=[20],
                replicas=50,
                lookahead=3,
            ):
                pass

    run_ranks(2, run)


def test_a_share_of_other_samples_than_planned_is_refused() -> None:
    def strided(batch: Jagged, rank: int, num_trainers: int) -> Jagged:
        return batch_of(batch.values[rank::num_trainers])

    def run(communicator: Communicator) -> None:
        embeddings = make(communicator, MemoryStore(GROUP, 1))
        with pytest.raises(
            DataError,
            match=r"step 0: share\(batch, \d, 2\) has other ids than samples \d to \d of the batch",
        ):
            for _ in bagpipe.lookahead(
                random_batches(5, 8),
                embeddings,
                cache=[20],
                replicas=50,
                lookahead=3,
                share=strided,
            ):
                pass

    run_ranks(2, run)


def test_one_stream_at_a_time() -> None:
    def run(communicator: Communicator) -> None:
        first, second = (make(communicator, MemoryStore(GROUP, 1)) for _ in range(2))
        with bagpipe.lookahead(
            random_batches(5, 8), first, cache=[50], replicas=50, lookahead=3
        ) as stream:
            with pytest.raises(UsageError, match="one stream at a time"):
                bagpipe.lookahead(
                    random_batches(5, 8), second, cache=[50], replicas=50, lookahead=3
                )
            for batch in stream:
                first(batch).values().sum().backward()

    run_ranks(2, run)


def test_one_rank_with_a_communicator_trains_alone() -> None:
    batches, store = random_batches(10, 8), MemoryStore(GROUP, 1)

    def run(communicator: Communicator) -> None:
        embeddings = make(communicator, store)
        with bagpipe.lookahead(batches, embeddings, cache=[50]) as stream:
            for batch in stream:
                embeddings(batch).values().sum().backward()

    run_ranks(1, run)
    np.testing.assert_array_equal(records_of(store), train(1, batches, cache=[50]))
