"""A dry run for the eye and for other programs: tables, a plot, JSON values."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from bagpipe.oracle.dry_run import DryRun, Point
from bagpipe.oracle.traffic import OVERLAPPED, URGENT, Traffic
from bagpipe.plots import line_style, new_figure, save_figure, show_percent

_TRAFFIC_HEADINGS = (
    *("ahead", "cache", "rows\nurgent", "\nurgent", "rows\nbehind", "\nbehind"),
    *("of it\nurgent", "uses\nlocal", "most\nown", "most\nfetch", "most\nsend", "rows/\ncopies"),
)


def render_points(result: DryRun) -> Table:
    """Returns a rich table with a line for each point."""
    note = _if_several(result, "; cache, memory, peak: of each of {} trainers, others: of all")
    table = Table(
        title=f"Oracle replayed: {result.num_counted_steps:,} steps of "
        f"{result.uniques_per_step:,.0f} unique rows on average",
        caption="in, out: fetched and written back a step; urgent: rows fetched a step on the "
        f"critical path; waits: steps with any{note}",
        box=SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    headings = "ahead,cache,of all,memory,hits,rows in,in,rows out,out,urgent,waits,peak"
    for heading in headings.split(","):
        table.add_column(heading, justify="right", no_wrap=True)
    last = None
    for point in result.points:
        if last is not None and point.lookahead != last:
            table.add_section()
        last = point.lookahead
        table.add_row(
            str(point.lookahead), *_size_cells(result, point.cache_rows), *_point_cells(point)
        )
    return table


def render_smallest(result: DryRun) -> Table:
    """Returns a rich table of the smallest cache that never stalls with each lookahead."""
    whose = _if_several(result, ", of each trainer")
    table = Table(title=f"Smallest cache that never stalls{whose}")
    for heading in ("lookahead", "cache rows", "of all", "memory"):
        table.add_column(heading, justify="right")
    for lookahead, rows in result.smallest.items():
        table.add_row(str(lookahead), *_size_cells(result, rows))
    return table


def render_traffic(result: DryRun) -> Table:
    """Returns a rich table of what trainers send, with a line for each point that fits."""
    # There is room for one of the two last columns only.
    on_hosts, last_heading = "", "bytes/\nhashed"
    last_column = "hashed: fixed owners, no lookahead"
    if result.num_hosts > 1:
        on_hosts, last_heading = f" on {result.num_hosts} hosts", "off\nhost"
        last_column = "off host: share of the bytes that leaves one"
    table = Table(
        title=f"Sent between {result.num_trainers} trainers{on_hosts} a step",
        caption="rows: replicas and gradients; urgent: on the critical path, behind: hidden by "
        "compute; uses local: share of the ranks' unique rows that they own; most: of one rank "
        "over the mean; copies: all-reduce of copies on every trainer; " + last_column,
        box=SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    for heading in (*_TRAFFIC_HEADINGS, last_heading):
        table.add_column(heading, justify="right", no_wrap=True)
    last = None
    for point in result.points:
        if point.traffic is None:
            continue
        if last is not None and point.lookahead != last:
            table.add_section()
        last = point.lookahead
        table.add_row(*_traffic_cells(point, point.traffic))
    return table


def describe_largest(result: DryRun) -> str:
    """Says what each group's largest batch is, and which is the smallest cache that trains."""
    largest = ", ".join(
        f"{batch.num_uniques:,} unique rows of {batch.group} in step {batch.step:,}"
        for batch in result.largest
    )
    whose = _if_several(result, " for each of the {} trainers")
    return (
        f"Largest of the first {result.num_batches:,} batches: {largest}. They train with a cache "
        f"of at least {result.smallest_cache:,} rows{whose}."
    )


def as_dict(result: DryRun) -> dict[str, Any]:
    """Returns all of a dry run as JSON values.

    With several trainers these say how many there are, on how many hosts, and what they send each
    other.
    """
    several = {"num_trainers": result.num_trainers, "num_hosts": result.num_hosts}
    return ({} if result.num_trainers == 1 else several) | {
        "num_counted_steps": result.num_counted_steps,
        "num_warmup_steps": result.grid.num_warmup_steps,
        "prefetch_depth": result.grid.prefetch_depth,
        "num_rows": sum(group.num_rows for group in result.groups),
        "uniques_per_step": result.uniques_per_step,
        "num_batches": result.num_batches,
        "largest_batches": [asdict(batch) for batch in result.largest],
        "smallest_cache_that_trains": {
            "cache_rows": result.smallest_cache,
            "cache_bytes": result.cache_bytes(result.smallest_cache),
        },
        "points": [_point_dict(result, point) for point in result.points],
        "smallest_cache_that_never_stalls": [
            {"lookahead": lookahead, "cache_rows": rows, "cache_bytes": result.cache_bytes(rows)}
            for lookahead, rows in result.smallest.items()
        ],
    }


