"""Benchmarks run at tiny sizes, print and save what they promise; the arms compute the same; the
numpy oracle's plans are valid.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from bagpipe.oracle import Cacher, DedupedBatch, DedupedGroup, checked, dedup
from bagpipe.types import Group, GroupPlan, Jagged, StepPlan
from benchmarks import numpy_oracle
from benchmarks.cli import app
from benchmarks.gpu.arms import TorchCpuArm
from benchmarks.losses import disagreements
from benchmarks.measure import Timing, silent
from benchmarks.prepared_stream import make_stream
from benchmarks.streams import kaggle_group, make_batches
from benchmarks.workloads import make_workload


def run(*arguments: object) -> Result:
    return CliRunner().invoke(
        app, [str(argument) for argument in arguments], catch_exceptions=False
    )


def run_to_json(path: Path, *arguments: object) -> Any:
    """What a benchmark saves, with --quick."""
    result = run(*arguments, "--quick", "--json", path)
    assert result.exit_code == 0, result.stderr
    return json.loads(path.read_text())


# first of all tests on a new machine, these compile nearly every loop: two minutes on two cores
@pytest.mark.timeout(400)
def test_the_oracle_at_a_tiny_size(tmp_path: Path) -> None:
    saved = run_to_json(tmp_path / "oracle.json", "oracle")
    assert saved["environment"]["packages"]["torch"]
    assert saved["environment"]["cores"] >= 1
    assert saved["quick"]
    values = saved["oracle"]
    assert values["dedup"]["bagpipe"]["count"] == 3
    assert 4 <= values["bytes"]["row"] <= 16
    assert 8 <= values["bytes"]["slot"] <= 64
    assert [(live["num_trainers"], live["lookahead"]) for live in values["live"]] == [
        (1, 1),
        (1, 4),
    ]
    assert all(live["batches_per_s"] > 0 for live in values["live"])


@pytest.mark.timeout(400)
def test_a_step_at_a_tiny_size(tmp_path: Path) -> None:
    values = run_to_json(tmp_path / "step.json", "step")["step"]["by_batch_size"]["32"]
    assert values["arms"]["bagpipe"]["embedding"]["count"] == 10
    assert values["ratios"]["step_over_fused"] > 0
    assert all(difference < 1e-3 for difference in values["loss_differences"].values())
    assert values["loss_differences"]["fused to bagpipe"] == 0.0


def test_the_curve_at_a_tiny_size(tmp_path: Path) -> None:
    plot = tmp_path / "curve.svg"
    values = run_to_json(tmp_path / "curve.json", "curve", "--plot", plot)["curve"]
    assert values["rises"] == {"cache size": 0, "lookahead": 0}
    assert plot.stat().st_size > 1000


def test_options_reach_the_benchmark() -> None:
    result = run(
        *("step", "--quick", "--arm", "fused", "--batch", 16, "--rounds", 1),
        *("--max-rows", 50, "--lookahead", 2, "--json", "-"),
    )
    assert result.exit_code == 0, result.stderr
    values = json.loads(result.output[result.output.index("\n{\n") :])["step"]
    assert list(values["by_batch_size"]["16"]["arms"]) == ["bagpipe", "fused"]
    assert (values["sizes"]["max_rows"], values["sizes"]["lookahead"]) == (50, 2)


@pytest.mark.parametrize(
    ("benchmark", "foreign"),
    [
        ("oracle", ["--arm", "--workload", "--rounds", "--device", "--plot", "--graph"]),
        ("step", ["--workload", "--steps", "--threads", "--trainers", "--device", "--plot"]),
        ("curve", ["--arm", "--workload", "--rounds", "--steps", "--threads", "--trainers"]),
        ("gpu", ["--cache", "--trainers", "--device", "--graph"]),
        ("trainers", ["--cache", "--plot"]),
    ],
)
def test_an_option_that_a_benchmark_does_not_use_is_refused(
    benchmark: str, foreign: list[str]
) -> None:
    for option in foreign:
        result = run(benchmark, "--quick", option, "1")
        assert result.exit_code == 2
        assert f"No such option: {option}" in result.stderr


def test_arms_are_named_alike_and_an_unknown_one_is_refused() -> None:
    for benchmark, known in (
        ("step", "bagpipe, fused, fbgemm, torch_bags, of which bagpipe always runs"),
        ("gpu", "bagpipe, dense, fbgemm_hbm"),
        ("trainers", "bagpipe, no_overlap, replicated, hashed, torchrec"),
    ):
        result = run(benchmark, "--quick", "--arm", "nosuch")
        assert result.exit_code == 2
        assert f"error: --arm nosuch: is unknown; there are {known}" in result.stderr
    for benchmark in ("gpu", "trainers"):
        stderr = run(benchmark, "--quick", "--arm", "nosuch").stderr
        assert "of which bagpipe and dense always run" in stderr
        result = run(benchmark, "--quick", "--workload", "W9")
        assert result.exit_code == 2
        assert (
            "--workload W9: is unknown; there are W1, W2, W3, W4, W4-file, small" in result.stderr
        )


@pytest.mark.parametrize("workload", ["W1", "W3", "W4-file"])
def test_the_gpu_benchmark_at_tiny_sizes(workload: str, tmp_path: Path) -> None:
    plot = tmp_path / "gpu.svg"
    values = run_to_json(
        tmp_path / "gpu.json", "gpu", "--workload", workload, "--plot", plot, *("--threads", 1)
    )["gpu"]
    assert {"dense", "bagpipe", "torch_cpu"} <= set(values["arms"])
    for name, arm in values["arms"].items():
        assert arm["step"]["median_ms"] > 0
        assert max(arm["loss_differences"], default=0.0) < 1e-3
        assert len(arm["loss_differences"]) == (0 if name == "dense" else 8)
    assert values["bagpipe"]["num_fetched"] > 0
    assert values["floor"]["update"]["bytes"] > 0
    assert plot.stat().st_size > 1000


@pytest.mark.parametrize("num_calls", [0, 10])  # while it starts, and in a turn
def test_an_arm_that_fails_costs_the_others_nothing(
    num_calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(num_calls))
    lookup = TorchCpuArm.lookup

    def fail(self: TorchCpuArm, pooled: torch.Tensor) -> None:
        if next(calls, None) is None:
            raise MemoryError("no room")
        lookup(self, pooled)

    monkeypatch.setattr(TorchCpuArm, "lookup", fail)
    result = run(
        "gpu", "--quick", "--arm", "torch_cpu", "--arm", "dense", "--json", tmp_path / "gpu.json"
    )
    assert result.exit_code == 0, result.stderr
    assert "arm torch_cpu failed and is left out: MemoryError: no room" in " ".join(
        result.output.split()
    )
    arms = json.loads((tmp_path / "gpu.json").read_text())["gpu"]["arms"]
    assert list(arms) == ["bagpipe", "dense"]
    assert arms["bagpipe"]["step"]["median_ms"] > 0


def test_arms_are_given_the_rows_of_just_their_batches(tmp_path: Path) -> None:
    workload = make_workload("small", {"max_rows": 400}, quick=False)
    stream = make_stream(
        workload,
        tmp_path / "s",
        num_batches=12,
        num_resident=5,
        device=torch.device("cpu"),
        progress=silent,
    )
    offsets = workload.group.row_offsets[:-1, None]
    rows = [batch.indices.numpy().reshape(len(offsets), -1) + offsets for batch in stream.resident]
    assert len(rows) == 5
    np.testing.assert_array_equal(stream.resident_rows, np.unique(rows))
    assert len(np.setdiff1d(stream.resident_rows, stream.touched_rows)) == 0
    assert len(stream.touched_rows) > len(stream.resident_rows)


def test_an_arm_that_computes_something_else_is_named_with_its_step() -> None:
    found = disagreements(
        {"dense": [], "torch_cpu": [0.0, 1e-6, 1e-4], "fbgemm_hbm": [0.0, 0.05, float("inf")]}
    )
    assert len(found) == 1
    assert "arm fbgemm_hbm does NOT compute the same" in found[0]
    assert "at 2 of the first 3 steps, first at step 1 by 5.0e-02, at most by inf" in found[0]


def test_a_file_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    result = run("curve", "--quick", "--json", tmp_path / "nowhere" / "x.json")
    assert result.exit_code == 2
    assert "x.json: can't be written" in result.stderr


def test_timings_tell_median_and_spread() -> None:
    timing = Timing.of([0.001, 0.002, 0.003, 0.004, 0.005])
    assert (timing.min_ms, timing.low_ms, timing.median_ms, timing.high_ms, timing.max_ms) == (
        1,
        2,
        3,
        4,
        5,
    )
    assert str(timing) == "3.00 [2.00, 4.00]"


def admit(cacher: Cacher | numpy_oracle.NumpyCacher, batch: DedupedGroup) -> None:
    if isinstance(cacher, Cacher):
        cacher.admit(cacher.linker.link(batch))
    else:
        cacher.admit(batch)


def planned(
    cacher: Cacher | numpy_oracle.NumpyCacher, batches: list[DedupedGroup], lookahead: int
) -> Iterator[tuple[StepPlan, DedupedBatch[None]]]:
    num_admitted = 0
    for step, batch in enumerate(batches):
        while num_admitted < min(len(batches), step + lookahead + 1):
            admit(cacher, batches[num_admitted])
            num_admitted += 1
        plan = StepPlan(
            step=step,
            early_tick=max(0, step - 2),
            batch_size=64,
            groups=(cacher.plan(),),
            lookahead=0,
        )
        yield plan, DedupedBatch(payload=None, batch_size=64, groups=(batch,))


def num_fetched(plan: GroupPlan) -> int:
    return len(plan.early.fetch_rows) + len(plan.late.fetch_rows)


@pytest.mark.parametrize("lookahead", [1, 5, 20])
@pytest.mark.parametrize("num_slots", [900, 1500, 3000])
def test_the_numpy_oracle_plans_as_well_as_ours(lookahead: int, num_slots: int) -> None:
    group, batches = small_stream()
    ours = Cacher(group, num_slots=num_slots, max_lookahead=lookahead, prefetch_depth=2)
    naive = numpy_oracle.NumpyCacher(group, num_slots=num_slots, prefetch_depth=2)
    expected = sum(
        num_fetched(plan.groups[0])
        for plan, _ in planned(ours, [dedup(group, batch) for batch in batches], lookahead)
    )
    plans = planned(naive, [numpy_oracle.dedup(group, batch) for batch in batches], lookahead)
    found = sum(num_fetched(plan.groups[0]) for plan, _ in checked([group], [num_slots], plans))
    assert found == pytest.approx(expected, rel=0.02)


def test_the_numpy_oracle_finds_the_same_rows_and_sums() -> None:
    group, batches = small_stream()
    skewed = Jagged(
        keys=batches[0].keys, values=batches[0].values % 2, batch_size=batches[0].batch_size
    )
    for batch in (batches[0], skewed):
        ours, naive = dedup(group, batch), numpy_oracle.dedup(group, batch)
        np.testing.assert_array_equal(
            ours.unique_rows[ours.inverse], naive.unique_rows[naive.inverse]
        )
        assert bags_by_row(ours) == bags_by_row(naive)


def small_stream() -> tuple[Group, list[Jagged]]:
    group = kaggle_group(max_rows=500)
    batches = make_batches(group, num_batches=40, batch_size=64, progress=silent)
    return group, [batch.sparse for batch in batches]


def bags_by_row(batch: DedupedGroup) -> dict[int, list[list[int]]]:
    """Row -> the bags of each of its pieces, in order."""
    pieces = [
        batch.bags[begin:end].tolist()
        for begin, end in zip(batch.piece_offsets, batch.piece_offsets[1:], strict=False)
    ]
    num_uniques = len(batch.unique_rows)
    found = {int(row): [pieces[index]] for index, row in enumerate(batch.unique_rows)}
    for index, unique in enumerate(batch.long_uniques):
        first, last = batch.long_offsets[index], batch.long_offsets[index + 1]
        found[int(batch.unique_rows[unique])] += pieces[num_uniques + first : num_uniques + last]
    return found


def test_the_oracle_plans_for_several_trainers(tmp_path: Path) -> None:
    result = run("oracle", "--quick", "--trainers", 3, "--json", tmp_path / "oracle.json")
    assert result.exit_code == 0, result.stderr
    live = json.loads((tmp_path / "oracle.json").read_text())["oracle"]["live"]
    assert [(each["num_trainers"], each["lookahead"]) for each in live] == [
        (1, 1),
        (1, 4),
        (3, 1),
        (3, 4),
    ]
    assert all(each["batches_per_s"] > 0 and each["cache_was_full"] for each in live)
    assert live[3]["lookups_per_s"] / live[3]["batches_per_s"] == pytest.approx(3 * 64 * 26)
    assert live[3]["bytes_per_batch"] > live[1]["bytes_per_batch"]
    assert "must be at least 1" in run("oracle", "--quick", "--trainers", "0").stderr
