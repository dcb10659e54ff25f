"""How large and how skewed the tables of a data set are.

That decides how small a cache may be. Ids are counted exactly; memory is 16 bytes per unique id,
and three times that while merging.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Final

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from bagpipe.data.base import BatchSource
from bagpipe.data.vocabulary import KeyCounter
from bagpipe.plots import line_style, new_figure, save_figure, show_percent
from bagpipe.types import Float64Array, Int64Array

ALL_TABLES: Final = "all tables"
INSPECTED_BATCH_SIZE: Final = 16_384
_NUM_CURVE_POINTS: Final = 64
_TOP_SHARE: Final = 0.01


@dataclass(frozen=True, kw_only=True)
class TableStats:
    """How one table, or all of them together, are accessed.

    Shares are of its lookups, from 0 to 1.
    """

    table: str
    num_embeddings: int
    num_seen: int  # unique ids
    num_lookups: int
    num_bags: int
    num_seen_once: int  # ids that came once only
    # of the most frequent 1 % of the ids seen, at least one id
    top_seen_share: float
    # of as many of the most frequent ids as 1 % of num_embeddings is, at least one
    top_rows_share: float
    # (points,) most frequent rows as a share of num_embeddings, and (points,) the share of lookups
    # that they take
    curve: tuple[Float64Array, Float64Array] = field(repr=False, compare=False)

    @property
    def mean_bag_length(self) -> float:
        """Mean number of ids per bag."""
        return self.num_lookups / self.num_bags if self.num_bags else 0.0


def inspect_source(
    source: BatchSource, max_batches: int | None = None, batch_size: int = INSPECTED_BATCH_SIZE
) -> list[TableStats]:
    """Statistics of each table, in the order of the features.

    With several tables a last entry named ALL_TABLES pools them.

    Args:
        source: The data to look at.
        max_batches: How many batches to read; None reads all of an epoch.
        batch_size: Samples per batch.
    """
    tables = {feature.table: feature.num_embeddings for feature in source.features}
    counters = {table: KeyCounter() for table in tables}
    num_bags = dict.fromkeys(tables, 0)
    for batch in islice(source.batches(batch_size=batch_size), max_batches):
        sparse, size = batch.sparse, batch.batch_size
        for index, feature in enumerate(source.features):
            first, last = index * size, (index + 1) * size
            if sparse.offsets is not None:
                first, last = int(sparse.offsets[first]), int(sparse.offsets[last])
            counters[feature.table].add(sparse.values[first:last].astype(np.int64))
            num_bags[feature.table] += size
    counts = {table: counter.counts()[1] for table, counter in counters.items()}
    stats = [_stats(table, size, num_bags[table], counts[table]) for table, size in tables.items()]
    if len(tables) > 1:
        pooled = np.concatenate(list(counts.values()))
        stats.append(_stats(ALL_TABLES, sum(tables.values()), sum(num_bags.values()), pooled))
    return stats


def render_table(stats: Sequence[TableStats]) -> Table:
    """The statistics as a rich table, which fits 80 columns."""
    table = Table(title="Embedding tables", box=SIMPLE_HEAD, padding=0)
    table.add_column("table", no_wrap=True)
    headings = "rows", "ids\nseen", "seen\nonce", "lookups", "ids\na bag"
    for heading in (*headings, "top 1 %\nof seen", "top 1 %\nof rows"):
        table.add_column(heading, justify="right", no_wrap=True)
    for entry in stats:
        table.add_row(
            Text(entry.table),  # brackets in a string would be markup
            f"{entry.num_embeddings:,}",
            f"{entry.num_seen:,}",
            f"{entry.num_seen_once:,}",
            f"{entry.num_lookups:,}",
            f"{entry.mean_bag_length:.2f}",
            f"{entry.top_seen_share:.1%}",
            f"{entry.top_rows_share:.1%}",
            style="bold" if entry.table == ALL_TABLES else None,
        )
    return table


def save_plot(stats: Sequence[TableStats], path: Path, *, title: str) -> None:
    """Plots the share of lookups against the share of rows that takes them, one line per table.

    Args:
        stats: What `inspect_source` has returned.
        path: Where the plot goes; its ending names the format.
        title: Says which data these are.

    Raises:
        ConfigError: matplotlib is not installed, or can't write there.
    """
    figure = new_figure(width=9.0)
    axes = figure.add_subplot()
    for index, entry in enumerate(stats):
        pooled = entry.table == ALL_TABLES
        line = (
            {"color": "black", "linewidth": 2.5}
            if pooled
            else line_style(index) | {"marker": "", "linewidth": 1.2}
        )
        axes.plot(*entry.curve, label=entry.table, **line)
    axes.axvline(_TOP_SHARE, color="grey", linestyle=":", linewidth=1)
    axes.set(
        title=title,
        xscale="log",
        xlabel="most frequent rows, share of num_embeddings",
        ylabel="share of lookups",
        ylim=(0, 1.02),
    )
    show_percent(axes.xaxis)
    show_percent(axes.yaxis)
    axes.tick_params(axis="x", labelrotation=30)
    axes.grid(visible=True, alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="x-small", ncols=-(-len(stats) // 30))
    save_figure(figure, path)


def _stats(table: str, num_embeddings: int, num_bags: int, counts: Int64Array) -> TableStats:
    ranked = np.sort(counts)[::-1]
    taken = np.cumsum(ranked)
    num_lookups = int(taken[-1]) if len(taken) else 0
    return TableStats(
        table=table,
        num_embeddings=num_embeddings,
        num_seen=len(ranked),
        num_lookups=num_lookups,
        num_bags=num_bags,
        num_seen_once=int(np.count_nonzero(ranked == 1)),
        top_seen_share=_share(taken, _TOP_SHARE * len(ranked)),
        top_rows_share=_share(taken, _TOP_SHARE * num_embeddings),
        curve=_curve(taken, num_embeddings),
    )


def _share(taken: Int64Array, num_rows: float) -> float:
    """The share of lookups that go to the `num_rows` most frequent ids.

    `taken` (m,) are running sums of the lookups, most frequent id first.
    """
    if len(taken) == 0:
        return 0.0
    return float(taken[min(max(int(num_rows), 1), len(taken)) - 1] / taken[-1])


def _curve(taken: Int64Array, num_embeddings: int) -> tuple[Float64Array, Float64Array]:
    if len(taken) == 0:
        return np.empty(0), np.empty(0)
    rows = np.unique(np.geomspace(1, len(taken), _NUM_CURVE_POINTS).astype(np.int64))
    return rows / num_embeddings, taken[rows - 1] / taken[-1]
