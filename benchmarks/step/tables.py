"""What `step` prints."""

from __future__ import annotations

from typing import Any

from rich.table import Table

STEP_TARGET, EMBEDDING_TARGET = 1.10, 0.75
"""The most that Bagpipe's whole step may take over that of the fused arm, and its embedding part
over that of FBGEMM."""


def render(values: dict[str, Any]) -> tuple[Table, ...]:
    """A table of times and one of facts for each batch size."""
    tables = []
    for batch_size, result in values["by_batch_size"].items():
        tables += [_times(values, batch_size, result), _facts(values, batch_size, result)]
    return tuple(tables)


def _times(values: dict[str, Any], batch_size: int, result: dict[str, Any]) -> Table:
    table = Table(
        title=f"Batch {batch_size:,}, {values['num_rows']:,} rows, {values['threads']} threads: "
        "ms, median [quartiles]",
        caption="whole step: DLRM forward, backward, both optimizers; the other columns: embedding "
        "part alone",
    )
    headings = ("arm", "whole step", "cpu", "embedding", "cpu", "lookup", "backward + optimizer")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for name, arm in result["arms"].items():
        cpu = (f"{arm['step_cpu_ms']:.1f}", f"{arm['embedding_cpu_ms']:.1f}")
        table.add_row(
            name,
            str(arm["step"]),
            cpu[0],
            str(arm["embedding"]),
            cpu[1],
            str(arm["lookup"]),
            str(arm["update"]),
        )
    return table


def _facts(values: dict[str, Any], batch_size: int, result: dict[str, Any]) -> Table:
    table = Table(title=f"Batch {batch_size:,}: ratios, checks and floor", show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    targets = {"step_over_fused": STEP_TARGET, "embedding_over_fbgemm": EMBEDDING_TARGET}
    for name, ratio in result["ratios"].items():
        wanted = ""
        if name in targets:
            verdict = "reached" if ratio <= targets[name] else "missed"
            wanted = f" (at most {targets[name]:.2f}: {verdict})"
        table.add_row(f"bagpipe {name.replace('_', ' ')}{wanted}", f"{ratio:.3f}")
    for pair, difference in result["loss_differences"].items():
        table.add_row(
            f"largest relative difference of the first losses, {pair}", f"{difference:.1e}"
        )
    counted, floor = result["bagpipe"], result["floor"]
    waits = ", ".join(
        f"{name} {counted[f'{name}_wait_ms']:.2f}" for name in ("plan", "rows", "slots")
    )
    table.add_row("cache full while measuring", "yes" if counted["cache_was_full"] else "no")
    table.add_row("hit rate; rows fetched, written back a step", _traffic(counted))
    table.add_row("waited for, ms a step", waits)
    table.add_row(
        "copy bandwidth, GB/s read and written", f"{values['copy_bytes_per_s'] / 1e9:.1f}"
    )
    for kind, arm in (("in_memory", "fused"), ("cached", "bagpipe")):
        gap = ""
        if arm in result["arms"]:
            taken_ms = result["arms"][arm]["embedding"].median_ms
            gap = f"; {arm} takes {taken_ms / floor[f'{kind}_ms']:.1f}x"
        table.add_row(
            f"floor {kind.replace('_', ' ')}: {floor[f'{kind}_bytes'] / 1e6:.0f} MB{gap}",
            f"{floor[f'{kind}_ms']:.2f} ms",
        )
    return table


def _traffic(counted: dict[str, Any]) -> str:
    moved = f"{counted['num_fetched']:,.0f}, {counted['num_written_back']:,.0f}"
    return f"{counted['hit_rate']:.1%}; {moved}"
