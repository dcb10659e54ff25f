"""A scaled loss: rows move as with torch's own optimizer, which the scaler unscales for, and an
overflow moves none; without a word about the scaler it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

import bagpipe
from bagpipe.embeddings.collection import EmbeddingBagCollection
from bagpipe.errors import UsageError
from bagpipe.optimizers import Adam
from bagpipe.types import Jagged, TableConfig

TABLES = [
    TableConfig(name="t", num_embeddings=50, embedding_dim=4, feature_names=["f"]),
    TableConfig(name="u", num_embeddings=50, embedding_dim=2, feature_names=["g"]),
]
OVERFLOW = 3
MakeScaler = Callable[[], torch.amp.GradScaler]


def batches(count: int = 8) -> list[Jagged]:
    rng = np.random.default_rng(0)
    return [
        Jagged(keys=("f", "g"), values=rng.integers(0, 50, 16), batch_size=8) for _ in range(count)
    ]


def make_embeddings() -> EmbeddingBagCollection:
    return EmbeddingBagCollection(TABLES, optimizer=Adam(lr=0.05), seed=3)


@pytest.fixture
def make_scaler() -> Iterator[Callable[[], torch.amp.GradScaler]]:
    made = []

    def make() -> torch.amp.GradScaler:
        made.append(torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=4))
        return made[-1]

    yield make
    for scaler in made:  # which a traceback may keep
        scaler._enabled = False


def test_rows_and_scale_are_those_of_torch(make_scaler: MakeScaler) -> None:
    embeddings = make_embeddings()
    tables = embeddings.tables()
    twins = [torch.nn.Parameter(tables[name][:]) for name in ("t", "u")]
    optimizer, scaler, own = torch.optim.SparseAdam(twins, lr=0.05), make_scaler(), make_scaler()
    embeddings.set_grad_scaler(own)
    dense = torch.nn.Linear(1, 1)
    dense_optimizer = torch.optim.SGD(dense.parameters(), lr=0.1)
    for step, batch in enumerate(bagpipe.lookahead(batches(), embeddings)):
        factor = torch.inf if step == OVERFLOW else 1.0 + step
        ids = torch.from_numpy(batch.values).view(2, 8)
        parts = [
            torch.nn.functional.embedding(of_feature, twin, sparse=True)
            for of_feature, twin in zip(ids, twins, strict=True)
        ]
        scaler.scale(torch.cat(parts, dim=1).sin().sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        loss = embeddings(batch).values().sin().sum() * factor + dense(torch.ones(1)).sum()
        own.scale(loss).backward()
        own.step(dense_optimizer)
        own.update()
        dense_optimizer.zero_grad()
        assert own.get_scale() == scaler.get_scale()  # though only the rows overflow
    assert embeddings.num_skipped == [1, 1]
    for name, twin in zip(("t", "u"), twins, strict=True):
        torch.testing.assert_close(embeddings.tables()[name][:], twin.detach(), atol=1e-5, rtol=0)


def test_gradients_given_to_update_are_unscaled_too(make_scaler: MakeScaler) -> None:
    scaler = make_scaler()
    scaler.scale(torch.ones(()))
    found = []
    for scale in (1.0, scaler.get_scale()):
        embeddings = make_embeddings()
        embeddings.set_grad_scaler(scaler if scale > 1 else None)
        for batch in bagpipe.lookahead(batches(), embeddings):
            pooled = embeddings.lookup(batch)
            embeddings.update([group.cos() * scale for group in pooled])
        found.append(embeddings.tables()["t"][:])
    assert torch.equal(*found)


def test_a_scaler_that_nobody_told_of_is_refused(make_scaler: MakeScaler) -> None:
    embeddings = make_embeddings()
    before = embeddings.tables()["t"][:]
    stream = bagpipe.lookahead(batches(), embeddings)
    batch = next(stream)
    loss = embeddings(batch).values().sum()
    scaler = make_scaler()
    with pytest.raises(
        UsageError, match=r"a GradScaler is in use.*embeddings\.set_grad_scaler\(scaler\) before"
    ):
        scaler.scale(loss).backward()
    assert torch.equal(embeddings.tables()["t"][:], before)
    embeddings.set_grad_scaler(None)
    scaler.scale(torch.ones(()))
    embeddings(next(stream)).values().sum().backward()
    assert not torch.equal(embeddings.tables()["t"][:], before)


def test_scalers_that_scale_nothing_are_no_matter(make_scaler: MakeScaler) -> None:
    embeddings = make_embeddings()
    off, unused = torch.amp.GradScaler("cpu", enabled=False), make_scaler()
    for batch in bagpipe.lookahead(batches(), embeddings):
        off.scale(embeddings(batch).values().sum()).backward()
    assert embeddings.num_skipped == [0, 0]
    assert unused.is_enabled()
