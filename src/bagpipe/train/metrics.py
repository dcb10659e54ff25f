"""Metrics of click prediction, by name, over the samples of an evaluation.

| name               | what it is                                                      |
|--------------------|-----------------------------------------------------------------|
| auc                | area under the ROC curve, exact, by torchmetrics                |
| grouped_auc        | mean of the AUCs of groups, each by its number of samples (1)   |
| log_loss           | mean binary cross-entropy                                       |
| normalized_entropy | log-loss over that of always predicting the average label (2)   |
| calibration        | sum of predictions over sum of labels: 1 is right               |
| accuracy           | share of samples on the right side of one half, by torchmetrics |

(1) Zhu et al., "Optimized Cost per Click in Taobao Display Advertising", KDD 2017. Groups with
labels of one class only have no AUC and are left out. (2) He et al., "Practical Lessons from
Predicting Clicks on Ads at Facebook", ADKDD 2014: below 1 is better than knowing nothing but the
average.

Where labels are of one class, or sum up to nothing, a metric that they do not define is None. For
auc, grouped_auc and accuracy a label from 0.5 up is a click.

Where samples have weights, each counts by its weight in every metric, and a pair of samples of an
AUC by the product of theirs; where all weights are 0, no metric is defined. torchmetrics' auc and
accuracy take no weights, so they are computed here then, exactly, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from bagpipe.config.metrics import DEFAULT_METRICS, Metric, score_name

_SHOWN = {
    "auc": "AUC",
    "grouped_auc": "grouped AUC",
    "log_loss": "log-loss",
    "normalized_entropy": "normalized entropy",
}
"""How a metric is called where its name would not do."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """How well logits predict labels."""

    num_samples: int
    values: Mapping[str, float | None]
    """By metric; None where the labels do not define it. With several labels each has its own, as
    "metric/label" (`bagpipe.config.metrics.score_name`)."""

    def __getitem__(self, metric: str) -> float | None:
        return self.values[metric]

    @classmethod
    def of(cls, scores: Mapping[str, Any]) -> Self:
        """The scores that `as_dict` has told."""
        values = {name: value for name, value in scores.items() if name != "num_samples"}
        return cls(num_samples=scores["num_samples"], values=values)

    def as_dict(self) -> dict[str, Any]:
        """All of it, flat, as JSON values."""
        return {"num_samples": self.num_samples, **self.values}

    def __str__(self) -> str:
        of_labels: dict[str, list[str]] = {}
        for name, value in self.values.items():
            metric, _, label = name.partition("/")
            shown = "none" if value is None else f"{value:.4f}"
            of_labels.setdefault(label, []).append(f"{_SHOWN.get(metric, metric)} {shown}")
        told = "; ".join(
            (f"{label}: " if label else "") + ", ".join(scores)
            for label, scores in of_labels.items()
        )
        return f"{told} on {self.num_samples:,} samples"


class BinaryScores:
    """Sums predictions up batch by batch.

    Keeps 12 bytes a sample for the AUC, and up to 17 more with groups or weights.
    """

    def __init__(self, metrics: Sequence[Metric] = DEFAULT_METRICS) -> None:
        """Nothing yet, for `metrics`, in whose order `compute` gives them."""
        # loads matplotlib, a second for which no start of a run should wait
        from torchmetrics.classification import BinaryAccuracy, BinaryAUROC

        self._metrics = tuple(metrics)
        # rank 0 alone scores
        self._auroc = BinaryAUROC(thresholds=None, sync_on_compute=False)
        self._accuracy = BinaryAccuracy(sync_on_compute=False)
        self._kept: list[tuple[Tensor, ...]] = []
        """For each batch its predictions, which samples are clicks, groups and weights."""
        self._has_weights = False
        self._num_samples = 0
        self._num_positive = 0
        self._weight_sum = 0.0
        self._loss_sum = 0.0
        self._label_sum = 0.0
        self._prediction_sum = 0.0
        self._right_sum = 0.0

    def update(
        self,
        logits: Tensor,
        labels: Tensor,
        groups: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> None:
        """Adds a batch.

        Args:
            logits: (B,) float32.
            labels: (B,) float32 in [0, 1].
            groups: The number of each sample's group (B,), for grouped_auc.
            weights: Of samples (B,) float32, 0 or more; all batches have weights, or none has.
        """
        logits, labels = logits.detach().cpu(), labels.cpu()
        positive, predictions = labels >= 0.5, torch.sigmoid(logits)
        self._has_weights = weights is not None
        if "auc" in self._metrics and weights is None:
            self._auroc.update(predictions, positive.long())
        if "accuracy" in self._metrics and weights is None:
            self._accuracy.update(predictions, positive.long())
        if groups is not None or weights is not None:
            each = torch.zeros_like(labels) if groups is None else groups
            one = torch.ones_like(labels) if weights is None else weights
            self._kept.append((each.long().cpu(), predictions, positive, one.cpu()))
        factors = None if weights is None else weights.cpu().double()
        self._num_samples += len(labels)
        self._num_positive += int(positive.sum())
        self._weight_sum += len(labels) if factors is None else float(factors.sum())
        self._loss_sum += float(
            binary_cross_entropy_with_logits(
                logits.double(), labels.double(), weight=factors, reduction="sum"
            )
        )
        self._label_sum += _sum(labels.double(), factors)
        self._prediction_sum += _sum(torch.sigmoid(logits.double()), factors)
        if factors is not None:
            self._right_sum += _sum((positive == (predictions > 0.5)).double(), factors)

    def compute(self) -> Scores:
        """The scores of all batches so far, at least one of which is needed."""
        return Scores(
            num_samples=self._num_samples,
            values={
                metric: self._value(metric) if self._weight_sum > 0 else None
                for metric in self._metrics
            },
        )

    def _value(self, metric: Metric) -> float | None:
        log_loss = self._loss_sum / self._weight_sum
        match metric:
            case "auc":
                if self._has_weights:
                    return self._grouped_auc(in_one_group=True)
                one_class = self._num_positive in (0, self._num_samples)
                return None if one_class else float(self._auroc.compute())
            case "grouped_auc":
                return self._grouped_auc()
            case "log_loss":
                return log_loss
            case "normalized_entropy":
                entropy = _entropy(self._label_sum / self._weight_sum)
                return log_loss / entropy if entropy > 0 else None
            case "calibration":
                return self._prediction_sum / self._label_sum if self._label_sum > 0 else None
            case "accuracy":
                if self._has_weights:
                    return self._right_sum / self._weight_sum
                return float(self._accuracy.compute())

    def _grouped_auc(self, *, in_one_group: bool = False) -> float | None:
        groups, predictions, positive, weights = (
            torch.cat(parts).numpy() for parts in zip(*self._kept, strict=True)
        )
        if in_one_group:
            groups = np.zeros_like(groups)
        return grouped_auc(groups, predictions, positive, weights)


class LabelScores:
    """Sums up predictions of one label or several, batch by batch."""

    def __init__(
        self, label_names: Sequence[str], metrics: Sequence[Metric] = DEFAULT_METRICS
    ) -> None:
        """Nothing yet; see `BinaryScores`, of which there is one for each label."""
        self._names, self._metrics = tuple(label_names), tuple(metrics)
        self._scores = [BinaryScores(metrics) for _ in self._names]

    def update(
        self,
        logits: Tensor,
        labels: Tensor,
        groups: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> None:
        """Adds a batch, as `BinaryScores.update` does; of L labels the first two are (B, L)."""
        shape = (len(labels), len(self._names))
        of_labels = zip(self._scores, logits.reshape(shape).T, labels.reshape(shape).T, strict=True)
        for scores, own_logits, own_labels in of_labels:
            scores.update(own_logits, own_labels, groups, weights)

    def compute(self) -> Scores:
        """The scores of all batches so far, at least one of which is needed."""
        computed = [scores.compute() for scores in self._scores]
        values = {
            score_name(metric, name, self._names): scores[metric]
            for name, scores in zip(self._names, computed, strict=True)
            for metric in self._metrics
        }
        return Scores(num_samples=computed[0].num_samples, values=values)


def grouped_auc(
    groups: npt.NDArray[np.int64],
    predictions: npt.NDArray[Any],
    positive: npt.NDArray[np.bool_],
    weights: npt.NDArray[Any],
) -> float | None:
    """The mean of groups' AUCs, each weighted by its samples' weights.

    Args:
        groups: The number of each sample's group, (n,).
        predictions: (n,) float; two equal ones count as half a pair in order.
        positive: Which samples are clicks, (n,).
        weights: The samples' weights, (n,) float.

    Returns:
        None where no group has labels of both classes.
    """
    order = np.lexsort((predictions, groups))
    groups, predictions, positive = groups[order], predictions[order], positive[order]
    weights = weights[order].astype(np.float64)
    is_new_group = np.concatenate([[True], groups[1:] != groups[:-1]])
    is_new_run = is_new_group | np.concatenate([[True], predictions[1:] != predictions[:-1]])
    # runs of equal predictions within a group
    runs = np.flatnonzero(is_new_run)
    hits = np.add.reduceat(weights * positive, runs)  # (num_runs,)
    misses = np.add.reduceat(weights * ~positive, runs)
    firsts = np.flatnonzero(is_new_group[runs])  # the first run of each group
    before = np.cumsum(misses) - misses
    below = before - np.repeat(before[firsts], np.diff(np.append(firsts, len(runs))))
    in_order = np.add.reduceat(hits * (below + misses / 2), firsts)  # (num_groups,)
    of_hits, of_misses = np.add.reduceat(hits, firsts), np.add.reduceat(misses, firsts)
    pairs = of_hits * of_misses
    counts = pairs > 0
    if not counts.any():
        return None
    aucs = in_order[counts] / pairs[counts]
    return float(np.average(aucs, weights=(of_hits + of_misses)[counts]))


def _sum(values: Tensor, factors: Tensor | None) -> float:
    return float(values.sum() if factors is None else (values * factors).sum())


def _entropy(probability: float) -> float:
    if not 0.0 < probability < 1.0:
        return 0.0
    return -probability * math.log(probability) - (1.0 - probability) * math.log(1.0 - probability)
