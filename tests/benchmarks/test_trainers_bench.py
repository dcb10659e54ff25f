"""The benchmark `trainers` from the command to the report, at a tiny size, and its refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.benchmarks.test_bench import run

from benchmarks.trainers.bench import summarize
from benchmarks.trainers.settings import TrainersBench
from benchmarks.workloads import make_workload

ROOT = Path(__file__).parents[2]
COMPARED = ("bagpipe", "no_overlap", "replicated", "hashed")


@pytest.mark.soak
def test_the_benchmark_at_a_tiny_size(tmp_path: Path) -> None:
    """Run from the top of the repository; the ranks' processes find its modules, too."""
    file = tmp_path / "trainers.json"
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks", "trainers", "--quick"),
            *("--steps", "3", "--rounds", "2", "--json", str(file)),
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": "src"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    values = json.loads(file.read_text())["trainers"]
    values["arms"].pop("torchrec", None)  # has a test of its own
    assert list(values["arms"]) == [
        "bagpipe",
        "no_overlap",
        "replicated",
        "hashed",
        "dense",
        "dense_alone",
        "one_trainer",
    ]
    for name, arm in values["arms"].items():
        assert arm["step"]["count"] == 6
        assert arm["over_bagpipe"]["median"] > 0
        assert len(arm["loss_differences"]) == (8 if name in COMPARED else 0)
        assert max(arm["loss_differences"], default=0.0) == 0.0  # two trainers: no sum has an order
    sent = {
        name: (arm["sent_bytes"], arm["critical_bytes"]) for name, arm in values["arms"].items()
    }
    assert sent["dense"] == sent["one_trainer"] == (0, 0)
    # at the ends of what is counted they differ
    assert sent["bagpipe"][0] == pytest.approx(sent["no_overlap"][0], rel=0.01)
    assert sent["bagpipe"][1] < sent["no_overlap"][1] == sent["no_overlap"][0]
    assert sent["bagpipe"][0] < sent["hashed"][0] < sent["replicated"][0]
    assert values["speedup_over_one"]["median"] > 0
    assert "agree within" in ended.stdout


@pytest.mark.parametrize("num_trainers", [2, 4])
def test_torchrec_trains_the_same(num_trainers: int, tmp_path: Path) -> None:
    pytest.importorskip("torchrec")
    arms = ("--arm", "torchrec", "--arm", "torchrec_uvm")
    result = run(
        "trainers",
        "--quick",
        "--trainers",
        num_trainers,
        *arms,
        "--json",
        tmp_path / "trainers.json",
    )
    assert result.exit_code == 0, result.stderr
    values = json.loads((tmp_path / "trainers.json").read_text())["trainers"]["arms"]
    assert list(values) == ["bagpipe", "torchrec", "dense"]
    assert max(values["torchrec"]["loss_differences"]) < 1e-5
    assert (
        "left out torchrec_uvm: host memory behind a cache needs --device cuda"
        in result.output.replace("\n", " ")
    )
    sent = values["torchrec"]
    pooled_bytes = 32 * 26 * 8 * 4
    assert sent["critical_bytes"] == 2 * (num_trainers - 1) * pooled_bytes
    assert 0 < sent["sent_bytes"] - sent["critical_bytes"] < 32 * 26 * (8 + 4 * (num_trainers - 1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_benchmark_on_gpus(tmp_path: Path) -> None:
    device = "cuda" if torch.cuda.device_count() > 1 else "cuda:0"
    result = run("trainers", "--quick", "--device", device, "--json", tmp_path / "trainers.json")
    assert result.exit_code == 0, result.stderr
    arms = json.loads((tmp_path / "trainers.json").read_text())["trainers"]["arms"]
    by_nccl = ["by_nccl"] if device == "cuda" else []
    assert list(arms) == [*COMPARED, *by_nccl, "dense", "dense_alone", "one_trainer"]
    assert max(difference for arm in arms.values() for difference in arm["loss_differences"]) < 1e-3


def test_mistakes_are_told() -> None:
    assert "must be at least 2" in run("trainers", "--quick", "--trainers", "1").stderr
    assert "not in a file" in run("trainers", "--quick", "--workload", "W4-file").stderr
    assert (
        "must be 'cpu', 'cuda' or 'cuda:0'" in run("trainers", "--quick", "--device", "tpu").stderr
    )
    assert "--graph captures CUDA graphs" in run("trainers", "--quick", "--graph").stderr
    if not torch.cuda.is_available():
        assert (
            "need 2 CUDA devices: torch sees 0"
            in run("trainers", "--quick", "--device", "cuda").stderr
        )
        assert (
            "need 1 CUDA devices: torch sees 0"
            in run("trainers", "--quick", "--device", "cuda:0").stderr
        )


def test_a_rank_that_fails_ends_the_run_with_its_error() -> None:
    result = run(
        "trainers", "--quick", "--max-rows", "100000", "--batch", "4096", "--arm", "bagpipe"
    )
    assert result.exit_code == 2
    assert "slots" in result.stderr or "rows" in result.stderr


def test_a_step_is_as_long_as_on_the_slowest_rank_and_ratios_are_of_one_round() -> None:
    workload = replace(
        make_workload("small", {}, quick=True), num_compared=2, turn_steps=2, rounds=2
    )
    bench = TrainersBench(workload=workload, arms=("bagpipe", "dense"))

    def arm(turns_s: list[list[float]], losses: list[float], now: float) -> dict[str, object]:
        return {
            "turns_s": turns_s,
            "losses": losses,
            "sent_bytes": {"urgent": now, "overlapped": 2.0},
            "counters": {"num_fetched": 10 * now},
        }

    seen = [
        {
            "notes": [],
            "dense_bytes": 7,
            "driver_calls": {"cudaGraphLaunch": 2.0},
            "parts": {"step": 4.0, "lookup": 1.0},
            "arms": {
                "bagpipe": arm([[1, 3], [2, 2]], [0.5, 0.7], 4.0),
                "dense": arm([[1, 1], [2, 2]], [1, 1], 0),
            },
        },
        {
            "notes": [],
            "dense_bytes": 7,
            "driver_calls": {"cudaGraphLaunch": 2.0},
            "parts": {"step": 6.0, "lookup": 2.0},
            "arms": {
                "bagpipe": arm([[3, 1], [2, 2]], [0.5, 0.9], 6.0),
                "dense": arm([[1, 1], [1, 1]], [1, 1], 0),
            },
        },
    ]
    values = summarize(bench, seen)
    lrpp, dense = values["arms"]["bagpipe"], values["arms"]["dense"]
    assert (lrpp["step"].median_ms, lrpp["step"].max_ms) == (2500.0, 3000.0)
    assert lrpp["over_dense"]["median"] == (3 / 1 + 2 / 2) / 2
    assert dense["over_bagpipe"]["median"] == (1 / 3 + 2 / 2) / 2
    assert (lrpp["sent_bytes"], lrpp["critical_bytes"], lrpp["most_sent_bytes"]) == (7.0, 5.0, 8.0)
    assert lrpp["last_loss"] == 0.65
    assert (lrpp["means_ms"], values["num_fetched"]) == ([3000.0, 2000.0], 50.0)
    assert values["parts_ms"] == {"step": 5.0, "lookup": 1.5}
    assert values["speedup_over_one"] is None
