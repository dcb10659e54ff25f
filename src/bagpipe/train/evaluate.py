"""Held-out evaluation: the model reads records without training them, and nothing of the run changes."""

from __future__ import annotations

import torch
from torch import nn

from bagpipe.data.base import BatchSource
from bagpipe.train.batches import TorchBatch
from bagpipe.train.dense_step import Precision
from bagpipe.train.metrics import BinaryScores, Scores


def evaluate(model: nn.Module, source: BatchSource, *, batch_size: int, device: torch.device, precision: Precision) -> Scores:
    """How well `model` predicts the labels of all of `source`, in evaluation mode; the mode is put back afterwards."""
    scores = BinaryScores()
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            for numpy_batch in source.batches(batch_size=batch_size):
                batch = TorchBatch.of(numpy_batch).to(device)
                scores.update(model(batch.dense, batch.sparse).float(), batch.labels)
    finally:
        model.train(was_training)
    return scores.compute()
