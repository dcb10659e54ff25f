"""The code and commands of README and of two pages run as they stand, as a newcomer pastes them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.soon import TIMEOUT_S
from typer.testing import CliRunner

from bagpipe.cli.app import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EMBEDDINGS = (ROOT / "docs/embeddings.md").read_text()
TRAINING = (ROOT / "docs/training.md").read_text()
SMALL = {
    "data.num_samples": "4096",
    "data.num_validation_samples": "256",
    "data.max_num_embeddings": "500",
    "embeddings.embedding_dim": "4",
    "cache.size": "100%",
    "train.batch_size": "512",
    "train.device": "cpu",
    "log.tensorboard": "false",
}

OF_A_RUN = {"eval", "predict", "export"}
"""Commands that take a run's folder, which says how large it is."""


def section(heading: str) -> str:
    """A section of README."""
    return README.split(f"## {heading}\n")[1].split("\n## ")[0]


def commands(text: str, *programs: str) -> list[list[str]]:
    """The commands of a text, without their comments; a backslash continues a line."""
    joined = text.replace("\\\n", " ")
    lines = [line for line in joined.splitlines() if line.startswith("    ")]
    parsed = [shlex.split(line, comments=True) for line in lines]
    elsewhere = {"--nnodes=2", "--engine", "serve", "settings"}  # tests of their own have these
    return [
        words for words in parsed if words and words[0] in programs and elsewhere.isdisjoint(words)
    ]


def made_small(words: list[str]) -> list[str]:
    """Settings of a command's own stay."""
    own = [value.split("=")[0] for value in words]
    model = [] if "model.kind=dcn" in words else ["model.top=[8,1]"]
    sizes = [f"{key}={value}" for key, value in SMALL.items() if key not in own]
    sizes += ["model.bottom=[4]", *model]
    if any("criteo" in word for word in words):
        sizes = [size for size in sizes if not size.startswith("data.")]
    sets = [part for size in sizes for part in ("--set", size)]
    is_small = not OF_A_RUN.isdisjoint(words) or "prepare" in words
    return [*words, *([] if is_small else sets)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a newcomer stands, with Criteo's raw data."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    raw = tmp_path / "data" / "raw"
    raw.mkdir(parents=True)
    lines = ("\t".join([str(i % 2), *["3"] * 13, *[f"{i % 7:08x}"] * 26]) for i in range(2000))
    (raw / "train.txt").write_text("".join(f"{line}\n" for line in lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_run_in_their_order(folder: Path) -> None:
    told = commands(section("From a file") + TRAINING, "bagpipe")
    assert {words[1] for words in told} == {"data", "plan", "train", *OF_A_RUN}
    for words in told:
        small = made_small(words[1:])
        if words[1] == "plan":
            small += ["--steps", "4", "--cache", "60%", "--lookahead", "2"]
        result = CliRunner().invoke(app, small, catch_exceptions=False)
        assert result.exit_code == 0, f"{shlex.join(words)}: {result.output}"
    for left in ("skew.png", "plan.png", "trace.json", "runs/dcn", "data/criteo-kaggle"):
        assert (folder / left).exists()


def test_the_commands_for_launchers_are_those_of_a_file_that_is_there() -> None:
    told = commands(section("Whatever is killed") + TRAINING, "torchrun")
    assert len(told) == 2
    for words in told:
        assert words[words.index("-m") + 1 :][:2] == ["bagpipe", "train"]
        assert (ROOT / words[words.index("train") + 1]).exists()


def test_the_loops_run_as_written() -> None:
    own_loop, many = re.findall(r"```python\n(.*?)```", README + EMBEDDINGS, flags=re.DOTALL)
    # as written but for their size: random rows of a table of gigabytes touch all its pages
    own_loop = re.sub(r"10_131_227|8_351_593", "20_000", own_loop).replace("2%", "50%")
    many = many.replace("2%", "50%")
    many = many.replace(
        "    ...  # as in README", "    assert sum(1 for _ in batches) == len(loader)"
    )
    environment = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    ended = subprocess.run(
        [sys.executable, "-c", f"{own_loop}assert loss.item() < 1.0\n{many}"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
