"""Statistics of tables against a plain count, and how they are shown."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from bagpipe.data.inspect import ALL_TABLES, inspect_source, render_table, save_plot
from bagpipe.data.synthetic import SyntheticSource
from bagpipe.errors import ConfigError


def test_statistics_equal_a_plain_count() -> None:
    source = SyntheticSource([500, 7], split="train", num_samples=3000, bag_lengths={"C1": (0, 3)})
    stats = inspect_source(source, max_batches=2, batch_size=1000)
    batches = list(source.batches(batch_size=1000))[:2]
    ids = [
        np.concatenate(
            [
                b.sparse.values[b.sparse.offsets[f * 1000] : b.sparse.offsets[(f + 1) * 1000]]
                for b in batches
            ]
        )
        for f in (0, 1)
    ]  # type: ignore[index]
    counts = [np.sort(np.unique(part, return_counts=True)[1])[::-1] for part in ids]
    assert [entry.table for entry in stats] == ["C1", "C2", ALL_TABLES]
    for entry, seen, size in zip(
        stats, [*counts, np.sort(np.concatenate(counts))[::-1]], [500, 7, 507], strict=True
    ):
        assert (entry.num_embeddings, entry.num_seen, entry.num_lookups) == (
            size,
            len(seen),
            seen.sum(),
        )
        assert entry.num_seen_once == (seen == 1).sum()
        assert entry.top_seen_share == pytest.approx(
            seen[: max(len(seen) // 100, 1)].sum() / seen.sum()
        )
        assert entry.top_rows_share == pytest.approx(seen[: max(size // 100, 1)].sum() / seen.sum())
        assert entry.curve[1][-1] == 1.0
    assert stats[0].mean_bag_length == pytest.approx(len(ids[0]) / 2000)
    assert stats[2].num_bags == 4000


def test_table_and_plot(tmp_path: Path) -> None:
    source = SyntheticSource([50, 7], split="train", num_samples=100, bag_lengths={"C2": (0, 0)})
    stats = inspect_source(source)
    assert (stats[1].num_seen, stats[1].top_seen_share) == (0, 0.0)
    console = Console(width=200, record=True, file=(tmp_path / "out").open("w"))
    console.print(render_table(stats))
    console.file.close()
    text = console.export_text()
    for fact in ("C1", "all tables", "100", "top 1 %"):
        assert fact in text
    save_plot(stats, tmp_path / "plot.png", title="small")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_a_plot_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'bagpipe-recsys\[plot\]'"):
        save_plot([], tmp_path / "plot.png", title="none")


def test_a_plot_says_what_it_shows_and_tells_26_tables_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr("bagpipe.data.inspect.save_figure", lambda figure, _: drawn.append(figure))
    source = SyntheticSource([300] * 26, split="train", num_samples=200)
    save_plot(inspect_source(source), Path("never.png"), title="these data")
    (figure,) = drawn
    (axes,) = figure.axes
    assert axes.get_title() == "these data"
    lines = [line for line in axes.lines if not line.get_label().startswith("_")]
    assert len(lines) == 27
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 27
    assert len(figure.legends[0].get_texts()) == 27
    figure.draw_without_rendering()
    across = {label.get_text() for label in axes.get_xticklabels()}
    assert {"0.5 %", "1 %", "10 %", "50 %"} <= across
    assert {"0 %", "100 %"} <= {label.get_text() for label in axes.get_yticklabels()}
