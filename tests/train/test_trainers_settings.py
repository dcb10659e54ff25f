"""What several trainers must have in common, and what is refused where they have not."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from tests.soon import ends_soon
from tests.train.one_table import GROUP, batch_of, make, random_batches, records_of, train
from tests.train.ranks import run_ranks

import bagpipe
from bagpipe.distributed.communicator import Communicator
from bagpipe.embeddings import capacity
from bagpipe.embeddings.collection import EmbeddingBagCollection
from bagpipe.errors import ConfigError, DataError, UsageError
from bagpipe.store import MemoryStore
from bagpipe.types import Jagged


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
