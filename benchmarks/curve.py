"""Rows fetched a step over cache size and lookahead, by the dry run.

Tables have Criteo-Kaggle's cardinalities. Nothing is asserted: the result says in how many places a
larger cache, or a longer lookahead, fetches more rows than a smaller one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from bagpipe.data.synthetic import SyntheticSource
from bagpipe.oracle.dry_run import DryRun, Grid, dry_run
from bagpipe.oracle.dry_run_view import as_dict, render_points, save_plot
from bagpipe.oracle.row_trace import read_trace
from benchmarks.measure import Progress, Result
from benchmarks.streams import SKEW, kaggle_group

QUICK: dict[str, Any] = {
    "batch_size": 64,
    "max_rows": 300,
    "cache_shares": (0.02, 0.5, 0.8, 1.0),
    "lookaheads": (1, 5),
    "num_steps": 40,
}


@dataclass(frozen=True, kw_only=True)
class CurveBench:
    """Sizes of the benchmark."""

    batch_size: int = 2_048
    max_rows: int | None = None
    skew: float = SKEW
    cache_shares: Sequence[float] = (0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.3, 1.0)
    lookaheads: Sequence[int] = (1, 5, 20, 50, 100, 200)
    num_steps: int = 300


def bench_curve(sizes: CurveBench, progress: Progress, plot: Path | None = None) -> Result:
    """Replays one stream at every point of the grid.

    Args:
        sizes: of the benchmark.
        progress: is told how far it is.
        plot: where to save the curves; None: nowhere.

    Returns:
        A table of the points, their values, and a note for each direction of the grid.
    """
    group = kaggle_group(max_rows=sizes.max_rows)
    grid = Grid(
        cache_rows=[int(share * group.num_rows) for share in sizes.cache_shares],
        lookaheads=sizes.lookaheads,
        num_steps=sizes.num_steps,
    )
    source = SyntheticSource(
        [table.num_embeddings for table in group.tables],
        split="train",
        num_samples=grid.num_batches * sizes.batch_size,
        skew=sizes.skew,
    )
    batches = (batch.sparse for batch in source.batches(batch_size=sizes.batch_size))
    trace = read_trace([group], batches, max_batches=grid.num_batches, progress=progress)
    result = dry_run(trace, grid, find_smallest=False, progress=progress)
    rises = count_rises(result)
    if plot is not None:
        of_what = f"synthetic data (Criteo Kaggle, skew {sizes.skew:g})"
        title = f"Rows fetched a step of {sizes.batch_size:,} samples\n{of_what}"
        save_plot(result, plot, title=title)
    return Result(
        name="curve",
        tables=(render_points(result),),
        values={"sizes": asdict(sizes), "rises": rises} | as_dict(result),
        notes=tuple(
            f"rows fetched {'fall monotonically' if count == 0 else f'rise in {count} places'} "
            f"with {what}"
            for what, count in rises.items()
        ),
    )


def count_rises(result: DryRun) -> dict[str, int]:
    """Between how many neighbours of the grid more rows are fetched with more of something.

    Returns:
        The counts for more "cache size" and for more "lookahead".
    """
    fetched = {
        (point.lookahead, point.cache_rows): point.report.num_fetched
        for point in result.points
        if point.report is not None
    }
    return {
        "cache size": _rises(
            [
                [fetched[key] for key in sorted(fetched) if key[0] == each]
                for each in {key[0] for key in fetched}
            ]
        ),
        "lookahead": _rises(
            [
                [fetched[key] for key in sorted(fetched) if key[1] == each]
                for each in {key[1] for key in fetched}
            ]
        ),
    }


def _rises(curves: Sequence[Sequence[int]]) -> int:
    return sum(overlapped > earlier for curve in curves for earlier, overlapped in pairwise(curve))
