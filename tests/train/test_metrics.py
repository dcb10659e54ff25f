"""Scores against their definitions, and the guard over the loss."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from tests.train.runs import Listener, small_config
from torchmetrics.functional.classification import binary_auroc

from bagpipe.config.metrics import Metric
from bagpipe.errors import CheckpointError, ConfigError, LossError
from bagpipe.train.metrics import BinaryScores, Scores, grouped_auc
from bagpipe.train.report import LossWindow
from bagpipe.train.trainer import train as run


def scores_of(
    logits: list[float], labels: list[float], groups: list[int], *metrics: Metric
) -> Scores:
    """Batch by batch, one sample each."""
    scores = BinaryScores(metrics or get_args(Metric))
    for sample in zip(logits, labels, groups, strict=True):
        scores.update(*(torch.tensor([value]) for value in sample))
    return scores.compute()


def test_scores_over_batches_are_those_of_the_whole() -> None:
    scores = scores_of([2.0, -1.0, 0.5, -3.0], [1.0, 1.0, 0.0, 0.0], [7, 7, 7, 5])
    losses = [
        math.log1p(math.exp(-2.0)),
        math.log1p(math.exp(1.0)),
        math.log1p(math.exp(0.5)),
        math.log1p(math.exp(-3.0)),
    ]
    predictions = [1 / (1 + math.exp(-logit)) for logit in (2.0, -1.0, 0.5, -3.0)]
    assert scores.as_dict() == pytest.approx(
        {
            "num_samples": 4,
            "auc": 3 / 4,  # of the four pairs of a click and none, one is ordered wrongly
            "grouped_auc": 1 / 2,  # in the one group that has both
            "log_loss": sum(losses) / 4,
            "normalized_entropy": sum(losses) / 4 / math.log(2),
            "calibration": sum(predictions) / 2,
            "accuracy": 2 / 4,
        }
    )
    assert Scores.of(scores.as_dict()) == scores


def test_grouped_auc_is_the_mean_of_groups_by_their_samples() -> None:
    rng = np.random.default_rng(3)
    groups, predictions = rng.integers(0, 9, 200), rng.integers(0, 12, 200) / 16  # with ties
    positive = rng.random(200) < groups / 9  # of group 0 none is
    aucs, sizes = [], []
    for group in range(1, 9):
        mine = groups == group
        if len(set(positive[mine])) == 2:
            auc = binary_auroc(
                torch.from_numpy(predictions[mine]), torch.from_numpy(positive[mine])
            )
            aucs.append(float(auc))
            sizes.append(mine.sum())
    assert len(aucs) >= 7
    assert grouped_auc(groups, predictions, positive, np.ones(200)) == pytest.approx(
        np.average(aucs, weights=sizes)
    )


def test_what_one_class_does_not_define_is_none() -> None:
    scores = scores_of([1.0, 2.0], [1.0, 1.0], [0, 0], "auc", "grouped_auc", "normalized_entropy")
    assert scores.values == {"auc": None, "grouped_auc": None, "normalized_entropy": None}
    assert str(scores) == "AUC none, grouped AUC none, normalized entropy none on 2 samples"
    assert scores_of([1.0], [0.0], [0], "calibration")["calibration"] is None


def test_a_run_tells_the_metrics_that_it_names_and_those_that_it_watches(tmp_path: Path) -> None:
    listener = Listener()
    train = {
        "steps": 4,
        "eval_every_steps": 2,
        "metrics": ["accuracy", "grouped_auc"],
        "group_by": "C2",
        "best": {"metric": "calibration"},
        "lr_schedule": {"kind": "plateau", "metric": "grouped_auc", "patience": 0},
    }
    run(small_config(tmp_path, train=train), reporter=listener)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    told = [record for record in records if record["kind"] == "evaluation"]
    names = ["kind", "step", "num_samples", "accuracy", "grouped_auc", "calibration"]
    assert [list(record) for record in told] == [names] * 2
    assert re.search(
        r"step 2: validation accuracy 0\.\d{4}, grouped AUC 0\.\d{4}, calibration \d\.\d{4} on 200",
        "\n".join(listener.said),
    )
    assert any(re.match(r"the best calibration, \d\.\d{4}, at", said) for said in listener.said)
    other_group = small_config(tmp_path, train=train | {"group_by": "C1"})
    with pytest.raises(CheckpointError, match=r"train.lr_schedule.group_by: 'C2' -> 'C1'"):
        run(other_group, reporter=listener, resume=True)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"metrics": ["auc", "auc"]}, "'auc' is given more than once"),
        ({"metrics": []}, r"train.metrics = \[\]: .*at least 1"),
        ({"metrics": ["acc"]}, r"train.metrics\[0\] = \"acc\": .*'accuracy'"),
        ({"metrics": ["grouped_auc"]}, "give it as train.group_by"),
        ({"group_by": "C1"}, "group_by = 'C1' is for grouped_auc, which nothing asks for"),
    ],
)
def test_metrics_that_can_not_be_are_refused(
    train: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        small_config(tmp_path, train=train)


@pytest.mark.parametrize(
    ("group_by", "message"),
    [("user", "no feature of that name; there are C1, C2, C3"), ("C2", "any number of ids")],
)
def test_samples_are_grouped_by_a_feature_with_one_id_each(
    group_by: str, message: str, tmp_path: Path
) -> None:
    train = {"metrics": ["grouped_auc"], "group_by": group_by, "steps": 1}
    config = small_config(tmp_path, train=train, data={"multi_hot": {"C2": [0, 2]}})
    with pytest.raises(ConfigError, match=message):
        run(config, reporter=Listener())


def test_the_window_gives_the_mean_and_empties() -> None:
    window = LossWindow()
    assert window.take() is None
    window.add(1, torch.tensor(1.0))
    window.add(2, torch.tensor(2.0))
    assert window.take() == (1.5,)
    assert window.take() is None
    window.add(3, torch.tensor([3.0, 1.0, 2.0]))
    window.add(4, torch.tensor([5.0, 1.0, 4.0]))
    assert window.take() == (4.0, 1.0, 3.0)  # of two labels, too


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_its_step(value: float) -> None:
    window = LossWindow()
    for step, loss in ((7, 1.0), (8, value), (9, math.nan)):
        window.add(step, torch.tensor(loss))
    with pytest.raises(LossError, match=rf"step 8: the loss is {value}.*smaller learning rates"):
        window.take()
