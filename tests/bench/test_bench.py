"""Benchmarks run at tiny sizes, print and save what they promise; the arms compute the same; the
numpy oracle's plans are valid.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from bagpipe.bench import numpy_oracle
from bagpipe.bench.gpu_arms import TorchCpuArm
from bagpipe.bench.gpu_bench import disagreements
from bagpipe.bench.gpu_data import make_stream
from bagpipe.bench.gpu_workloads import make_workload
from bagpipe.bench.measure import Timing, silent
from bagpipe.bench.sizes import curve_sizes, gpu_sizes, oracle_sizes, step_sizes, trainers_sizes
from bagpipe.bench.streams import kaggle_group, make_batches
from bagpipe.cli_bench import bench
from bagpipe.oracle import Cacher, DedupedBatch, DedupedGroup, checked, dedup
from bagpipe.types import Group, GroupPlan, Jagged, StepPlan

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(bench)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(
        app, [str(argument) for argument in arguments], catch_exceptions=False
    )


# first of all tests on a new machine, it compiles nearly every loop: two minutes on two cores
@pytest.mark.timeout(400)
def test_all_benchmarks_at_tiny_sizes(tmp_path: Path) -> None:
    result = run(
        "all", "--quick", "--json", tmp_path / "all.json", "--plot", tmp_path / "curve.svg"
    )
    assert result.exit_code == 0, result.stderr
    values = json.loads((tmp_path / "all.json").read_text())
    assert "left out gpu" in result.output
    assert values["environment"]["packages"]["torch"]
    assert values["environment"]["cores"] >= 1
    assert values["oracle"]["dedup"]["bagpipe"]["count"] == 3
    assert 4 <= values["oracle"]["bytes"]["row"] <= 16
    assert 8 <= values["oracle"]["bytes"]["slot"] <= 64
    assert [(live["num_trainers"], live["lookahead"]) for live in values["oracle"]["live"]] == [
        (1, 1),
        (1, 4),
    ]
    assert all(live["batches_per_s"] > 0 for live in values["oracle"]["live"])
    step = values["step"]["by_batch_size"]["32"]
    assert step["arms"]["bagpipe"]["embedding"]["count"] == 10
    assert step["ratios"]["step_over_fused"] > 0
    assert all(difference < 1e-3 for difference in step["loss_differences"].values())
    assert step["loss_differences"]["fused to bagpipe"] == 0.0
    assert values["trainers"]["arms"]["hashed"]["step"]["count"] == 8
    assert values["curve"]["rises"] == {"cache size": 0, "lookahead": 0}
    assert (tmp_path / "curve.svg").stat().st_size > 1000


def test_options_reach_the_benchmark() -> None:
    result = run(
        "step",
        "--quick",
        "--arm",
        "fused",
        "--batch",
        "16",
        "--rounds",
        "1",
        "--max-rows",
        "50",
        "--json",
        "-",
    )
    assert result.exit_code == 0, result.stderr
    values = json.loads(result.output[result.output.index("\n{\n") :])["step"]
    assert list(values["by_batch_size"]["16"]["arms"]) == ["fused"]
    assert values["sizes"]["max_rows"] == 50
    assert values["by_batch_size"]["16"]["bagpipe"] is None


@pytest.mark.parametrize("workload", ["W1", "W3", "W4-file"])
def test_the_gpu_benchmark_at_tiny_sizes(workload: str, tmp_path: Path) -> None:
    result = run(
        "gpu",
        "--quick",
        "--workload",
        workload,
        "--json",
        tmp_path / "gpu.json",
        "--plot",
        tmp_path / "gpu.svg",
    )
    assert result.exit_code == 0, result.stderr
    values = json.loads((tmp_path / "gpu.json").read_text())["gpu"]
    assert {"dense", "bagpipe", "torch_cpu"} <= set(values["arms"])
    for name, arm in values["arms"].items():
        assert arm["step"]["median_ms"] > 0
        assert max(arm["loss_differences"], default=0.0) < 1e-3
        assert len(arm["loss_differences"]) == (0 if name == "dense" else 8)
    assert values["bagpipe"]["num_fetched"] > 0
    assert values["floor"]["update"]["bytes"] > 0
    assert (tmp_path / "gpu.svg").stat().st_size > 1000
    assert "dense and bagpipe always run" in run("gpu", "--quick", "--arm", "tensorflow").stderr
    assert "workload 'W9' is unknown" in run("gpu", "--quick", "--workload", "W9").stderr


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
    result = run("gpu", "--quick", "--arm", "torch_cpu", "--json", tmp_path / "gpu.json")
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


def test_mistakes_are_told(tmp_path: Path) -> None:
    result = run("step", "--quick", "--arm", "tensorflow")
    assert result.exit_code == 2
    assert (
        "arm 'tensorflow' is unknown: there are bagpipe, fused, fbgemm, torch_bags" in result.stderr
    )
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


def test_only_those_that_run_live_are_told_how_many_threads_de_duplicate() -> None:
    options = {"dedup_threads": 3}
    assert gpu_sizes("W1", options, quick=False).dedup_threads == 3
    assert trainers_sizes("W1", options, quick=False).workload.dedup_threads == 3
    assert oracle_sizes(options, quick=True).dedup_threads == 3
    for sizes in (step_sizes, curve_sizes):
        assert sizes(options, quick=True) == sizes({}, quick=True)
