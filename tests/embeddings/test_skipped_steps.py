"""A batch whose backward is left out is no update: Adam's bias correction does not count it, as
torch's does not.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.train.equality import TABLES, smallest_caches, torch_pooled, torch_twin
from tests.train.equality import skewed_batches as make_batches
from tests.train.ranks import run_ranks
from torch import Tensor

import bagpipe
from bagpipe.distributed.communicator import Communicator
from bagpipe.embeddings.collection import EmbeddingBagCollection
from bagpipe.jagged import share_of
from bagpipe.optimizers import Adam
from bagpipe.types import Jagged

OPTIMIZER = Adam(lr=0.05)
BATCHES = make_batches(24)


def is_updated(step: int, group: int) -> bool:
    """Every third batch is skipped, and every fourth counts for the first group alone."""
    return step % 3 != 1 and (group == 0 or step % 4 != 2)


def loss_of(pooled: list[Tensor], step: int) -> Tensor | None:
    parts = [part.sin().sum() for group, part in enumerate(pooled) if is_updated(step, group)]
    return torch.stack(parts).sum() if parts else None


def train(embeddings: EmbeddingBagCollection, batches: list[Jagged], scale: float = 1.0) -> None:
    cache = [slots + 10 for slots in smallest_caches(embeddings.groups, BATCHES)]
    first = embeddings.step
    with bagpipe.lookahead(batches, embeddings, cache=cache, replicas=3000) as stream:
        for step, batch in enumerate(stream, first):
            loss = loss_of(list(embeddings(batch).groups), step)
            if loss is not None:
                (loss * scale).backward()


def weights(embeddings: EmbeddingBagCollection) -> dict[str, Tensor]:
    return {name: table[:] for name, table in embeddings.tables().items()}


@pytest.fixture(scope="module")
def torchs() -> dict[str, Tensor]:
    """What torch's own embeddings and optimizer make of it."""
    embeddings = EmbeddingBagCollection(TABLES, optimizer=OPTIMIZER, seed=2)
    twins = torch_twin(TABLES, embeddings)
    optimizer = torch.optim.SparseAdam([twin.weight for twin in twins.values()], lr=0.05)
    for step, batch in enumerate(BATCHES):
        loss = loss_of(torch_pooled(embeddings.groups, twins, batch), step)
        if loss is not None:
            loss.backward()
        with torch.sparse.check_sparse_tensor_invariants():
            optimizer.step()
        optimizer.zero_grad()
    return {name: twin.weight.detach() for name, twin in twins.items()}


def check_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, table in expected.items():
        torch.testing.assert_close(found[name], table, rtol=1e-4, atol=1e-4)


def test_skipped_steps_are_no_updates_as_with_torch(torchs: dict[str, Tensor]) -> None:
    embeddings = EmbeddingBagCollection(TABLES, optimizer=OPTIMIZER, seed=2)
    train(embeddings, BATCHES)
    assert (embeddings.step, embeddings.num_skipped) == (24, [8, 12])
    check_close(weights(embeddings), torchs)


def test_the_count_outlives_a_stream(torchs: dict[str, Tensor]) -> None:
    embeddings = EmbeddingBagCollection(TABLES, optimizer=OPTIMIZER, seed=2)
    train(embeddings, BATCHES[:11])
    train(embeddings, BATCHES[11:])
    check_close(weights(embeddings), torchs)


def test_trainers_count_updates_too(torchs: dict[str, Tensor]) -> None:
    def work(communicator: Communicator) -> dict[str, Tensor]:
        embeddings = EmbeddingBagCollection(
            TABLES, optimizer=OPTIMIZER, seed=2, communicator=communicator
        )
        train(embeddings, BATCHES, scale=2.0)  # gradients are averaged
        return weights(embeddings)

    for found in run_ranks(2, work):
        check_close(found, torchs)


def test_gradients_of_update_count_as_those_of_backward() -> None:
    """A zero gradient is an update: it moves what Adam remembers."""
    batch = share_of(BATCHES[0], 0, 4)

    def train_with(*, zero: bool) -> dict[str, Tensor]:
        embeddings = EmbeddingBagCollection(TABLES, optimizer=OPTIMIZER, seed=2)
        for step, ids in enumerate(bagpipe.lookahead([batch] * 3, embeddings, cache=2000)):
            grads = [torch.ones_like(group) for group in embeddings.lookup(ids)]
            if step != 1:
                embeddings.update(grads)
            elif zero:
                embeddings.update([grad * 0 for grad in grads])
        assert embeddings.num_skipped == ([0, 0] if zero else [1, 1])
        return weights(embeddings)

    with_zero, skipped = train_with(zero=True), train_with(zero=False)
    assert not np.array_equal(with_zero["users"], skipped["users"])
