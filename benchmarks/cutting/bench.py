"""`cutting`: what the cuts of a run over a shard server cost it.

A run trains as Bagpipe's arm of `remote` does, and takes a cut every so many steps by the way of
`bagpipe train`: flush, dense state, servers told, then files beside training, links, manifest and
the rename. Its parts are timed: the flush; the rest that training waits for; and by how much the
steps until its end take longer than those without a cut.

The run has a server on its own host, reached by shared memory, then one behind each link. What
memory gives is the same flush to a store of the trainer's own process, just before.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks.cutting.settings import Cut, CuttingBench
from benchmarks.links import Link, linked_hosts, why_not
from benchmarks.measure import Progress, Result
from benchmarks.remote.bench import run_over
from benchmarks.remote.settings import End

_MINUTE_S = 60.0


def bench_cutting(bench: CuttingBench, progress: Progress, folder: str | None = None) -> Result:
    """Runs the run at each place.

    Args:
        bench: what is measured.
        progress: is told how far it is.
        folder: where the runs' folders are made; None: where temporary files are.
    """
    reason = why_not() if bench.remote.gbits else None
    links: list[Link | None] = [None]
    if reason is None:
        links += [
            Link(gbit_per_s=gbit, delay_ms=delay_ms)
            for gbit in bench.remote.gbits
            for delay_ms in bench.remote.delays_ms
        ]
    found = []
    for number, link in enumerate(links, start=1):
        progress("places", number - 1, len(links))
        found.append(_summary(bench, link, _run(bench, link, folder)))
        progress("places", number, len(links))
    return Result(
        name="cutting",
        tables=_tables(bench, found),
        values={"sizes": asdict(bench), "places": found},
        notes=() if reason is None else (f"links are left out: {reason}",),
    )


def _run(bench: CuttingBench, link: Link | None, folder: str | None) -> dict[str, Any]:
    with ExitStack() as stack:
        run = stack.enter_context(tempfile.TemporaryDirectory(prefix="bagpipe-", dir=folder))
        network = None if link is None else stack.enter_context(linked_hosts(2, link))
        end = End(bench=bench.remote, host="", folder=run)
        found: dict[str, Any] = run_over("benchmarks.cutting.trainer", network, end)
        return found


def _summary(bench: CuttingBench, link: Link | None, found: dict[str, Any]) -> dict[str, Any]:
    record_bytes = bench.remote.group.record_bytes
    cuts = [Cut(**each) for each in found["cuts"]]
    summaries = []
    for cut, in_process_s in zip(cuts, found["in_process_s"], strict=True):
        flushed = cut.rows_flushed * record_bytes
        best_s = in_process_s if link is None else flushed / link.bytes_per_s
        cost_s = cut.flush_s + cut.take_s + cut.slower_s
        summaries.append(
            asdict(cut)
            | {
                "bytes_flushed": flushed,
                "flush_share": best_s / cut.flush_s,
                "cost_s": cost_s,
                "of_a_minute": cost_s / _MINUTE_S,
                "beside_flush_of_a_minute": (cost_s - cut.flush_s) / _MINUTE_S,
                "bytes_over_records": cut.file_bytes / (cut.num_records * (8 + record_bytes)),
                "records_over_used": cut.num_records / max(cut.rows_used, 1),
            }
        )
    return {
        "place": "shared memory" if link is None else f"{link.gbit_per_s:g} Gbit/s",
        "delay_ms": None if link is None else link.delay_ms,
        "step_ms": found["step_ms"],
        "num_base": found["num_base"],
        "in_process_s": found["in_process_s"],
        "cuts": summaries,
    }


def _tables(bench: CuttingBench, found: Sequence[dict[str, Any]]) -> tuple[Table, ...]:
    costs = Table(
        title=f"A cut every {bench.steps_between:,} steps; the first has all rows, and is left out"
    )
    for column in ("server", "ms a step", "flush, s", "share", "other wait", "slower", "% of 60 s"):
        costs.add_column(column, justify="left" if column == "server" else "right")
    files = Table(title="Files")
    columns = ("server", "rows", "MB", "over records", "records over rows used", "written, s")
    for column in columns:
        files.add_column(column, justify="left" if column == "server" else "right")
    for each in found:
        cuts = each["cuts"][1:] or each["cuts"]

        def median(name: str, cuts: Sequence[dict[str, Any]] = cuts) -> float:
            return float(np.median([cut[name] for cut in cuts]))

        costs.add_row(
            each["place"],
            f"{each['step_ms']:.2f}",
            f"{median('flush_s'):.3f}",
            f"{median('flush_share'):.2f}",
            f"{median('take_s'):.3f}",
            f"{median('slower_s'):.3f}",
            f"{100 * median('of_a_minute'):.2f}",
        )
        for cut in cuts:
            files.add_row(
                each["place"],
                f"{cut['num_records']:,}",
                f"{cut['file_bytes'] / 1e6:.1f}",
                f"{cut['bytes_over_records']:.4f}",
                f"{cut['records_over_used']:.3f}",
                f"{cut['written_s']:.2f}",
            )
    return costs, files
