"""Held-out evaluation: AUC, log-loss and normalized entropy of click prediction.

The model reads records without training them, and nothing of the run changes.

With several trainers, each predicts every so many-th batch. Rank 0 scores all predictions in the
order of the batches. The scores are therefore the same to the bit for any number of trainers, as
long as their devices compute the same.

Normalized entropy is the log-loss divided by that of always predicting the average label (He et
al., "Practical Lessons from Predicting Clicks on Ads at Facebook", ADKDD 2014): below 1 is better
than knowing nothing but the average.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice, zip_longest

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from bagpipe.data.base import BatchSource, count_batches
from bagpipe.distributed.alone import ALONE, Peers
from bagpipe.train.dense_step import Precision, TorchBatch


@dataclass(frozen=True, kw_only=True)
class Scores:
    """How well logits predict labels.

    `auc` and `normalized_entropy` are None where all labels are the same.
    """

    num_samples: int
    log_loss: float
    normalized_entropy: float | None
    auc: float | None

    def __str__(self) -> str:
        auc = "none (one class only)" if self.auc is None else f"{self.auc:.4f}"
        return f"AUC {auc}, log-loss {self.log_loss:.4f} on {self.num_samples:,} samples"


class BinaryScores:
    """Sums predictions up batch by batch. Keeps 12 bytes a sample for the AUC, which is exact."""

    def __init__(self) -> None:
        # loads matplotlib, a second for which no start of a run should wait
        from torchmetrics.classification import BinaryAUROC

        self._auroc = BinaryAUROC(thresholds=None, sync_on_compute=False)  # rank 0 alone scores
        self._num_samples = 0
        self._num_positive = 0
        self._loss_sum = 0.0
        self._label_sum = 0.0

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Adds a batch: logits (B,) float32, labels (B,) float32 in [0, 1].

        For the AUC a label from 0.5 up is a click.
        """
        logits, labels = logits.detach().cpu(), labels.cpu()
        positive = labels >= 0.5
        self._auroc.update(torch.sigmoid(logits), positive.long())
        self._num_samples += len(labels)
        self._num_positive += int(positive.sum())
        self._loss_sum += float(
            binary_cross_entropy_with_logits(logits.double(), labels.double(), reduction="sum")
        )
        self._label_sum += float(labels.double().sum())

    def compute(self) -> Scores:
        """The scores of all batches so far, at least one of which is needed."""
        log_loss = self._loss_sum / self._num_samples
        entropy = _entropy(self._label_sum / self._num_samples)
        one_class = self._num_positive in (0, self._num_samples)
        return Scores(
            num_samples=self._num_samples,
            log_loss=log_loss,
            normalized_entropy=log_loss / entropy if entropy > 0 else None,
            auc=None if one_class else float(self._auroc.compute()),
        )


def evaluate(
    model: nn.Module,
    source: BatchSource,
    *,
    batch_size: int,
    device: torch.device,
    precision: Precision,
    peers: Peers = ALONE,
    on_batch: Callable[[int, int], None] = lambda number, num_batches: None,
) -> Scores | None:
    """How well `model` predicts the labels of `source`.

    The model is put into evaluation mode, and afterwards back into the mode that it was in.

    Args:
        model: from dense features and ids to logits (B,).
        source: every sample of it is scored once.
        batch_size: samples that are predicted together.
        device: where the model computes.
        precision: of the dense part.
        peers: the other trainers, by default none; all must call this together.
        on_batch: told how many of all batches are done, and at the end that all are.

    Returns:
        The scores on rank 0, None on other ranks. With several trainers rank 0 keeps 16 bytes a
        sample more than a single trainer.
    """
    rank, num_trainers = peers.rank, peers.num_trainers
    num_samples = source.num_samples
    num_batches = count_batches(num_samples, batch_size)

    def predictions() -> Iterator[Tensor]:
        """Logits and labels (B, 2) of each of this rank's batches, float32 on the CPU."""
        for number, read in enumerate(
            islice(source.reads(batch_size=batch_size), rank, None, num_trainers), 1
        ):
            batch = TorchBatch.of(read())
            logits = model(batch.dense.to(device), batch.sparse).float().cpu()
            on_batch(min(number * num_trainers, num_batches - 1), num_batches)
            yield torch.stack([logits, batch.labels], dim=1)

    was_training = model.training
    model.eval()
    try:
        with (
            torch.no_grad(),
            torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"),
        ):
            sizes = [min(batch_size, num_samples - at) for at in range(0, num_samples, batch_size)]
            by_rank = peers.gather(
                "predictions",
                predictions(),
                [sizes[each::num_trainers] for each in range(num_trainers)],
            )
            scores = BinaryScores()
            for predicted in chain.from_iterable(zip_longest(*by_rank)):
                if predicted is not None:  # the last ranks may have a batch less
                    scores.update(predicted[:, 0], predicted[:, 1])
        on_batch(num_batches, num_batches)
        return scores.compute() if rank == 0 else None
    finally:
        model.train(was_training)


def _entropy(probability: float) -> float:
    if not 0.0 < probability < 1.0:
        return 0.0
    return -probability * math.log(probability) - (1.0 - probability) * math.log(1.0 - probability)
