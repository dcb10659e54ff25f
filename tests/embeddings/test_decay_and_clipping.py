"""Weight decay and clipped rows: what torch's optimizers do to a table that is a parameter.

Each batch touches every row, since torch's dense optimizers move all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import bagpipe
from bagpipe import SGD, Adagrad, Adam, AdamW, PartialRowWiseAdam
from bagpipe.optimizers import Optimizer
from bagpipe.types import Jagged, TableConfig

NUM_ROWS, DIM, NUM_STEPS = 6, 4, 8


def train(optimizer: Optimizer, targets: Tensor) -> tuple[Tensor, Tensor]:
    """A table before and after steps of the gradients `targets` (num_steps, NUM_ROWS, DIM)."""
    table = TableConfig(
        name="t",
        num_embeddings=NUM_ROWS,
        embedding_dim=DIM,
        feature_names=["f"],
        init=bagpipe.Uniform(low=-1, high=1),
    )
    embeddings = bagpipe.EmbeddingBagCollection([table], optimizer=optimizer, seed=4)
    before = embeddings.tables()["t"][:].clone()
    batch = Jagged(keys=("f",), values=np.arange(NUM_ROWS), batch_size=NUM_ROWS)
    with bagpipe.lookahead([batch] * len(targets), embeddings, cache=NUM_ROWS) as batches:
        for sparse, target in zip(batches, targets, strict=True):
            (embeddings(sparse)["f"] * target).sum().backward()
    return before, embeddings.tables()["t"][:]


def gradients() -> Tensor:
    return torch.randn(NUM_STEPS, NUM_ROWS, DIM, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("optimizer", "make_torch"),
    [
        (SGD(lr=0.1, weight_decay=0.2), torch.optim.SGD),
        (Adagrad(lr=0.1, weight_decay=0.2), torch.optim.Adagrad),
        (Adam(lr=0.1, weight_decay=0.2), torch.optim.Adam),
        (AdamW(lr=0.1, weight_decay=0.2), torch.optim.AdamW),
    ],
    ids=["SGD", "Adagrad", "Adam", "AdamW"],
)
@pytest.mark.parametrize("max_grad_norm", [None, 1.5])
def test_as_torch(
    optimizer: Optimizer,
    make_torch: Callable[..., torch.optim.Optimizer],
    max_grad_norm: float | None,
) -> None:
    optimizer = replace(optimizer, max_grad_norm=max_grad_norm)
    before, after = train(optimizer, gradients())
    rows = [torch.nn.Parameter(row) for row in before.clone()]
    twin = make_torch(rows, lr=0.1, weight_decay=0.2)
    for target in gradients():
        for row, grad in zip(rows, target, strict=True):
            row.grad = grad.clone()
            if max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_([row], max_grad_norm)
        twin.step()
    torch.testing.assert_close(after, torch.stack(rows).detach(), rtol=1e-5, atol=1e-5)


def test_partial_row_wise_adam_by_its_formula() -> None:
    """FBGEMM's, in double precision."""
    before, after = train(PartialRowWiseAdam(lr=0.1, weight_decay=0.2), gradients())
    rows, first = before.double(), torch.zeros(NUM_ROWS, DIM, dtype=torch.float64)
    second = torch.zeros(NUM_ROWS, 1, dtype=torch.float64)
    for number, grad in enumerate(gradients().double(), 1):
        first = 0.9 * first + 0.1 * grad
        second = 0.999 * second + 0.001 * grad.square().mean(1, keepdim=True)
        step = first / (1 - 0.9**number) / ((second / (1 - 0.999**number)).sqrt() + 1e-8)
        rows = rows - 0.1 * (step + 0.2 * rows)
    torch.testing.assert_close(after.double(), rows, rtol=1e-5, atol=1e-5)
