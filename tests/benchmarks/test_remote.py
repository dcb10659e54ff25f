"""The benchmark `remote`: its arms train the same rows, and it runs at a tiny size."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from bagpipe.data.base import Batch
from bagpipe.embeddings.collection import EmbeddingBagCollection
from bagpipe.feed.stream import StreamOptions, plan_stream
from bagpipe.types import Float32Array
from benchmarks.cli import app
from benchmarks.links import why_not
from benchmarks.measure import silent
from benchmarks.remote.policy import no_cache_known
from benchmarks.remote.settings import ARMS, NO_CACHE, QUICK, RemoteBench
from benchmarks.remote.trainer import run_turns
from benchmarks.streams import make_batches

# on a new machine these compile most loops, two processes at a time
pytestmark = pytest.mark.timeout(400)

BENCH = RemoteBench(**QUICK | {"devices_ms": (0.01,)})
TRAINING = [arm for arm in ARMS if arm not in ("device", "resident")]
GROUP = BENCH.group


@cache
def batches() -> list[Batch]:
    return make_batches(
        GROUP,
        num_batches=BENCH.num_batches,
        batch_size=BENCH.batch_size,
        skew=BENCH.skew,
        progress=silent,
    )


def trained_by(*arms: str) -> Float32Array:
    """All records after the turns of these arms, which have as many steps each."""
    embeddings = EmbeddingBagCollection(GROUP.tables, optimizer=GROUP.optimizer)
    turns = list(run_turns(replace(BENCH, arms=arms), embeddings, batches(), lambda: 0.0))
    assert [turn.arm for turn in turns] == [*arms]
    assert all(turn.fetched > 0 and turn.flushed > 0 for turn in turns)
    records = np.empty((GROUP.num_rows, GROUP.record_width), np.float32)
    embeddings.stores[0].fetch(np.arange(GROUP.num_rows), records)
    embeddings.close()
    return records


def test_it_does_not_matter_which_arms_have_the_turns() -> None:
    by_bagpipe = trained_by(*["bagpipe"] * len(TRAINING))
    np.testing.assert_array_equal(trained_by(*TRAINING), by_bagpipe)
    for arm in ("synchronous", "prefetch"):
        np.testing.assert_array_equal(trained_by(*[arm] * len(TRAINING)), by_bagpipe)


def test_without_a_cache_each_step_moves_all_of_its_rows() -> None:
    with no_cache_known():
        options = StreamOptions(
            groups=(GROUP,),
            num_slots=(GROUP.num_rows,),
            lookahead=1,
            prefetch_depth=0,
            policy=NO_CACHE,
            check=True,
        )
        plans = [planned.plan.groups[0] for (planned,) in plan_stream(batches(), options)]
    before = np.empty(0, np.int64)
    for plan in plans:
        np.testing.assert_array_equal(plan.urgent.evict_rows, before)
        assert len(plan.urgent.fetch_rows) == plan.schedule.num_uniques
        assert len(plan.overlapped.fetch_rows) == len(plan.overlapped.evict_rows) == 0
        before = plan.urgent.fetch_rows


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_training_over_a_link_at_a_tiny_size(tmp_path: Path) -> None:
    arms = ("--arm", "synchronous")
    path, plot = tmp_path / "remote.json", tmp_path / "remote.svg"
    files = ("--json", str(path), "--plot", str(plot))
    result = CliRunner().invoke(app, ["remote", "--quick", *arms, *files], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    found = json.loads(path.read_text())["remote"]["links"]
    assert [each["arm"] for each in found] == ["bagpipe", "device", "synchronous"]
    assert all(each["step"]["median_ms"] >= 1.0 for each in found)
    assert found[2]["bytes_in"] >= found[0]["bytes_in"] > 0
    assert found[0]["flush"]["share"][0] > 0
    assert plot.stat().st_size > 1000


def test_where_no_link_can_be_made_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.remote.bench.why_not", lambda: "there is no wire")
    result = CliRunner().invoke(app, ["remote", "--quick"])
    assert result.exit_code == 2
    assert "links can't be made: there is no wire" in result.stderr
    result = CliRunner().invoke(app, ["remote", "--quick", "--device-ms", "0"])
    assert "--device-ms [0.0]: give times above 0" in result.stderr
