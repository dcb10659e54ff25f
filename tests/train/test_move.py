"""`bagpipe.lookahead(move=...)`: what of a batch goes to the device along with its plan."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from tests.train import test_equality as equality
from torch import Tensor

import bagpipe
from bagpipe.cache.collection import EmbeddingBagCollection
from bagpipe.data.base import Batch
from bagpipe.train.batches import TorchBatch
from bagpipe.types import SGD

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
_CYCLES = 2_000_000
"""A millisecond or so of the device's time."""


def make_batches(num_batches: int) -> list[Batch]:
    rng = np.random.default_rng(3)
    return [
        Batch(
            dense=rng.normal(size=(sparse.batch_size, 5)).astype(np.float32),
            sparse=sparse,
            labels=rng.integers(0, 2, sparse.batch_size).astype(np.float32),
        )
        for sparse in equality.skewed_batches(num_batches)
    ]


@pytest.mark.parametrize("oracle", ["thread", "process"])
@pytest.mark.parametrize("device", DEVICES)
def test_what_moves_along_arrives(device: str, oracle: Literal["thread", "process"]) -> None:
    """On a GPU also what is kept for a step, read by work that comes late, and let go before."""
    batches = make_batches(40)
    embeddings = EmbeddingBagCollection(equality.TABLES, optimizer=SGD(lr=0.1), device=device)
    assert len(embeddings.groups) > 1
    seen: list[tuple[Tensor, Tensor]] = []
    late: list[Tensor] = []
    before: TorchBatch | None = None
    with bagpipe.lookahead(
        batches, embeddings, cache=2_000, lookahead=6, prefetch_depth=3, oracle=oracle, move=TorchBatch.moved
    ) as stream:
        for batch in stream:
            pooled = embeddings.lookup(batch.sparse)
            embeddings.update([torch.zeros_like(group) for group in pooled])
            assert batch.dense.device.type == device
            if device == "cuda":
                torch.cuda._sleep(_CYCLES)
                seen.append((batch.dense, batch.labels))
                if before is not None:
                    late.append(before.dense * 1.0)
                before = batch if len(seen) % 3 else None
                if len(seen) > 8:
                    seen[-8] = seen[-8][0].clone(), seen[-8][1].clone()
            else:
                seen.append((batch.dense.clone(), batch.labels.clone()))
    embeddings.close()
    assert len(seen) == len(batches)
    for batch, (dense, labels) in zip(batches, seen, strict=True):
        np.testing.assert_array_equal(dense.cpu().numpy(), batch.dense)
        np.testing.assert_array_equal(labels.cpu().numpy(), batch.labels)
    if device == "cuda":
        expected = [batch.dense for number, batch in enumerate(batches[:-1], start=1) if number % 3]
        for dense, array in zip(late, expected, strict=True):
            np.testing.assert_array_equal(dense.cpu().numpy(), array)
