"""Bagpipe within PyTorch Lightning: a run that is stopped goes on to the same bits.

    pip install pytorch-lightning
    python examples/own_loop_lightning.py

Three things are other than with tables in the model: batches come from `bagpipe.lookahead`, they
are left where they are, and a callback saves by `bagpipe.save`, since Lightning's own checkpoints
would want the tables whole. Several trainers need a communicator, see README.md.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as lightning
import torch

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


class Ranker(lightning.LightningModule):
    """A DLRM whose tables Bagpipe keeps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        tables = [
            bagpipe.TableConfig(
                name=name, num_embeddings=5_000, embedding_dim=8, feature_names=[name]
            )
            for name in ("item", "user")
        ]
        self.embeddings = bagpipe.EmbeddingBagCollection(tables, optimizer=bagpipe.Adam(lr=0.01))
        self.model = bagpipe.models.DLRM(self.embeddings, num_dense=4, bottom=[8], top=[16, 1])
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)

    def training_step(self, batch: dict[str, Any], number: int) -> torch.Tensor:
        """The loss; Lightning runs backward, which updates the rows, and the optimizer."""
        logits = self.model(batch["dense"], batch["sparse"])
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, batch["labels"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The dense part's, which is there before `fit`, so that it can be restored."""
        return self.optimizer

    def transfer_batch_to_device(self, batch: Any, device: torch.device, number: int) -> Any:
        """Moves what the dense part reads; ids stay on the host, where they are planned."""
        return {
            name: value if name == "sparse" else value.to(device) for name, value in batch.items()
        }


class Saving(lightning.Callback):
    """Saves all of a run every so many steps."""

    def __init__(self, folder: Path, every_steps: int) -> None:
        self.folder, self.every_steps = folder, every_steps

    def on_train_batch_end(
        self, trainer: lightning.Trainer, ranker: Ranker, *_: object, **__: object
    ) -> None:
        """Between two steps."""
        if trainer.global_step % self.every_steps == 0:
            bagpipe.save(
                self.folder, ranker.embeddings, model=ranker.model, optimizer=ranker.optimizer
            )


def train(folder: Path, stop_after: int = NUM_BATCHES) -> Ranker:
    """Trains what is left of a run, or up to a step."""
    ranker = Ranker()
    restored = bagpipe.restore(
        folder,
        ranker.embeddings,
        model=ranker.model,
        optimizer=ranker.optimizer,
        missing_ok=True,
    )
    step = 0 if restored is None else restored.step
    left = list(
        itertools.islice(batches(), step, stop_after)
    )  # with a length: nothing is prefetched
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Saving(folder, every_steps=5)],
    )
    with bagpipe.lookahead(left, ranker.embeddings, cache="20%") as stream:
        trainer.fit(ranker, train_dataloaders=stream)
    return ranker


def main(folder: Path) -> None:
    """Trains once undisturbed, and once stopped in the middle."""
    expected = train(folder / "undisturbed")
    train(folder / "stopped", stop_after=17)
    resumed = train(folder / "stopped")
    assert resumed.embeddings.step == NUM_BATCHES
    for name, table in expected.embeddings.tables().items():
        assert torch.equal(resumed.embeddings.tables()[name][:], table[:])
    for name, value in bagpipe.dense_state_dict(expected.model).items():
        assert torch.equal(bagpipe.dense_state_dict(resumed.model)[name], value)
    sys.stdout.write(f"{NUM_BATCHES} steps, stopped after 17: the same to the bit\n")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as path:
        main(Path(path))
