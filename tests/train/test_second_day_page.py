"""The commands of docs/second-day.md run as they stand, and do what the page says."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pyarrow as pa
from tests.cli.test_cli import invoke

from bagpipe.data.dictionaries import Dictionary

PAGE = (Path(__file__).parents[2] / "docs/second-day.md").read_text()


def values(folder: Path, table: str) -> list[object]:
    found: list[object] = Dictionary.open(folder, table).require_values().to_pylist()
    return found


def test_the_page_runs_as_it_stands(tmp_path: Path) -> None:
    (make,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    (settings,) = re.findall(r"```toml\n(.*?)```", PAGE, flags=re.DOTALL)
    lines = PAGE.replace("\\\n", " ").splitlines()
    told = [shlex.split(line) for line in lines if line.startswith("    bagpipe ")]
    assert [words[1] for words in told] == ["data", "train", "data", "eval", "train", "eval"]
    outputs = []
    with contextlib.chdir(tmp_path):
        exec(make, {})
        Path("run.toml").write_text(settings)
        for words in told:
            small = ["--set", "log.tensorboard=false", "--set", "train.device=cpu"]
            result = invoke(*words[1:], *(small if "train" in words else []))
            assert result.exit_code == 0, result.output
            outputs.append(result.output)
    day1, day2 = values(tmp_path / "data/day1", "user"), values(tmp_path / "data/day2", "user")
    assert day2[: len(day1)] == day1
    assert len(day2) > len(day1) > 100
    assert "starts from step" in outputs[4]
    assert f"new rows: user {len(day2) - len(day1)}, item " in outputs[4]
    told_from = json.loads((tmp_path / "runs/day2/from.json").read_text())
    assert Path(told_from["checkpoint"]).parent == (tmp_path / "runs/day1/checkpoints").resolve()
    (raw,) = (tmp_path / "data/day2").glob("train-*.arrow")
    ids = pa.ipc.open_file(raw).read_all().column("user").to_numpy()
    assert np.unique(ids).max() == len(day2)
