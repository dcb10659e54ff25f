"""A user's own loop, which `bagpipe.save` and `bagpipe.restore` are tried with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bagpipe
from bagpipe.checkpoint.own_loops import Restored
from bagpipe.optimizers import Adam
from bagpipe.types import Jagged, TableConfig

TABLES = [
    TableConfig(name="a", num_embeddings=300, embedding_dim=4, feature_names=["f"]),
    TableConfig(name="b", num_embeddings=50, embedding_dim=4, feature_names=["g"]),
]
NUM_STEPS = 20


def make_batch(step: int, size: int = 8) -> Jagged:
    ids = np.random.default_rng(step).integers(0, 50, 2 * size)
    return Jagged(keys=("f", "g"), values=ids, batch_size=size)


BATCHES = [make_batch(step) for step in range(NUM_STEPS)]


class Loop:
    """A user's own loop: all that it trains, and how."""

    def __init__(self, seed: int = 0, device: str = "cpu", **options: Any) -> None:
        self.embeddings = bagpipe.EmbeddingBagCollection(
            TABLES, optimizer=Adam(lr=0.05), seed=seed, device=device, **options
        )
        torch.manual_seed(seed)
        self.model = torch.nn.ModuleDict(
            {
                "embeddings": self.embeddings,
                "hidden": torch.nn.Linear(8, 4),
                "dropout": torch.nn.Dropout(0.3),
                "last": torch.nn.Linear(4, 1),
            }
        ).to(device)
        # as where parts of a model are trained at rates of their own
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Adam(self.model["hidden"].parameters(), lr=0.05),
            torch.optim.Adagrad(self.model["last"].parameters(), lr=0.05),
        ]
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizers[0], step_size=3, gamma=0.5)
        self.losses: list[float] = []

    @property
    def parts(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "optimizer": self.optimizers,
            "stateful": {"schedule": self.schedule},
        }

    def train(
        self, batches: Any, between: Callable[[int], object] = lambda step: None, **options: Any
    ) -> None:
        options = {"cache": 60, "lookahead": 4, **options}
        with bagpipe.lookahead(batches, self.embeddings, **options) as stream:
            for batch in stream:
                self.step(batch)
                between(self.embeddings.step + 1)

    def step(self, batch: Jagged) -> None:
        self.embeddings.set_learning_rate(0.05 / (1 + self.embeddings.step // 4))
        pooled = self.embeddings(batch).values()
        hidden = torch.relu(self.model["dropout"](self.model["hidden"](pooled)))
        loss = self.model["last"](hidden).square().mean()
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.schedule.step()
        self.losses.append(loss.item())

    def save(self, folder: Path, **options: Any) -> Path:
        return bagpipe.save(folder, self.embeddings, **self.parts, **options)

    def restore(self, folder: Path, **options: Any) -> Restored:
        restored = bagpipe.restore(folder, self.embeddings, **self.parts, **options)
        assert restored is not None
        return restored

    def state(self) -> list[torch.Tensor]:
        """Everything that training changes, records with optimizer state too."""
        parts = list(bagpipe.dense_state_dict(self.model).values())
        for store in self.embeddings.stores:
            for rows, records in store.snapshot():
                parts += [torch.from_numpy(rows), torch.from_numpy(records)]
        return parts


def assert_equal(loop: Loop, undisturbed: Loop) -> None:
    first = len(undisturbed.losses) - len(loop.losses)
    assert undisturbed.losses[first:] == loop.losses
    assert len(loop.state()) == len(undisturbed.state())
    for one, other in zip(loop.state(), undisturbed.state(), strict=True):
        assert torch.equal(one, other)


def save_at(loop: Loop, folder: Path, *steps: int, **options: Any) -> Callable[[int], object]:
    return lambda step: step in steps and loop.save(folder, **options)
