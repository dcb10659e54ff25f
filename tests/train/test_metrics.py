"""Scores against their definitions, and the guard over the loss."""

from __future__ import annotations

import math

import pytest
import torch

from bagpipe.errors import LossError
from bagpipe.train.evaluate import BinaryScores
from bagpipe.train.report import LossWindow


def scores_of(logits: list[float], labels: list[float]) -> BinaryScores:
    scores = BinaryScores()
    for logit, label in zip(logits, labels, strict=True):
        scores.update(torch.tensor([logit]), torch.tensor([label]))
    return scores


def test_scores_over_batches_are_those_of_the_whole() -> None:
    scores = scores_of([2.0, -1.0, 0.5, -3.0], [1.0, 1.0, 0.0, 0.0]).compute()
    losses = [
        math.log1p(math.exp(-2.0)),
        math.log1p(math.exp(1.0)),
        math.log1p(math.exp(0.5)),
        math.log1p(math.exp(-3.0)),
    ]
    assert scores.num_samples == 4
    assert scores.log_loss == pytest.approx(sum(losses) / 4)
    assert scores.normalized_entropy == pytest.approx(sum(losses) / 4 / math.log(2))
    # of the four pairs of a click and none, one is ordered wrongly
    assert scores.auc == pytest.approx(3 / 4)


def test_one_class_has_no_auc() -> None:
    scores = scores_of([1.0, 2.0], [1.0, 1.0]).compute()
    assert (scores.auc, scores.normalized_entropy) == (None, None)


def test_the_window_gives_the_mean_and_empties() -> None:
    window = LossWindow()
    assert window.take() is None
    window.add(1, torch.tensor(1.0))
    window.add(2, torch.tensor(2.0))
    assert window.take() == 1.5
    assert window.take() is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_its_step(value: float) -> None:
    window = LossWindow()
    for step, loss in ((7, 1.0), (8, value), (9, math.nan)):
        window.add(step, torch.tensor(loss))
    with pytest.raises(LossError, match=rf"step 8: the loss is {value}.*smaller learning rates"):
        window.take()
