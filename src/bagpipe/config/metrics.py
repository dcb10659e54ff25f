"""What an evaluation tells, by name, and which of two models a metric prefers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, Field

Metric: TypeAlias = Literal[
    "auc", "grouped_auc", "log_loss", "normalized_entropy", "calibration", "accuracy"
]
"""`bagpipe.train.metrics` says how each is computed."""


def _check_once(metrics: tuple[Metric, ...]) -> tuple[Metric, ...]:
    for metric in metrics:
        if metrics.count(metric) > 1:
            raise ValueError(f"{metric!r} is given more than once")
    return metrics


Metrics: TypeAlias = Annotated[
    tuple[Metric, ...], Field(min_length=1, max_length=64), AfterValidator(_check_once)
]
DEFAULT_METRICS: tuple[Metric, ...] = ("auc", "log_loss", "normalized_entropy")
_BETTER_HIGH = ("auc", "grouped_auc", "accuracy")


def score_name(metric: Metric, label: str | None, labels: Sequence[str]) -> str:
    """What evaluations call a metric of one of `labels`; None stands for the first label."""
    return metric if len(labels) == 1 else f"{metric}/{label or labels[0]}"


def is_better_high(metric: Metric) -> bool:
    """Whether the better model has the higher value of what `compared` gives."""
    return metric in _BETTER_HIGH


def compared(metric: Metric, value: float) -> float:
    """What models are compared by: the value; of calibration its distance from 1."""
    return abs(value - 1.0) if metric == "calibration" else value
