"""The dry run: it counts what training's plans say, and the border that it finds is one.

Also what it prints and saves.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console
from tests.soon import SOON_S

from bagpipe.errors import CacheTooSmallError, ConfigError, DataError
from bagpipe.optimizers import SGD, Adagrad
from bagpipe.oracle import DedupedBatch, Oracle, OracleReport, dedup
from bagpipe.oracle.dry_run import DryRun, Grid, dry_run, replay
from bagpipe.oracle.dry_run_view import (
    as_dict,
    describe_largest,
    render_points,
    render_smallest,
    save_plot,
)
from bagpipe.oracle.merge import merge
from bagpipe.oracle.row_trace import Trace, read_trace
from bagpipe.oracle.sizes import parse_rows, slots_of
from bagpipe.types import Group, Jagged, TableConfig, group_tables

NUM_BATCHES = 60


def two_groups() -> tuple[Group, ...]:
    return group_tables(
        [
            TableConfig(name="a", num_embeddings=600, embedding_dim=4, feature_names=["a"]),
            TableConfig(name="b", num_embeddings=400, embedding_dim=2, feature_names=["b"]),
        ],
        Adagrad(lr=0.1),
    )


def batches(num_batches: int = NUM_BATCHES) -> Iterator[Jagged]:
    generator = np.random.default_rng(0)
    for _ in range(num_batches):
        skewed = generator.random(2 * 32) ** 3
        ids = np.concatenate([600 * skewed[:32], 400 * skewed[32:]]).astype(np.int64)
        yield Jagged(keys=("a", "b"), values=ids, batch_size=32)


@pytest.fixture(scope="module")
def trace() -> Trace:
    return read_trace(two_groups(), batches(), max_batches=NUM_BATCHES)


@pytest.fixture(scope="module")
def result(trace: Trace) -> DryRun:
    grid = Grid(cache_rows=[20, 80, 120, 300, 1000], lookaheads=[1, 5, 20], num_steps=40)
    return dry_run(trace, grid)


def test_counts_what_the_plans_of_training_say(trace: Trace) -> None:
    groups = two_groups()
    grid = Grid(cache_rows=[120], lookaheads=[5], num_steps=40, warmup_steps=10)
    slots = slots_of(120, groups)
    full = (
        DedupedBatch(
            payload=None,
            share_sizes=(32,),
            groups=tuple(merge(group, [dedup(group, batch)]) for group in groups),
        )
        for batch in batches()
    )
    expected = OracleReport.for_groups(groups)
    oracle = Oracle(groups, num_slots=slots, lookahead=5)
    for (plan,), _ in oracle.plan(oracle.link(full)):
        if 10 <= plan.step < 40:
            expected.add(plan, oracle.peak_slots)
    report = replay(trace, grid, 120, 5).report
    assert report is not None
    assert report.as_dict() | {"num_lookups": 0} == expected.as_dict() | {"num_lookups": 0}


def test_bigger_caches_and_longer_lookaheads_fetch_no_more(result: DryRun) -> None:
    fetched = {
        (p.cache_rows, p.lookahead): p.report.num_fetched
        for p in result.points
        if p.report is not None
    }
    for lookahead in (1, 5, 20):
        by_cache = [fetched[rows, lookahead] for rows in (80, 120, 300, 1000)]
        assert by_cache == sorted(by_cache, reverse=True)
    for rows in (80, 120, 300, 1000):
        by_lookahead = [fetched[rows, lookahead] for lookahead in (1, 5, 20)]
        assert by_lookahead == sorted(by_lookahead, reverse=True)


def test_the_smallest_cache_lies_on_the_border(trace: Trace, result: DryRun) -> None:
    for lookahead, rows in result.smallest.items():
        assert rows is not None
        assert replay(trace, result.grid, rows, lookahead).never_stalls
        assert not replay(trace, result.grid, rows - max(1, rows // 50), lookahead).never_stalls


def test_the_smallest_cache_is_found_where_all_of_the_grid_stall(
    trace: Trace, result: DryRun
) -> None:
    stalling = dry_run(trace, Grid(cache_rows=[trace.smallest_cache], lookaheads=[1], num_steps=40))
    assert stalling.smallest[1] == pytest.approx(result.smallest[1], rel=0.03)


def test_too_small_caches_are_told(trace: Trace, result: DryRun) -> None:
    small = [point for point in result.points if point.cache_rows == 20]
    assert [point.report for point in small] == [None] * 3
    assert small[0].num_needed > slots_of(20, trace.groups)[0]
    assert "small" in printed(result)
    whole = Grid(cache_rows=[1], lookaheads=[1], num_steps=NUM_BATCHES)
    assert replay(trace, whole, trace.smallest_cache, 1).report is not None
    assert replay(trace, whole, trace.smallest_cache - 1, 1).report is None


def test_the_largest_batch_and_the_smallest_cache_are_named(trace: Trace, result: DryRun) -> None:
    for index, largest in enumerate(result.largest):
        sizes = [len(batch.groups[index].unique_rows) for batch in trace.batches]
        assert largest.num_uniques == max(sizes) == largest.num_needed
        assert sizes.index(max(sizes)) == largest.step
    first, second = result.largest
    assert describe_largest(result) == (
        f"Largest of the first 60 batches: {first.num_uniques} unique rows of "
        f"{trace.groups[0].name} in step {first.step}, {second.num_uniques} unique rows of "
        f"{trace.groups[1].name} in step {second.step}. They train with a cache of at least "
        f"{trace.smallest_cache} rows."
    )
    values = as_dict(result)
    assert values["largest_batches"][1]["step"] == second.step
    assert values["smallest_cache_that_trains"]["cache_rows"] == trace.smallest_cache


def test_an_error_names_a_cache_that_holds_all_batches_of_all_groups(trace: Trace) -> None:
    groups = two_groups()

    def plan(num_slots: list[int]) -> list[object]:
        oracle = Oracle(groups, num_slots=num_slots, lookahead=5)
        return list(oracle.plan(oracle.link(trace.batches)))

    with pytest.raises(CacheTooSmallError) as caught:
        plan(slots_of(20, groups))
    assert (caught.value.step, caught.value.last_step) == (0, NUM_BATCHES - 1)
    assert caught.value.cache_rows == trace.smallest_cache
    assert f"at least {trace.smallest_cache} rows, which all batches seen" in str(caught.value)
    assert len(plan(slots_of(caught.value.cache_rows, groups))) == 60
    # a group that had more by a list of sizes has as much
    with pytest.raises(CacheTooSmallError) as caught:
        plan([10, 300])
    assert slots_of(caught.value.cache_rows, groups)[1] >= 300


def test_json_and_plot(result: DryRun, tmp_path: Path) -> None:
    values = json.loads(json.dumps(as_dict(result)))
    assert len(values["points"]) == 15
    assert values["num_counted_steps"] == 30
    assert values["points"][-1]["cache_bytes"] == 600 * 8 * 4 + 400 * 4 * 4
    save_plot(result, tmp_path / "curve.svg", title="small")
    assert (tmp_path / "curve.svg").stat().st_size > 1000
    with pytest.raises(ConfigError, match="nowhere"):
        save_plot(result, tmp_path / "nowhere" / "curve.svg", title="")


def test_a_plot_says_what_it_shows_and_joins_equal_curves(
    result: DryRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(
        "bagpipe.oracle.dry_run_view.save_figure", lambda figure, _: drawn.append(figure)
    )
    longest = max(point.lookahead for point in result.points)
    again = [
        replace(point, lookahead=1_000) for point in result.points if point.lookahead == longest
    ]
    save_plot(replace(result, points=(*result.points, *again)), Path("never.svg"), title="what")
    (axes,) = drawn[0].axes
    assert axes.get_title() == "what"
    labels = [str(line.get_label()) for line in axes.lines]
    assert labels[-1].endswith(f"{longest}, 1000")
    assert len({line.get_marker() for line in axes.lines}) == len(labels)
    drawn[0].draw_without_rendering()
    shown = [label.get_text() for label in axes.get_xticklabels()]
    assert all(text.endswith(" %") for text in shown)
    assert "10 %" in shown


def test_without_matplotlib_one_sentence_says_what_to_do(
    result: DryRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'bagpipe-recsys\[plot\]'"):
        save_plot(result, Path("never.svg"), title="")


def test_impossible_dry_runs_are_refused(trace: Trace) -> None:
    with pytest.raises(DataError, match="at least one batch"):
        read_trace(two_groups(), iter(()), max_batches=5)
    with pytest.raises(ConfigError, match="at least one cache size"):
        Grid(cache_rows=[], lookaheads=[1], num_steps=10)
    with pytest.raises(ConfigError, match="counts no step"):
        Grid(cache_rows=[100], lookaheads=[1], num_steps=10, warmup_steps=10)
    with pytest.raises(ConfigError, match="60 batches, of which the first 100 only warm up"):
        dry_run(trace, Grid(cache_rows=[100], lookaheads=[1], num_steps=400))
    with pytest.raises(ConfigError, match="lookahead is 5000"):
        dry_run(trace, Grid(cache_rows=[100], lookaheads=[5000], num_steps=40))


@pytest.mark.parametrize(
    ("size", "rows"),
    [
        ("100", 100),
        ("1_0", 10),
        ("2%", 20),
        ("12.5%", 125),
        ("100%", 1000),
        ("4000", 1000),
        ("1KiB", 40),
    ],
)
def test_sizes(size: str, rows: int) -> None:
    assert parse_rows(size, two_groups(), "--cache") == rows  # 1000 rows, of 32 and 16 bytes


@pytest.mark.parametrize("size", ["", "two", "2 percent", "-4", "1.5.2", "4XB"])
def test_sizes_that_are_none(size: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"--cache is {size!r}, must be rows")):
        parse_rows(size, two_groups(), "--cache")


def test_a_size_without_a_slot_is_refused() -> None:
    groups = group_tables(
        [TableConfig(name="a", num_embeddings=600, embedding_dim=4, feature_names=["a"])],
        SGD(lr=0.1),
    )
    with pytest.raises(ConfigError, match=r"--cache is '0\.01%', less than a row"):
        parse_rows("0.01%", groups, "--cache")


def test_loads_no_torch() -> None:
    code = (
        "import sys, bagpipe.cli.plan, bagpipe.oracle.dry_run_view; "
        "assert 'torch' not in sys.modules"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=SOON_S, check=False
    )
    assert ended.returncode == 0, ended.stderr


def test_80_columns_have_room_for_large_numbers(result: DryRun) -> None:
    steps, rows = 100, 123_456
    report = OracleReport(
        num_steps=steps,
        num_uniques=2 * rows * steps,
        num_fetched=rows * steps,
        num_fetched_urgent=rows * steps - 40,  # 123,455.6 a step
        num_written_back=99_970,  # 999.7 a step
        num_waiting_steps=steps,
        fetched_bytes=516 * rows * steps,
        written_back_bytes=516 * 99_970,
        peak_slots=1_234_567,
    )
    points = [replace(point, report=report, lookahead=200) for point in result.points]
    shown = printed(replace(result, points=tuple(points)))
    assert "…" not in shown
    assert "123k 60.8M" in shown
    assert re.search(r" 1k +504K ", shown)


def printed(result: DryRun) -> str:
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(render_points(result), render_smallest(result))
    return console.export_text()