def save_plot(result: DryRun, path: Path, *, title: str) -> None:
    """Plots the rows fetched a step over the cache size, one curve for each lookahead.

    Lookaheads that fetch the same have one curve together, since one would hide the other.

    Args:
        result: The dry run.
        path: Where to save the plot; its ending names the format.
        title: Says which data and batches these are.

    Raises:
        ConfigError: matplotlib is not installed, or can't write there.
    """
    figure = new_figure()
    axes = figure.add_subplot()
    curves = _curves(result)
    for index, (curve, lookaheads) in enumerate(curves.items()):
        # those drawn later are thinner, so that one that is almost the same shows behind them
        behind = len(curves) - index - 1
        axes.plot(
            *zip(*curve, strict=True),
            **line_style(index),
            linewidth=1.5 + 1.2 * behind,
            markersize=4 + 2 * behind,
            label=f"lookahead {', '.join(map(str, lookaheads))}",
        )
    whose = _if_several(result, " of each of {} trainers")
    axes.set(
        title=title, xscale="log", xlabel=f"cache{whose}, share of the rows", ylabel="rows fetched"
    )
    show_percent(axes.xaxis)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylim(bottom=0)
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    save_figure(figure, path)


def _curves(result: DryRun) -> dict[tuple[tuple[float, float], ...], list[int]]:
    """The lookaheads of each curve of points (cache as a share of the rows, rows fetched)."""
    num_rows = sum(group.num_rows for group in result.groups)
    curves: dict[tuple[tuple[float, float], ...], list[int]] = {}
    for lookahead in sorted({point.lookahead for point in result.points}):
        curve = tuple(
            (point.cache_rows / num_rows, point.report.fetched_rows_per_step)
            for point in result.points
            if point.lookahead == lookahead and point.report is not None
        )
        if curve:
            curves.setdefault(curve, []).append(lookahead)
    return curves


def format_count(count: float) -> str:
    """Writes a count in three digits, for example "1.5M"."""
    for unit in ("", "k"):
        if count < 999.5:  # from there on three digits would be written as 1e+03
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:,.3g}M"


def format_bytes(size: float) -> str:
    """Writes bytes in three digits and powers of 1024, for example "1.5G"."""
    for unit in ("", "K", "M"):
        if size < 1024:
            return f"{size:.3g}{unit}" if size < 1000 else f"{size:.0f}{unit}"
        size /= 1024
    return f"{size:,.3g}G"


def _if_several(result: DryRun, note: str) -> str:
    """A note on how many trainers there are, which "{}" stands for; empty where there is one."""
    return note.format(result.num_trainers) if result.num_trainers > 1 else ""


def _size_cells(result: DryRun, cache_rows: int) -> tuple[str, str, str]:
    num_rows = sum(group.num_rows for group in result.groups)
    return (
        format_count(cache_rows),
        f"{cache_rows / num_rows:.{2 if 10 * cache_rows < num_rows else 1}%}",
        format_bytes(result.cache_bytes(cache_rows)),
    )


def _point_cells(point: Point) -> tuple[str, ...]:
    report = point.report
    if report is None:
        return "small", f"<{format_count(point.num_needed)}", *("-" for _ in range(6))
    steps = report.num_steps
    return (
        f"{report.hit_rate:.1%}",
        format_count(report.fetched_rows_per_step),
        format_bytes(report.fetched_bytes / steps),
        format_count(report.written_back_rows_per_step),
        format_bytes(report.written_back_bytes / steps),
        format_count(report.num_fetched_urgent / steps),
        f"{report.num_waiting_steps / steps:.0%}",
        format_count(report.peak_slots),
    )


def _traffic_cells(point: Point, traffic: Traffic) -> tuple[str, ...]:
    rows = traffic.rows.sum(axis=0) / traffic.num_steps  # (2 when,)
    sent_bytes = traffic.sent_bytes.sum(axis=0) / traffic.num_steps  # (2 when,)
    last_cell = f"{traffic.bytes_over_hashed:.3f}"
    if traffic.num_hosts > 1:
        last_cell = f"{traffic.between_hosts_share:.1%}"
    balances = (traffic.owned, traffic.fetched, traffic.sent)
    return (
        str(point.lookahead),
        format_count(point.cache_rows),
        format_count(rows[URGENT]),
        format_bytes(sent_bytes[URGENT]),
        format_count(rows[OVERLAPPED]),
        format_bytes(sent_bytes[OVERLAPPED]),
        f"{traffic.critical_share:.1%}",
        f"{traffic.local_share:.1%}",
        *(f"{balance.ratio(traffic.num_trainers):.2f}" for balance in balances),
        f"{traffic.rows_over_copies:.3f}",
        last_cell,
    )


def _point_dict(result: DryRun, point: Point) -> dict[str, Any]:
    size = {
        "cache_rows": point.cache_rows,
        "cache_bytes": result.cache_bytes(point.cache_rows),
        "lookahead": point.lookahead,
    }
    report = point.report
    if report is None:
        return size | {"too_small_for_batch_of": point.num_needed}
    return size | {
        "hit_rate": report.hit_rate,
        "rows_fetched_per_step": report.fetched_rows_per_step,
        "bytes_fetched_per_step": report.fetched_bytes / report.num_steps,
        "rows_written_back_per_step": report.written_back_rows_per_step,
        "bytes_written_back_per_step": report.written_back_bytes / report.num_steps,
        "rows_fetched_urgent_per_step": report.num_fetched_urgent / report.num_steps,
        "waiting_steps_share": report.num_waiting_steps / report.num_steps,
        "peak_slots": report.peak_slots,
        **({} if point.traffic is None else {"traffic": point.traffic.as_dict()}),
    }
