"""Benchmarks run at tiny sizes, print and save what they promise; the arms compute the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner, Result

from benchmarks.cli import app
from benchmarks.gpu.arms import TorchCpuArm
from benchmarks.links import why_not
from benchmarks.measure import Timing, disagreements, silent
from benchmarks.prepared_stream import make_stream
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


@pytest.mark.parametrize("benchmark", ["curve", "gpu"])
@pytest.mark.parametrize("option", ["--plot", "--json"])
def test_a_file_that_can_not_be_written_is_refused_before_anything_runs(
    benchmark: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def describe_environment() -> None:
        raise AssertionError("it has begun")

    monkeypatch.setattr("benchmarks.measure.describe_environment", describe_environment)
    path = tmp_path / "none" / "out.svg"
    result = run(benchmark, "--quick", option, path)
    assert result.exit_code != 0
    told = "".join(result.stderr.split())
    assert f"{path}:can'tbewritten:Nosuchfileordirectory" in told


@pytest.mark.parametrize("index", ["--no-row-map", "--row-map"])
def test_the_oracle_on_the_device_at_a_tiny_size(index: str, tmp_path: Path) -> None:
    saved = run_to_json(tmp_path / "planner.json", "planner", "--workload", "W3", index)
    values = saved["planner"]
    assert min(values[name] for name in ("enter_ms", "plan_ms", "way_ms", "beside_ms")) > 0
    assert (values["forgetting_ms"] > values["enter_ms"]) == (index == "--row-map")
    assert values["num_capacities"] >= 2


# first of all tests on a new machine, these compile nearly every loop: two minutes on two cores
def test_the_oracle_at_a_tiny_size(tmp_path: Path) -> None:
    saved = run_to_json(tmp_path / "oracle.json", "oracle")
    assert saved["environment"]["packages"]["torch"]
    assert saved["environment"]["cores"] >= 1
    assert saved["quick"]
    values = saved["oracle"]
    assert values["dedup"]["count"] == values["slots"]["4"]["both"]["count"] == 3
    assert 4 <= values["bytes"]["row"] <= 16
    assert 8 <= values["bytes"]["slot"] <= 64
    assert [(live["num_trainers"], live["lookahead"]) for live in values["live"]] == [
        (1, 1),
        (1, 4),
    ]
    assert all(live["batches_per_s"] > 0 for live in values["live"])


def test_saving_at_a_tiny_size(tmp_path: Path) -> None:
    values = run_to_json(tmp_path / "saving.json", "saving")["saving"]
    assert 1_000_000 <= values["num_bytes"] <= 1_100_000
    assert len(values["seconds_and_cpu"]) == 2
    assert set(values["median_shares"]) == {"save", "restore"}


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


def test_cuts_at_a_tiny_size(tmp_path: Path) -> None:
    values = run_to_json(tmp_path / "cuts.json", "cuts")["cuts"]
    assert [file["num_records"] for file in values["files"]] == [3_000, 100, 200]
    assert all(file["write_over_plain"] > 0 for file in values["files"])
    assert set(values["put_back"]) == {
        f"{what}, {where}" for what in ("rows since", "all rows") for where in ("cached", "cold")
    }
    assert values["write"]["in a cut, kept"]["count"] == 8


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
        ("gpu", "bagpipe, dense, served, fbgemm_hbm"),
        ("trainers", "bagpipe, no_overlap, replicated, hashed, by_nccl, torchrec"),
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


@pytest.mark.parametrize(
    ("workload", "arms"),
    [("W1", ("torch_cpu", "served")), ("W3", ("torch_cpu",)), ("W4-file", ("torch_cpu",))],
)
def test_the_gpu_benchmark_at_tiny_sizes(
    workload: str, arms: tuple[str, ...], tmp_path: Path
) -> None:
    plot = tmp_path / "gpu.svg"
    chosen = [word for arm in arms for word in ("--arm", arm)]
    values = run_to_json(
        *(tmp_path / "gpu.json", "gpu", "--workload", workload, *chosen),
        *("--plot", plot, "--threads", 1),
    )["gpu"]
    assert {"dense", "bagpipe", *arms} == set(values["arms"])
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


def test_the_network_at_a_tiny_size(tmp_path: Path) -> None:
    arms = ("--arm", "tls", "--arm", "direct")
    values = run_to_json(tmp_path / "network.json", "network", *arms)["network"]
    found = {(each["arm"], each["in_flight"]) for each in values["loopback"]}
    assert found == {(arm, steps) for arm in ("bare", "tls", "direct") for steps in (1, 2)}
    assert all(each["client_cpu_s_per_gb"] > 0 for each in values["loopback"])
    assert all(each["server_cpu_s_per_gb"] > 0 for each in values["loopback"])
    if why_not() is None:
        links = {(each["arm"], each["delay_ms"]) for each in values["links"]}
        assert links == {("bare", 2)}
        assert all(0 < each["share"] < 1.1 for each in values["links"])
    else:
        assert values["links"] == []


def test_predictions_at_a_tiny_size(tmp_path: Path) -> None:
    values = run_to_json(tmp_path / "predict.json", "predict")["predict"]
    assert all(rate > 0 for rates in values["examples_per_s"].values() for rate in rates)
    assert [len(values["shares"][arm]) for arm in ("prepared", "raw")] == [1, 1]


def test_quality_at_a_tiny_size(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    columns = {
        name: random.integers(0, 20, 2000) for name in ("user_id", "item_id", "occupation", "age")
    }
    visits = {name: columns[name][:600] for name in ("user_id", "item_id")}
    columns |= {"gender": columns["age"] % 2, "label": columns["user_id"] < 10}
    pq.write_table(pa.table(columns), tmp_path / "ml100k_ctr.parquet")
    pq.write_table(pa.table(visits), tmp_path / "gowalla_interactions.parquet")
    chosen = ("--sample", "movielens", "--sample", "gowalla", "--model", "deepfm", "--model", "dcn")
    arguments = ("quality", "--data", tmp_path, *chosen)
    scores = run_to_json(tmp_path / "quality.json", *arguments)["quality"]["scores"]
    assert {name: list(models) for name, models in scores.items()} == {
        "movielens": ["dcn", "deepfm"],
        "gowalla": ["deepfm"],  # DCN needs dense features, which it has not
    }
    assert all(score["auc"] > 0.7 for score in scores["movielens"]["dcn"]["bagpipe"])
    assert all(len(arm) == 2 for models in scores.values() for arm in models["deepfm"].values())
    told = run("quality", "--data", tmp_path / "none", "--sample", "avazu").stderr
    assert f"{tmp_path}/none/avazu_head.parquet: there is no such file" in "".join(told.split("\n"))
    assert "--model dnn: is unknown; there are dlrm, dcn" in run("quality", "--model", "dnn").stderr


def test_the_start_of_a_run_at_a_tiny_size(tmp_path: Path) -> None:
    found = run_to_json(tmp_path / "start.json", "start")["start"]["seconds_and_cpu"]
    (((elapsed_s, cpu_s),),) = found.values()
    assert elapsed_s > 0
    assert cpu_s > 0
