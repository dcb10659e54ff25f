"""Tables with optimizers of their own: each is trained as if it were alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import bagpipe
from bagpipe import SGD, Adagrad, EmbeddingBagCollection, Jagged, TableConfig
from bagpipe.errors import ConfigError, UsageError
from bagpipe.optimizers import Optimizer

OPTIMIZERS: dict[str, Optimizer] = {
    "a": Adagrad(lr=0.5),
    "b": SGD(lr=0.25),
    "c": Adagrad(lr=0.5),
    "d": Adagrad(lr=0.125),
}
TABLES = [
    TableConfig(name=name, num_embeddings=30, embedding_dim=4, feature_names=[name])
    for name in OPTIMIZERS
]
BATCHES = [
    Jagged.from_lists(list(OPTIMIZERS), np.random.default_rng(step).integers(0, 30, (4, 8)))
    for step in range(12)
]


def train(embeddings: EmbeddingBagCollection, batches: list[Jagged], cache: int) -> None:
    with bagpipe.lookahead(batches, embeddings, cache=cache, check=True) as stream:
        for batch in stream:
            pooled = embeddings(batch)
            # another gradient for each place, and of each feature what does not depend on others
            torch.stack([pooled[key].square().sum() for key in pooled.keys()]).sum().backward()


@pytest.fixture
def embeddings() -> EmbeddingBagCollection:
    return EmbeddingBagCollection(TABLES, optimizer=OPTIMIZERS, seed=1)


def test_each_table_is_trained_by_its_own_optimizer(embeddings: EmbeddingBagCollection) -> None:
    assert [[table.name for table in group.tables] for group in embeddings.groups] == [
        ["a", "c"],
        ["b"],
        ["d"],
    ]
    alone = {}
    for table in TABLES:
        one = EmbeddingBagCollection([table], optimizer=OPTIMIZERS[table.name])
        one.tables()[table.name].load(embeddings.tables()[table.name])
        batches = [
            Jagged.from_dict({table.name: batch.values.reshape(4, 8)[TABLES.index(table)]})
            for batch in BATCHES
        ]
        train(one, batches, cache=30)
        alone[table.name] = np.asarray(one.tables()[table.name])
    train(embeddings, BATCHES, cache=64)
    for name, rows in alone.items():
        assert np.array_equal(embeddings.tables()[name], rows)


def test_rates_are_set_for_all_or_by_table(embeddings: EmbeddingBagCollection) -> None:
    with pytest.raises(UsageError, match=r"several learning rates \(0.5 of a, c, 0.25 of b, 0.125"):
        _ = embeddings.lr
    embeddings.set_learning_rate({"b": 0.5, "d": 0.0})
    assert [group.optimizer.lr for group in embeddings.groups] == [0.5, 0.5, 0.0]
    embeddings.set_learning_rate({"a": 0.1, "c": 0.1})
    assert [group.optimizer.lr for group in embeddings.groups] == [0.1, 0.5, 0.0]
    embeddings.set_learning_rate(0.25)
    assert embeddings.lr == 0.25


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"a": 0.1}, "tables a, c have one optimizer and so one learning rate"),
        ({"a": 0.1, "c": 0.2}, "tables a, c have one optimizer and so one learning rate"),
        ({"b": 0.1, "e": 0.1}, "given for table 'e'; the tables are a, b, c, d"),
        ({"b": 0.1, "d": -1}, "Adagrad: lr is -1, must be a number from 0"),
    ],
    ids=str,
)
def test_rates_that_make_no_sense_change_nothing(
    embeddings: EmbeddingBagCollection, rates: dict[str, float], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        embeddings.set_learning_rate(rates)
    assert [group.optimizer.lr for group in embeddings.groups] == [0.5, 0.25, 0.125]


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"a": SGD(lr=1)}, "given for the tables a; the tables are a, b, c, d: give one for each"),
        ({**OPTIMIZERS, "e": SGD(lr=1)}, "given for the tables a, b, c, d, e; the tables are"),
        ({**OPTIMIZERS, "b": torch.optim.SGD}, "table 'b': its optimizer is .*SGD.*bagpipe.SGD"),
        (torch.optim.Adam, "table 'a': its optimizer is .*Adam.*must be a bagpipe.SGD"),
    ],
    ids=["missing", "stranger", "torch's", "torch's for all"],
)
def test_optimizers_that_fit_no_table_are_refused(optimizer: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EmbeddingBagCollection(TABLES, optimizer=optimizer)
