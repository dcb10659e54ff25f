"""What travels between trainers, for the eye: a table."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table

from bagpipe.oracle.dry_run import DryRun, Point
from bagpipe.oracle.dry_run_view import format_bytes, format_count
from bagpipe.oracle.traffic import OVERLAPPED, URGENT, Traffic

_HEADINGS = (
    *("ahead", "cache", "rows\nurgent", "\nurgent", "rows\nbehind", "\nbehind"),
    *("of it\nurgent", "uses\nlocal", "most\nown", "most\nfetch", "most\nsend", "rows/\ncopies"),
)


def render_traffic(result: DryRun) -> Table:
    """Returns a rich table with a line for each point that has room for its batches."""
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
    for heading in (*_HEADINGS, last_heading):
        table.add_column(heading, justify="right", no_wrap=True)
    last = None
    for point in result.points:
        if point.traffic is None:
            continue
        if last is not None and point.lookahead != last:
            table.add_section()
        last = point.lookahead
        table.add_row(*_cells(point, point.traffic))
    return table


def _cells(point: Point, traffic: Traffic) -> tuple[str, ...]:
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
