"""`bagpipe.lookahead(move=...)`: what of a batch goes to the device along with its plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np
import pytest
import torch
from tests.store_contract import touched_rows
from tests.train import equality
from torch import Tensor

import bagpipe
from bagpipe.data.base import Batch
from bagpipe.embeddings.collection import EmbeddingBagCollection
from bagpipe.errors import UsageError
from bagpipe.optimizers import SGD
from bagpipe.train.torch_batch import TorchBatch

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


@pytest.mark.parametrize("oracle", ["thread", "process", "device"])
@pytest.mark.parametrize("device", DEVICES)
def test_what_moves_along_arrives(
    device: str, oracle: Literal["thread", "process", "device"]
) -> None:
    """On a GPU each batch is read by work that comes late in its step or in the next one, and let
    go before that is done.
    """
    batches = make_batches(40)
    embeddings = EmbeddingBagCollection(equality.TABLES, optimizer=SGD(lr=0.1), device=device)
    assert len(embeddings.groups) > 1
    seen: list[tuple[Tensor, Tensor]] = []
    before: TorchBatch | None = None
    with bagpipe.lookahead(
        batches,
        embeddings,
        cache=2_000,
        lookahead=6,
        prefetch_depth=3,
        oracle=oracle,
        move=TorchBatch.moved,
    ) as stream:
        for number, batch in enumerate(stream):
            assert batch.dense.device.type == batch.labels.device.type == device
            pooled = embeddings.lookup(batch.sparse)
            embeddings.update([torch.zeros_like(group) for group in pooled])
            if device == "cuda":
                torch.cuda._sleep(_CYCLES)
            if before is not None:
                seen.append((before.dense.clone(), before.labels.clone()))
            before = batch if device == "cuda" and number % 2 == 0 else None
            if before is None:
                seen.append((batch.dense.clone(), batch.labels.clone()))
            del batch
    if before is not None:
        seen.append((before.dense, before.labels))
    embeddings.close()
    assert len(seen) == len(batches)
    for expected, (dense, labels) in zip(batches, seen, strict=True):
        np.testing.assert_array_equal(dense.cpu().numpy(), expected.dense)
        np.testing.assert_array_equal(labels.cpu().numpy(), expected.labels)


def test_tensors_that_share_memory_with_a_device_that_plans_outlive_their_step() -> None:
    """On a CPU nothing is copied behind the host, so no memory need be used again."""
    batches = make_batches(12)
    embeddings = EmbeddingBagCollection(equality.TABLES, optimizer=SGD(lr=0.1))
    kept = []
    with bagpipe.lookahead(
        batches, embeddings, cache=2_000, lookahead=3, oracle="device", move=TorchBatch.moved
    ) as stream:
        for batch in stream:
            kept.append(batch.labels)
            embeddings.update(
                [torch.zeros_like(group) for group in embeddings.lookup(batch.sparse)]
            )
    embeddings.close()
    for expected, labels in zip(batches, kept, strict=True):
        np.testing.assert_array_equal(labels.numpy(), expected.labels)


def train(stream: Iterable[TorchBatch], embeddings: EmbeddingBagCollection) -> None:
    for batch in stream:
        embeddings.update([torch.ones_like(group) for group in embeddings.lookup(batch.sparse)])


@pytest.mark.parametrize(
    ("move", "says"),
    [
        (lambda batch: batch, "move returned a Batch, must return"),
        (
            lambda batch: ([torch.from_numpy(batch.dense)], lambda tensors: batch),
            "array 0 of move is a Tensor, must be",
        ),
        (
            lambda batch: ([batch.dense, batch.labels.astype(np.int64)], lambda tensors: batch),
            "array 1 of move is int64 with",
        ),
        (
            lambda batch: ([np.asfortranarray(batch.dense)], lambda tensors: batch),
            r"is float32 with strides .*C-contiguous",
        ),
        (
            lambda batch: ([batch.labels[::2]], lambda tensors: batch),
            r"is float32 with strides \(8,\)",
        ),
    ],
)
@pytest.mark.parametrize("bad_step", [0, 7])
def test_what_can_not_move_is_refused_and_no_row_is_lost(
    move: Callable[[Batch], Any], says: str, bad_step: int
) -> None:
    batches = make_batches(12)
    embeddings = EmbeddingBagCollection(equality.TABLES, optimizer=SGD(lr=0.1))
    stream = bagpipe.lookahead(
        batches,
        embeddings,
        cache=2_000,
        lookahead=4,
        prefetch_depth=0,
        move=lambda batch: move(batch) if batch is batches[bad_step] else TorchBatch.moved(batch),
    )
    with pytest.raises(UsageError, match=f"step {bad_step}: .*{says}"):
        train(stream, embeddings)
    assert embeddings.step == bad_step
    embeddings.flush()
    assert any(len(touched_rows(store)) for store in embeddings.stores) == (bad_step > 0)
    embeddings.close()
