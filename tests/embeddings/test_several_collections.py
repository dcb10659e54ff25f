"""Several collections under one `bagpipe.lookahead`: each is trained as if it were alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import bagpipe
from bagpipe import SGD, Adam, EmbeddingBagCollection, Jagged, TableConfig
from bagpipe.errors import BackgroundError, ConfigError, DataError, UsageError
from bagpipe.optimizers import Optimizer
from bagpipe.store.memory import MemoryStore
from bagpipe.types import Float32Array, Int64Array


def collection(name: str, optimizer: Optimizer, seed: int, **more: Any) -> EmbeddingBagCollection:
    """A table of its own feature, and one of a feature that both collections look up."""
    tables = [
        TableConfig(name=name, num_embeddings=40, embedding_dim=4, feature_names=[name]),
        TableConfig(name="shared", num_embeddings=20, embedding_dim=2, feature_names=["shared"]),
    ]
    return EmbeddingBagCollection(tables, optimizer=optimizer, seed=seed, **more)


def both(**more: Any) -> list[EmbeddingBagCollection]:
    return [collection("user", Adam(lr=0.1), 1), collection("item", SGD(lr=0.5), 2, **more)]


def batches(count: int = 15) -> list[Jagged]:
    random = np.random.default_rng(0)
    return [
        Jagged.from_dict({name: random.integers(0, 20, 6) for name in ("user", "item", "shared")})
        for _ in range(count)
    ]


def without(batch: Jagged, feature: str) -> Jagged:
    ids = dict(zip(batch.keys, batch.values.reshape(3, -1), strict=True))
    return Jagged.from_dict({name: ids[name] for name in ids if name != feature})


def step(embeddings: EmbeddingBagCollection, batch: Jagged) -> None:
    embeddings(batch).values().square().sum().backward()


def state(embeddings: EmbeddingBagCollection) -> list[Float32Array]:
    """All records, optimizer state included."""
    embeddings.stop()
    records = []
    for store in embeddings.stores:
        records.append(np.empty((store.group.num_rows, store.group.record_width), np.float32))
        store.fetch(np.arange(store.group.num_rows), records[-1])
    return records


@pytest.mark.parametrize("oracle", ["thread", "process", "device"])
def test_each_is_trained_as_if_it_were_alone(oracle: Any) -> None:
    together, alone = both(), both()
    # every third step has no backward through the users, whose Adam counts its own updates
    with bagpipe.lookahead(batches(), together, cache=50, oracle=oracle, check=True) as stream:
        for number, batch in enumerate(stream):
            for embeddings in together[number % 3 == 0 :]:
                step(embeddings, batch)
            if number == 7:  # reading one in between loses nothing of the other
                assert together[0].tables()["user"][:].isfinite().all()
    for embeddings, other in zip(alone, ("item", "user"), strict=True):
        own = [without(batch, other) for batch in batches()]
        for number, batch in enumerate(bagpipe.lookahead(own, embeddings, cache=50)):
            if other == "user" or number % 3:
                step(embeddings, batch)
    for one, other in zip(together, alone, strict=True):
        assert one.step == other.step == 15
        assert one.num_skipped == other.num_skipped
        for mine, its in zip(state(one), state(other), strict=True):
            assert np.array_equal(mine, its)


def test_batches_of_all_are_read_in_evaluation_too() -> None:
    together = both()
    (batch,) = batches(1)
    with pytest.raises(DataError, match="feature 'item', which no table looks up"):
        together[0].eval()(batch)
    bagpipe.lookahead([], together).close()
    read = together[0].eval()(batch)
    assert read.keys() == ["user", "shared"]
    with pytest.raises(DataError, match="feature 'more', which no table looks up"):
        together[0](Jagged.from_dict({"user": [1], "shared": [1], "item": [1], "more": [1]}))


def test_what_ends_the_stream_for_one_ends_it_for_all() -> None:
    together = both()
    stream = bagpipe.lookahead(batches(), together)
    step(together[0], next(stream))
    together[1].stop()
    assert [embeddings.step for embeddings in together] == [1, 1]
    assert [embeddings.executor for embeddings in together] == [None, None]
    with pytest.raises(UsageError, match="these embeddings were stopped"):
        next(stream)
    for batch in bagpipe.lookahead(batches(2), together[0], sparse=lambda b: without(b, "item")):
        step(together[0], without(batch, "item"))
    with pytest.raises(UsageError, match="have trained 3, 1 steps"):
        bagpipe.lookahead(batches(), together)


class Failing(MemoryStore):
    """Whose rows can't be written."""

    def write(self, rows: Int64Array, records: Float32Array) -> None:
        raise OSError("the disk is gone")


def test_rows_that_are_lost_are_lost_to_all() -> None:
    together = both(store=Failing)

    def train() -> None:
        with bagpipe.lookahead(batches(), together, cache=50) as stream:
            for batch in stream:
                for embeddings in together:
                    step(embeddings, batch)

    with pytest.raises((BackgroundError, OSError)):
        train()
    for embeddings in together:
        with pytest.raises(UsageError, match="embedding rows were lost"):
            embeddings.tables()


def test_lists_that_are_no_collections_are_refused() -> None:
    one = collection("user", SGD(lr=0.5), 1)
    for wrong, message in (
        ([], "was given no collection: give at least one"),
        ([one, one], "2 collections, of which one is there twice"),
        ([one, "item"], "was given a str: give the collections that are in it"),
        (torch.nn.Linear(1, 1), "was given a Linear: give the collections that are in it"),
    ):
        with pytest.raises(ConfigError, match=message):
            bagpipe.lookahead(batches(), wrong)  # type: ignore[arg-type]


def test_a_batch_that_does_not_fit_names_the_group_among_all() -> None:
    with pytest.raises(ConfigError, match=r"step 0 uses \d+ unique rows of group 2 \(dim 4\)"):
        next(bagpipe.lookahead(batches(), both(), cache=[20, 20, 1, 20]))
