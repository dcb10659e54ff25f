"""The command line: what a user's mistakes print, and that commands do what they say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import typer
from rich.console import Console
from tests.soon import SOON_S
from typer.testing import CliRunner, Result

from bagpipe.cli.app import app
from bagpipe.cli.common import mistakes_told
from bagpipe.data.inspect import TableStats, render_table
from bagpipe.distributed.trainers import Trainers
from bagpipe.distributed.waiting import naming_failures

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
        "import sys; from bagpipe.cli.app import app; app(['--help'], standalone_mode=False); "
        "assert 'torch' not in sys.modules"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=SOON_S, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "train" in ended.stdout


def test_what_trains_is_imported_without_looking_for_garbage() -> None:
    code = (
        "import gc; from bagpipe.cli.common import load_training; "
        "before = gc.get_stats()[2]; load_training(); "
        "assert gc.isenabled() and gc.get_freeze_count() > 100_000; "
        "assert gc.get_stats()[2] == before"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=SOON_S, check=False
    )
    assert ended.returncode == 0, ended.stderr


def test_a_run_does_not_import_torchs_compiler(file: Path) -> None:
    code = (
        "import sys; from bagpipe.cli.app import app; app(sys.argv[1:], standalone_mode=False); "
        "assert 'torch._dynamo' not in sys.modules"
    )
    changes = ("--set", "train.steps=2", "--set", "train.lr_schedule={kind='cosine'}")
    ended = subprocess.run(
        [sys.executable, "-c", code, "train", file, *changes],
        capture_output=True,
        text=True,
        timeout=SOON_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "trained 2 steps" in ended.stdout


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
    assert names.count("bagpipe.dense") == 2 * 2


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (["--set", "train.batchsize=4"], "did you mean 'batch_size'?"),
        (["--set", "data={kind='prepared', folder='nowhere'}"], "nowhere"),
        (["--set", "cache.size=10"], "give the cache at least"),
        (["--resume", "--overwrite"], "give one of them"),
        (["--trace-steps", "3"], "give it too"),
        (["--set", "servers.num_shards=2"], "trainers start one server on each of 1 hosts"),
        (["--engine", "slurm"], "--engine slurm: must be ray"),
        (["--servers", "2"], "belong to --engine ray"),
        (["--life-timeout", "5"], "belong to --engine ray"),
        (
            ["--set", "model.kind=deepfm"],
            "model.bottom: unknown key in [model]; there are top, dropout, batch_norm, kind",
        ),
    ],
)
def test_a_mistake_is_one_message_and_status_2(file: Path, arguments: list[str], fact: str) -> None:
    result = invoke("train", file, *arguments)
    assert result.exit_code == 2
    assert fact in result.stderr
    assert "Traceback" not in result.stderr


def test_plan_names_the_smallest_cache_and_a_smaller_one_loses_no_step(file: Path) -> None:
    planned = file.parent / "plan.json"
    result = invoke("plan", file, "--lookahead", 2, "--steps", 8, "--json", planned)
    assert "Largest of the first 10 batches: " in result.output
    values = json.loads(planned.read_text())
    (largest,), enough = values["largest_batches"], values["smallest_cache_that_trains"]
    result = invoke("train", file, "--set", f"cache.size={enough['cache_rows'] - 1}")
    assert result.exit_code == 2
    assert f"give the cache at least {enough['cache_rows']} rows" in result.stderr
    assert (
        f"{largest['step']} steps are saved in {file.parent}/run/checkpoints/step-" in result.stderr
    )
    assert "--resume goes on from there" in result.stderr
    result = invoke("train", file, "--resume", "--set", f"cache.size={enough['cache_rows']}")
    assert result.exit_code == 0, result.stderr
    assert f"resumed from step {largest['step']}" in result.output


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
        "must be train, validation or test"
        in invoke("data", "inspect", file, "--split", "other").stderr
    )


def test_data_prepare_makes_what_train_reads(tmp_path: Path) -> None:
    raw = tmp_path / "raw.tsv"
    lines = [[str(i % 2), "-3", *["3"] * 12, *["68fd1e64"] * 26] for i in range(100)]
    for line in lines[90:]:
        line[14] = "abc"  # C1 of validation
    raw.write_text("".join("\t".join(line) + "\n" for line in lines))
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
    assert "made 0 of values below 0: I1 100 (100.0%)" in result.output
    assert "of the lookups C1 about 100%" in result.output
    assert "of the lookups C1 about 100%" in invoke("data", "inspect", file).output
    result = invoke("train", file)
    assert result.exit_code == 0
    assert "of the lookups C1 about 100%" in result.output
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
    assert "rows for each of the 3 trainers." in " ".join(result.output.split())
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


@pytest.mark.parametrize(
    "command", [(), ("train",), ("plan",), ("data",), ("data", "prepare")], ids="-".join
)
def test_help_shows_every_word_and_no_object(command: tuple[str, ...]) -> None:
    told = typer.main.get_command(app)
    for name in command:
        told = told.commands[name]  # type: ignore[attr-defined]
    shown = re.sub(r"[│╭╮╰╯─`]", " ", invoke(*command, "--help").output)
    texts = [told.help, *(getattr(option, "help", None) for option in told.params)]
    if command == ("data",):
        texts += [inner.help for inner in told.commands.values()]  # type: ignore[attr-defined]
    for text in texts:
        words = (text or "").replace("`", " ").split()
        assert set(words) <= set(shown.split())
    assert "class" not in shown


def test_help_opens_with_what_it_is_for() -> None:
    assert "Train deep recommendation models" in invoke("--help").output.split("\n\n")[0]


def test_a_name_with_brackets_is_printed_whole(tmp_path: Path) -> None:
    folder = tmp_path / "[odd] name"
    folder.mkdir()
    file = folder / "run.toml"
    file.write_text(RUN.format(folder=folder))
    plot = folder / "skew.svg"
    assert f"plot: {plot}" in invoke("data", "inspect", file, "--plot", plot).output
    assert str(folder) in invoke("train", file, "--set", "train.steps=1").output
    assert "none[1].toml: can't be read" in invoke("train", "none[1].toml").stderr
    stats = TableStats(
        table="[genre]",
        num_embeddings=133_762_577,
        num_seen=10_119_621,
        num_lookups=100_040_000,
        num_bags=100_040_000,
        num_seen_once=10_086_213,
        top_seen_share=1.0,
        top_rows_share=1.0,
        curve=(np.empty(0), np.empty(0)),
    )
    console = Console(width=80)  # also that of a pipe
    with console.capture() as captured:
        console.print(render_table([stats]))
    assert "[genre]" in captured.get()
    assert "133,762,577" in captured.get()
    assert "…" not in captured.get()


@pytest.mark.parametrize(
    ("command", "path", "fact"),
    [
        ("data inspect --plot", "nowhere/skew.png", "can't be written: No such file"),
        ("data inspect --plot", "skew.doc", "can't be saved: its ending must be one of"),
        ("plan --plot", "nowhere/plan.png", "can't be written: No such file"),
        ("plan --plot", "plan.doc", "can't be saved: its ending must be one of"),
        ("plan --json", "nowhere/plan.json", "can't be written: No such file"),
    ],
)
def test_a_file_that_cannot_be_written_is_told_before_reading(
    file: Path, monkeypatch: pytest.MonkeyPatch, command: str, path: str, fact: str
) -> None:
    *command_words, option = command.split()
    monkeypatch.setattr("bagpipe.data.open_source", lambda *_: pytest.fail("has read"))
    result = invoke(*command_words, file, option, file.parent / path)
    assert result.exit_code == 2
    assert path in result.stderr
    assert fact in result.stderr
    assert not (file.parent / path).exists()


@pytest.mark.parametrize(
    ("doing", "told"),
    [
        (Trainers().averaging(7), "averaging the dense part's gradients of step 7 failed"),
        (naming_failures(1, 2, "the barrier"), "rank 1: the barrier failed; another of the 2"),
    ],
    ids=["averaging", "barrier"],
)
def test_who_has_lost_another_trainer_is_told_so_in_a_sentence(
    doing: AbstractContextManager[None], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as ended, mistakes_told(), doing:
        raise RuntimeError("gloo: Connection reset by peer")
    assert ended.value.exit_code == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ")
    assert told in stderr
    assert stderr.endswith("gloo: Connection reset by peer\n")
