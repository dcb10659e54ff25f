"""The commands that come after training: what they say, and what mistakes print."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tests.cli.test_cli import RUN, invoke

import bagpipe.serving


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four steps."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "run.toml").write_text(RUN.format(folder=folder))
    assert invoke("train", folder / "run.toml", "--set", "train.steps=4").exit_code == 0
    return folder / "run"


def test_from_a_run_to_scores_predictions_and_a_served_model(run: Path, tmp_path: Path) -> None:
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    (evaluation,) = [record for record in log if record["kind"] == "evaluation"]
    result = invoke("eval", run, "--json", tmp_path / "scores.json")
    assert result.exit_code == 0, result.output
    assert "step 4: validation AUC " in result.output
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores == {key: value for key, value in evaluation.items() if key != "kind"}

    result = invoke("predict", run, "-o", tmp_path / "scores.parquet", "--batch-size", 40)
    assert result.exit_code == 0, result.output
    assert "scores.parquet: scores of 100 rows, by the model of step 4" in result.output
    assert pq.read_table(tmp_path / "scores.parquet").num_rows == 100

    result = invoke("export", run, tmp_path / "model", "--no-arrow")
    assert result.exit_code == 0, result.output
    assert "the model of step 4, 3 tables of 430 rows" in result.output
    row = {"I1": 1.0, "I2": 0.5, "I3": None, "C1": 3, "C2": 200, "C3": 89}
    assert 0 < bagpipe.serving.load(tmp_path / "model").predict([row])[0] < 1


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (["eval", "nowhere"], "nowhere: there is no such folder"),
        (["eval", "RUN", "--checkpoint", "best"], "train with train.best set"),
        (["eval", "RUN", "--split", "all"], "--split all: must be train"),
        (["predict", "RUN", "-o", "no/such/file.parquet"], "can't be written: No such file"),
        (["predict", "RUN", "none.parquet", "-o", "scores.parquet"], "no file at 'none.parquet'"),
        (["export", "RUN", "RUN"], "is there already"),
        (["export", "RUN", "model", "--set", "train.steps"], "must be section.key=value"),
    ],
)
def test_a_mistake_is_one_message_and_status_2(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], fact: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke(*(run if argument == "RUN" else argument for argument in arguments))
    assert result.exit_code == 2
    assert fact in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []
