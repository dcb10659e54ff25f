"""The best model of a run: kept beside the last, scored on the test split, an end to the run."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from tests.train.runs import NUM_STEPS, Listener, newest_files, small_config

import bagpipe.train.loop
from bagpipe.checkpoint.files import list_checkpoints, step_of
from bagpipe.config.run import BestConfig
from bagpipe.errors import ConfigError
from bagpipe.train.best import Best
from bagpipe.train.loop import Result
from bagpipe.train.metrics import Scores
from bagpipe.train.trainer import StopRequest, train

BEST = {"metric": "auc", "patience": 2}


class StopsAt(Listener):
    """Asks the run to end at a step, as a signal does."""

    def __init__(self, step: int | None) -> None:
        super().__init__()
        self.step, self.stop = step, StopRequest()

    def advance(self, step: int) -> None:
        if step == self.step:
            self.stop.signal = signal.SIGTERM


def run(
    folder: Path, *, steps: int = NUM_STEPS, stop_at: int | None = None, resume: bool = False
) -> tuple[Result, list[str]]:
    listener = StopsAt(stop_at)
    config = small_config(
        folder,
        data={"num_test_samples": 100},
        train={"steps": steps, "eval_every_steps": 3, "best": BEST},
        checkpoint={"every_steps": 2, "keep": 1},
    )
    return train(config, reporter=listener, resume=resume, stop=listener.stop), listener.said


@pytest.fixture
def aucs(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """AUCs to be found on the validation split, by step; that on the test split is step / 100."""
    found: dict[int, float] = {}

    def evaluate(model: Any, source: Any, **options: Any) -> Scores:
        step, is_test = model.embeddings.step, source.num_samples == 100
        auc = step / 100 if is_test else found[step]
        return Scores(num_samples=9, values={"auc": auc, "log_loss": 1.0})

    monkeypatch.setattr(bagpipe.train.loop, "evaluate", evaluate)
    return found


def steps_kept(folder: Path) -> Iterable[int]:
    return [step_of(path) for path in list_checkpoints(folder / "checkpoints")]


def test_the_best_is_kept_and_tested_and_ends_the_run(
    tmp_path: Path, aucs: dict[int, float]
) -> None:
    aucs |= {3: 0.6, 6: 0.7, 9: 0.65, 12: 0.7}
    result, said = run(tmp_path / "whole")
    assert (result.step, result.best_step) == (12, 6)
    assert steps_kept(tmp_path / "whole") == [6, 12]
    assert (tmp_path / "whole" / "best").resolve().name == "step-0000000006"
    assert result.scores is not None
    assert result.scores["auc"] == 0.7
    assert result.test_scores is not None
    assert result.test_scores["auc"] == 0.06
    assert "the best auc, 0.7000, at step 6" in said
    assert "step 6: test AUC 0.0600, log-loss 1.0000 on 9 samples" in said
    records = [json.loads(line) for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["kind"] == "test"] == [6]

    # stopped in the middle, it goes on with what it knew
    run(tmp_path / "halves", stop_at=7)
    assert run(tmp_path / "halves", resume=True)[0].best_step == 6
    assert steps_kept(tmp_path / "halves") == [6, 12]
    # The files of records also have rows that were fetched for batches behind the end.
    halves, whole = (newest_files(tmp_path / folder)["dense.pt"] for folder in ("halves", "whole"))
    assert halves == whole


def test_a_run_that_has_ended_early_stays_ended(tmp_path: Path, aucs: dict[int, float]) -> None:
    aucs |= {3: 0.6, 6: 0.5, 9: 0.55}
    assert run(tmp_path)[0].step == 9
    before = newest_files(tmp_path)
    result, _ = run(tmp_path, resume=True)
    assert (result.step, result.best_step) == (9, 3)
    assert newest_files(tmp_path) == before


def test_the_last_model_may_be_the_best(tmp_path: Path, aucs: dict[int, float]) -> None:
    aucs |= {3: 0.6, 6: 0.7, 8: 0.8}
    result, _ = run(tmp_path, steps=8)
    assert (result.step, result.best_step) == (8, 8)
    assert result.test_scores is not None
    assert result.test_scores["auc"] == 0.08


@pytest.mark.parametrize(
    ("metric", "values", "is_best"),
    [
        ("log_loss", [3.0, 2.0, 1.95, 1.8], [True, True, False, True]),
        ("auc", [0.5, None, 0.55, 0.7], [True, False, False, True]),
        ("calibration", [2.0, 0.7, 1.29, 0.9], [True, True, False, True]),
    ],
)
def test_what_counts_as_better(metric: Any, values: list[Any], is_best: list[bool]) -> None:
    best = Best(BestConfig(metric=metric, min_gain=0.1))
    assert [best.note({metric: value}) for value in values] == is_best
    assert not best.is_over


def test_it_needs_evaluations(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"train\.best goes by evaluations .*train\.eval_every_steps"
    ):
        small_config(tmp_path, train={"best": {}})
