"""The command line: what a user's mistakes print, and that commands do what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from bagpipe.cli import app

RUN = """
[data]
kind = "synthetic"
num_samples = 300
num_validation_samples = 100
num_embeddings = [40, 300, 90]
num_dense = 3
[embeddings]
embedding_dim = 4
[model]
bottom = [8, 4]
top = [8, 1]
[train]
batch_size = 32
device = "cpu"
[log]
folder = "{folder}/run"
tensorboard = false
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(RUN.format(folder=tmp_path))
    return path


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(
        app, [str(argument) for argument in arguments], catch_exceptions=False
    )


def test_the_package_is_a_program() -> None:
    told = subprocess.run(
        [sys.executable, "-m", "bagpipe", "train", "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "--resume" in told


def test_version() -> None:
    result = invoke("--version")
    assert result.exit_code == 0
    assert result.output.startswith("bagpipe ")


def test_help_does_not_load_torch() -> None:
    code = (
        "import sys; from bagpipe.cli import app; app(['--help'], standalone_mode=False); "
        "assert 'torch' not in sys.modules"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "train" in ended.stdout


def test_train_then_resume_for_longer(file: Path) -> None:
    result = invoke("train", file, "--set", "train.steps=4")
    assert result.exit_code == 0
    assert "trained 4 steps; checkpoint: " in result.output
    result = invoke("train", file, "--resume")
    assert result.exit_code == 0
    assert "resumed from step 4" in result.output
    log = [
        json.loads(line) for line in (file.parent / "run" / "log.jsonl").read_text().splitlines()
    ]
    assert [record["step"] for record in log if record["kind"] == "end"] == [4, 10]


def test_train_another_model_and_trace_it(file: Path) -> None:
    trace = file.parent / "trace.json"
    steps = ["--trace", trace, "--trace-steps", 2, "--trace-after", 3]
    result = invoke("train", file, "--set", "model.kind=dcn", "--set", "model.cross_rank=4", *steps)
    assert result.exit_code == 0, result.output
    names = [event["name"] for event in json.loads(trace.read_text())["traceEvents"]]
    assert names.count("bagpipe.dense") == 2


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (["--set", "train.batchsize=4"], "did you mean 'batch_size'?"),
        (["--set", "data={kind='prepared', folder='nowhere'}"], "nowhere"),
        (["--set", "cache.size=10"], "give the cache at least"),
        (["--resume", "--overwrite"], "give one of them"),
        (["--trace-steps", "3"], "give it too"),
        (
            ["--set", "model.kind=deepfm"],
            "model.bottom: unknown key in [model]; there are top, kind",
        ),
    ],
)
def test_a_mistake_is_one_message_and_status_2(file: Path, arguments: list[str], fact: str) -> None:
    result = invoke("train", file, *arguments)
    assert result.exit_code == 2
    assert fact in result.stderr
    assert "Traceback" not in result.stderr


def test_a_missing_file_is_told() -> None:
    result = invoke("train", "none.toml")
    assert result.exit_code == 2
    assert "error: none.toml: can't be read: No such file or directory" in result.stderr


def test_data_inspect_prints_tables_and_draws(file: Path) -> None:
    plot = file.parent / "skew.svg"
    result = invoke("data", "inspect", file, "--batches", "2", "--plot", plot)
    assert result.exit_code == 0
    assert "Embedding tables" in result.output
    assert plot.stat().st_size > 0
    assert (
        "must be train or validation" in invoke("data", "inspect", file, "--split", "test").stderr
    )


def test_data_prepare_makes_what_train_reads(tmp_path: Path) -> None:
    raw = tmp_path / "raw.tsv"
    row = ["1", *["3"] * 13, *["68fd1e64"] * 26]
    raw.write_text("".join("\t".join([str(i % 2), *row[1:]]) + "\n" for i in range(100)))
    file = tmp_path / "run.toml"
    file.write_text(
        f"""
[prepare]
output = "{tmp_path}/prepared"
source = {{kind = "criteo", files = ["{raw}"], num_embeddings = 50}}
[data]
kind = "prepared"
folder = "{tmp_path}/prepared"
[embeddings]
embedding_dim = 4
[model]
bottom = [4]
top = [1]
[train]
batch_size = 16
device = "cpu"
[log]
folder = "{tmp_path}/run"
"""
    )
    result = invoke("data", "prepare", file)
    assert result.exit_code == 0
    assert "90 training and 10 validation rows" in result.output
    result = invoke("train", file)
    assert result.exit_code == 0
    assert "trained 6 steps" in result.output


def test_data_prepare_tells_what_is_missing(file: Path) -> None:
    result = invoke("data", "prepare", file)
    assert result.exit_code == 2
    assert "prepare: is missing" in result.stderr


def test_plan_for_several_trainers_says_what_they_send(file: Path) -> None:
    grid = ["--cache", "50%", "--lookahead", 2, "--steps", 8]
    many, alone = file.parent / "many.json", file.parent / "alone.json"
    result = invoke(
        "plan", file, "--trainers", 3, *grid, "--set", "train.batch_size=24", "--json", many
    )
    assert result.exit_code == 0, result.output
    assert "Sent between 3 trainers a step" in result.output
    result = invoke("plan", file, *grid, "--set", "train.batch_size=24", "--json", alone)
    assert result.exit_code == 0, result.output
    assert "trainers" not in result.output + alone.read_text()
    values = json.loads(many.read_text())
    assert values["num_trainers"] == 3
    assert values["points"][0]["traffic"]["copies_rows_per_step"] > 0
    result = invoke(
        "plan", file, "--trainers", 4, "--hosts", 2, *grid, "--set", "train.batch_size=24"
    )
    assert "Sent between 4 trainers on 2 hosts a step" in result.output
    assert "off host: share of the bytes that leaves one" in " ".join(result.output.split())
    # A batch is that of all trainers together.
    assert values["uniques_per_step"] == json.loads(alone.read_text())["uniques_per_step"]
