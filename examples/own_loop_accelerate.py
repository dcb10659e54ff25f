"""Bagpipe with Hugging Face Accelerate: a run that is stopped goes on to the same bits.

    pip install accelerate
    python examples/own_loop_accelerate.py

`prepare` gets the dense part's model and optimizer, and no loader: `bagpipe.lookahead` reads that.
`bagpipe.save` stands in for `accelerator.save_state`, which would want the tables whole. Several
trainers need a communicator, see README.md.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

import bagpipe

NUM_BATCHES, BATCH_SIZE = 30, 64


def batches() -> Iterator[dict[str, Any]]:
    """Random data, the same each time; a loader of your own stands here."""
    for number in range(NUM_BATCHES):
        random = np.random.default_rng(number)
        ids = random.zipf(1.3, (2, BATCH_SIZE)) % 5_000
        yield {
            "sparse": bagpipe.Jagged(keys=("item", "user"), values=ids.ravel(), batch_size=64),
            "dense": torch.from_numpy(random.random((BATCH_SIZE, 4), np.float32)),
            "labels": torch.from_numpy((ids[0] % 3 == 0).astype(np.float32)),
        }


def train(folder: Path, stop_after: int = NUM_BATCHES) -> torch.nn.Module:
    """Trains what is left of a run, or up to a step, and returns its model."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    tables = [
        bagpipe.TableConfig(name=name, num_embeddings=5_000, embedding_dim=8, feature_names=[name])
        for name in ("item", "user")
    ]
    embeddings = bagpipe.EmbeddingBagCollection(
        tables, optimizer=bagpipe.Adam(lr=0.01), device=accelerator.device
    )
    model = bagpipe.models.DLRM(embeddings, num_dense=4, bottom=[8], top=[16, 1])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=20)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    parts = {"model": model, "optimizer": optimizer, "stateful": {"schedule": schedule}}

    restored = bagpipe.restore(folder, embeddings, **parts, missing_ok=True)
    step = 0 if restored is None else restored.step
    left = itertools.islice(batches(), step, stop_after)
    with bagpipe.lookahead(left, embeddings, cache="20%") as stream:
        for batch in stream:
            dense, labels = (batch[name].to(accelerator.device) for name in ("dense", "labels"))
            logits = model(dense, batch["sparse"])
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
            accelerator.backward(loss)  # the rows are updated here
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            if step % 5 == 0:
                bagpipe.save(folder, embeddings, **parts)
    return accelerator.unwrap_model(model)


def main(folder: Path) -> None:
    """Trains once undisturbed, and once stopped in the middle."""
    expected = train(folder / "undisturbed")
    train(folder / "stopped", stop_after=17)
    resumed = train(folder / "stopped")
    assert resumed.embeddings.step == NUM_BATCHES
    for name, table in expected.embeddings.tables().items():
        assert torch.equal(resumed.embeddings.tables()[name][:], table[:])
    for name, value in bagpipe.dense_state_dict(expected).items():
        assert torch.equal(bagpipe.dense_state_dict(resumed)[name], value)
    sys.stdout.write(f"{NUM_BATCHES} steps, stopped after 17: the same to the bit\n")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as path:
        main(Path(path))
