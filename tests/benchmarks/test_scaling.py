"""The benchmark `scaling`: which runs it makes, what it compares, and what it keeps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.benchmarks.test_bench import run

from bagpipe.errors import BackgroundError
from bagpipe.native.spans import named_by, span
from benchmarks.trainers.settings import TrainersBench
from benchmarks.trainers.stages import STAGES, Stages

STEP_MS = {1: 10.0, 2: 10.5, 4: 10.6, 8: 11.5}
"""Of a made-up machine. With four trainers weak scaling is 0.943, with eight 0.870."""
Runs = list[TrainersBench]


def values_of(bench: TrainersBench, step_ms: float) -> dict[str, Any]:
    def arm(over_bagpipe: float) -> dict[str, Any]:
        ratio = {"median": over_bagpipe, "low": over_bagpipe, "high": over_bagpipe}
        return {
            "means_ms": [over_bagpipe * step_ms] * 2,
            "over_bagpipe": ratio,
            "over_dense": ratio,
            "sent_bytes": 3e6,
            "critical_bytes": 1e6,
        }

    overs = {"bagpipe": 1.0, "torchrec": 2.5, "dense": 0.8, "dense_alone": 0.6}
    workload = bench.workload
    planned = {"sent_bytes": 2e6, "critical_bytes": 1e6, "num_fetched": 5.0, "waiting_share": 0.5}
    waits = {f"{what}_wait_ms": 1.0 for what in ("plan", "rows", "slots", "replicas")}
    return {
        "workload": {"name": workload.name, "batch_size": workload.batch_size},
        "num_trainers": bench.num_trainers,
        "device": "a made-up GPU",
        "arms": {name: arm(over) for name, over in overs.items() if name in bench.arms},
        "parts_ms": {"step": step_ms} | waits | dict.fromkeys(STAGES, 2.0),
        "planned": planned,
        "num_fetched": 6.0,
        "notes": [f"a note of {bench.num_trainers}"],
    }


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Runs:
    """Replaces runs of trainers by made-up ones; the list is what was run."""
    runs: Runs = []

    def run_trainers(bench: TrainersBench, progress: Callable[..., None]) -> dict[str, Any]:
        runs.append(bench)
        step_ms = STEP_MS[bench.num_trainers] * bench.workload.batch_size / 32
        return values_of(bench, step_ms)

    monkeypatch.setattr("benchmarks.trainers.scaling.run_trainers", run_trainers)
    return runs


def scale(path: Path, *arguments: object) -> dict[tuple[str | None, int], dict[str, Any]]:
    """What the command saves, by mode and number of trainers."""
    result = run("scaling", "--quick", *arguments, "--json", path)
    assert result.exit_code == 0, result.stderr
    found = json.loads(path.read_text())["scaling"]["runs"]
    return {(each["mode"], each["num_trainers"]): each for each in found}


def test_each_run_is_compared_with_one_trainer_and_with_targets(made: Runs, tmp_path: Path) -> None:
    plot = tmp_path / "scaling.svg"
    found = scale(tmp_path / "scaling.json", "--plot", plot)
    sizes = [(each.num_trainers, each.workload.batch_size) for each in made]
    assert sizes == [(1, 32), (2, 32), (2, 16), (4, 32), (4, 8), (8, 32), (8, 4)]
    assert made[0].arms == ("bagpipe", "dense")  # a peer might not hold all rows on one device
    assert "one_trainer" not in made[1].arms
    assert list(found)[:3] == [(None, 1), ("weak", 2), ("strong", 2)]
    assert found["weak", 4]["over_one"]["median"] == pytest.approx(4 * 10.0 / 10.6)
    assert found["strong", 4]["over_one"]["median"] == pytest.approx(4 * 10.0 / 10.6)
    assert found["strong", 4]["samples_a_second"] == pytest.approx(32e3 / (10.6 / 4))
    reached = {
        (mode, count, name): target["is_reached"]
        for (mode, count), each in found.items()
        for name, target in each["targets"].items()
    }
    assert reached == {
        ("weak", 4, "samples"): True,
        ("weak", 8, "samples"): False,
        ("weak", 8, "torchrec"): True,
        ("strong", 8, "torchrec"): True,
    }
    assert found["weak", 2]["averaging_ms"] == pytest.approx((0.8 - 0.6) * 10.5)
    assert found[None, 1]["averaging_ms"] == 0.0
    assert plot.read_text().count(" scaling, a made-up GPU") == 2


def test_what_is_kept_is_not_run_again_unless_it_was_something_else(
    made: Runs, tmp_path: Path
) -> None:
    keep = ("--keep", tmp_path / "kept", "--trainers", 2)
    first = scale(tmp_path / "scaling.json", *keep, "--mode", "weak")
    assert len(made) == 2
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [
        "small-1.json",
        "small-weak-2.json",
    ]
    again = scale(tmp_path / "scaling.json", *keep)
    assert [each.workload.batch_size for each in made[2:]] == [16]
    assert {key: again[key] for key in first} == first
    scale(tmp_path / "scaling.json", *keep, "--mode", "weak", "--steps", "9")
    assert [each.num_trainers for each in made[3:]] == [1, 2]


def test_a_run_whose_rank_dies_costs_no_other(made: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_trainers(bench: TrainersBench, progress: Callable[..., None]) -> dict[str, Any]:
        if bench.num_trainers == 2:
            raise BackgroundError("rank 1 ended with status -9")
        return values_of(bench, 10.0) | {"notes": ["a note of all"]}

    monkeypatch.setattr("benchmarks.trainers.scaling.run_trainers", run_trainers)
    monkeypatch.setenv("COLUMNS", "200")
    result = run("scaling", "--quick", "--trainers", 2, "--trainers", 4, "--mode", "weak")
    assert result.exit_code == 0
    assert "small-weak-2: left out: rank 1 ended with status -9" in result.stdout
    assert "small-1, small-weak-4: a note of all" in result.stdout
    assert "1.00 [1.00, 1.00] │ 0.93: reached" in result.stdout


def test_mistakes_are_told_before_anything_runs(made: Runs) -> None:
    told = run("scaling", "--quick", "--batch", 12, "--trainers", 8).stderr
    assert "its batch of 12 samples can't be shared alike by 8 trainers" in told
    assert "--mode wide: must be weak or strong" in run("scaling", "--mode", "wide").stderr
    assert "--arm one_trainer: is unknown" in run("scaling", "--arm", "one_trainer").stderr
    if not torch.cuda.is_available():
        assert "torch sees 0" in run("scaling", "--device", "cuda").stderr
    assert made == []


def test_stages_are_timed_by_name_and_others_are_not() -> None:
    stages = Stages(torch.device("cpu"))
    with named_by(stages):
        for name in ("lookup", "oracle.plan", "lookup"):
            with span(name):
                sum(range(1000))
    found = stages.ms_a_step(2)
    assert list(found) == list(STAGES)
    assert [name for name, ms in found.items() if ms > 0] == ["lookup"]
    assert stages.ms_a_step(1)["lookup"] == pytest.approx(2 * found["lookup"])


@pytest.mark.soak
@pytest.mark.parametrize(
    ("num_trainers", "modes"),
    [(2, ("--mode", "weak", "--mode", "strong")), (8, ("--mode", "weak"))],
)
def test_trainers_at_a_tiny_size_send_what_was_planned(
    num_trainers: int, modes: tuple[str, ...], tmp_path: Path
) -> None:
    found = scale(
        *(tmp_path / "scaling.json", "--trainers", num_trainers, "--arm", "hashed"),
        *(*modes, "--steps", "3", "--rounds", "1"),
    )
    for (mode, count), each in found.items():
        arm = each["arms"]["bagpipe"]
        assert arm["sent_bytes"] == pytest.approx(each["planned"]["sent_bytes"], rel=1e-9)
        assert arm["critical_bytes"] == pytest.approx(each["planned"]["critical_bytes"], rel=1e-9)
        assert (arm["sent_bytes"] > 0) == (count > 1)
        # of the same global batches
        alike = mode != "weak"
        assert (
            arm["last_loss"]
            == pytest.approx(found[None, 1]["arms"]["bagpipe"]["last_loss"], rel=1e-5)
        ) == alike
        parts = each["parts_ms"]
        assert min(parts["lookup"], parts["dense"], parts["update"]) > 0
        assert (parts["sync_urgent"] > 0) == (count > 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_scaling_on_gpus(tmp_path: Path) -> None:
    device = "cuda" if torch.cuda.device_count() > 1 else "cuda:0"
    found = scale(
        *(tmp_path / "scaling.json", "--workload", "small", "--trainers", 2, "--device", device),
    )
    for each in found.values():
        arm = each["arms"]["bagpipe"]
        assert arm["sent_bytes"] == pytest.approx(each["planned"]["sent_bytes"], rel=1e-9)
        parts = each["parts_ms"]
        assert parts["dense"] > 0
        assert (parts["sync_urgent"] > 0) == (each["num_trainers"] > 1)
