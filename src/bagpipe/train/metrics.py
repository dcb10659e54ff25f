"""Metrics of click prediction: AUC, log-loss and normalized entropy, and the training loss with its
guard.

Normalized entropy is the log-loss divided by that of always predicting the average label (He et
al., "Practical Lessons from Predicting Clicks on Ads at Facebook", ADKDD 2014): below 1 is better
than knowing nothing but the average.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from bagpipe.errors import LossError


@dataclass(frozen=True, kw_only=True)
class Scores:
    """How well logits predict labels. `auc` and `normalized_entropy` are None where all labels are
    the same.
    """

    num_samples: int
    log_loss: float
    normalized_entropy: float | None
    auc: float | None


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
        """Adds a batch: logits (B,) float32, labels (B,) float32 in [0, 1]; for the AUC a label
        from 0.5 up is a click.
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


class LossWindow:
    """The losses of the steps since the last look, left on their device, so that no step waits for
    its loss.
    """

    def __init__(self) -> None:
        self._first_step = 0
        self._losses: list[Tensor] = []

    def add(self, step: int, loss: Tensor) -> None:
        """Adds the loss of `step`, a scalar; steps come one after the other."""
        if not self._losses:
            self._first_step = step
        self._losses.append(loss.detach())

    def take(self) -> float | None:
        """The mean of the losses since the last call, None when there are none. LossError: one is
        not finite.
        """
        if not self._losses:
            return None
        losses = torch.stack(self._losses).double().cpu()
        self._losses = []
        finite = torch.isfinite(losses)
        if not bool(finite.all()):
            first = int(torch.nonzero(~finite)[0])
            raise LossError(
                f"step {self._first_step + first}: the loss is {losses[first].item()}: training "
                "has diverged, and nothing was "
                "saved since. Start again with smaller learning rates (train.optimizer.lr, "
                "embeddings.optimizer.lr)"
            )
        return float(losses.mean())


def _entropy(probability: float) -> float:
    if not 0.0 < probability < 1.0:
        return 0.0
    return -probability * math.log(probability) - (1.0 - probability) * math.log(1.0 - probability)
