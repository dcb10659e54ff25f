"""`remote`: training over a link to a shard server, against ways that do not look ahead.

Trainer and server are hosts with a link between them (`benchmarks.links`), and processes of their
own. Tables have Criteo-Kaggle's cardinalities. `benchmarks.remote.settings` says what the arms are;
all run on the same executor, client, server and wire. `benchmarks.remote.trainer` says what stands
for a GPU.

The floor of a step is the larger of two: the device's time, and what the plan moves in the busier
direction over the bandwidth. A link carries as much both ways at a time. To the server go records
that are written, and the numbers of all rows, written or fetched.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from bagpipe.errors import ConfigError
from bagpipe.plots import new_figure, save_figure
from benchmarks.links import Link, Network, first_line, linked_hosts, running, why_not
from benchmarks.measure import Progress, Result, Timing
from benchmarks.remote.settings import End, RemoteBench, Turn

_TIMEOUT_S = 3600.0
_ROW_NUMBER_BYTES = 8


def bench_remote(bench: RemoteBench, progress: Progress, plot: Path | None = None) -> Result:
    """Runs all arms over all links.

    Args:
        bench: what is measured.
        progress: is told how far it is.
        plot: where to save step times over bandwidth; None: nowhere.

    Raises:
        ConfigError: This machine can't make links, or a process failed; its own words are on
            stderr.
    """
    reason = why_not()
    if reason is not None:
        raise ConfigError(f"links can't be made: {reason}")
    links = [
        Link(gbit_per_s=gbit, delay_ms=delay_ms)
        for gbit in bench.gbits
        for delay_ms in bench.delays_ms
    ]
    found = []
    progress("links", 0, len(links))
    for number, link in enumerate(links, start=1):
        found += _summaries(bench, link, _over_link(bench, link))
        progress("links", number, len(links))
    if plot is not None:
        _save_plot(bench, found, plot)
    return Result(
        name="remote",
        tables=tuple(_table(bench, link, device_ms, found) for link, device_ms in _cases(found)),
        values={"sizes": asdict(bench), "links": found},
        notes=tuple(_flushes(found)),
    )


def _over_link(bench: RemoteBench, link: Link) -> list[Turn]:
    with linked_hosts(2, link) as network:
        found = run_over("benchmarks.remote.trainer", network, End(bench=bench, host=""))
        return [Turn(**each) for each in found]


def run_over(trainer: str, network: Network | None, end: End) -> Any:
    """Runs a server and a trainer's program; returns what the trainer printed, as JSON.

    Args:
        trainer: the program's module.
        network: hosts for both; None: they share this one.
        end: what both are told, but for where the server is.
    """
    with ExitStack() as stack:
        before: list[list[str]] = [[], []]
        host = "127.0.0.1"
        if network is not None:
            before, host = [each.command() for each in network.hosts], network.hosts[1].address
        end = replace(end, host=host)
        serve = [*before[1], *_command("benchmarks.remote.server", end)]
        server = stack.enter_context(running(serve))
        text, instance = first_line(server).split()
        port = int(text)
        if network is not None:
            host, port = network.way_to(network.hosts[1], port)
        end = replace(end, host=host, port=port, instance=instance, server_process=server.pid)
        command = [*before[0], *_command(trainer, end)]
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=_TIMEOUT_S)
        if ended.returncode:
            raise ConfigError(f"the trainer ended with status {ended.returncode}; see above")
        return json.loads(ended.stdout)


def _command(module: str, end: End) -> list[str]:
    return [sys.executable, "-m", module, end.argument()]


def _summaries(bench: RemoteBench, link: Link, turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """One for each arm and device time, from all its turns."""
    by_case: dict[tuple[float, str], list[Turn]] = defaultdict(list)
    for turn in turns:
        by_case[turn.device_ms, turn.arm].append(turn)
    return [
        asdict(link) | _summary(bench, link, by_case[device_ms, arm])
        for device_ms in bench.devices_ms
        for arm in bench.arms
    ]


def _summary(bench: RemoteBench, link: Link, turns: Sequence[Turn]) -> dict[str, Any]:
    record_bytes = bench.group.record_bytes
    first = turns[0]

    def mean(name: str) -> float:
        return float(np.mean([getattr(turn, name) for turn in turns]))

    fetched, written = mean("fetched"), mean("written_back")
    bytes_in = fetched * record_bytes
    bytes_out = written * record_bytes + (fetched + written) * _ROW_NUMBER_BYTES
    wire_ms = 1e3 * max(bytes_in, bytes_out) / link.bytes_per_s
    flushes = [turn for turn in turns if turn.flushed]
    return {
        "arm": first.arm,
        "device_ms": first.device_ms,
        "step": Timing.of([seconds for turn in turns for seconds in turn.step_s]),
        "uniques": mean("uniques"),
        "bytes_in": bytes_in,
        "bytes_out": bytes_out,
        "wire_ms": wire_ms,
        "floor_ms": max(wire_ms, first.device_ms),
        "lookup_ms": 1e3 * mean("lookup_s"),
        "update_ms": 1e3 * mean("update_s"),
        "waits_ms": {
            name: 1e3 * float(np.mean([turn.waits_s[name] for turn in turns]))
            for name in first.waits_s
        },
        "trainer_cpu_ms": 1e3 * mean("trainer_cpu_s"),
        "server_cpu_ms": 1e3 * mean("server_cpu_s"),
        "flush": {
            "s": [turn.flush_s for turn in flushes],
            "bytes": [turn.flushed * record_bytes for turn in flushes],
            "share": [
                turn.flushed * record_bytes / link.bytes_per_s / turn.flush_s for turn in flushes
            ],
        },
    }


def _cases(found: Sequence[dict[str, Any]]) -> list[tuple[tuple[float, float], float]]:
    """Links and device times, each pair once, in order."""
    return list(dict.fromkeys((_link_of(each), each["device_ms"]) for each in found))


def _link_of(summary: dict[str, Any]) -> tuple[float, float]:
    return summary["gbit_per_s"], summary["delay_ms"]


def _table(
    bench: RemoteBench,
    link: tuple[float, float],
    device_ms: float,
    found: Sequence[dict[str, Any]],
) -> Table:
    table = Table(
        title=f"{link[0]:g} Gbit/s, {link[1]:g} ms each way, batch {bench.batch_size:,}, "
        f"{device_ms:g} ms on the device"
    )
    for column in ("arm", "ms a step", "/ bagpipe", "/ device", "MB in", "out", "floor, ms"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    of_case = [each for each in found if _link_of(each) == link and each["device_ms"] == device_ms]
    medians = {each["arm"]: each["step"].median_ms for each in of_case}
    for each in of_case:
        median_ms = each["step"].median_ms
        table.add_row(
            each["arm"],
            str(each["step"]),
            f"{median_ms / medians['bagpipe']:.2f}",
            f"{median_ms / medians['device']:.2f}",
            f"{each['bytes_in'] / 1e6:.2f}",
            f"{each['bytes_out'] / 1e6:.2f}",
            f"{each['floor_ms']:.1f}",
        )
    return table


def _flushes(found: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence for each link on the flush of Bagpipe's cache."""
    notes = []
    for each in found:
        if each["arm"] == "bagpipe" and each["flush"]["s"]:
            gbit, delay_ms = _link_of(each)
            notes.append(
                f"{gbit:g} Gbit/s, {delay_ms:g} ms: a flush of bagpipe's cache wrote "
                f"{np.median(each['flush']['bytes']) / 1e6:.1f} MB in "
                f"{np.median(each['flush']['s']):.3f} s, "
                f"{np.median(each['flush']['share']):.2f} of the link"
            )
    return notes


def _save_plot(bench: RemoteBench, found: Sequence[dict[str, Any]], path: Path) -> None:
    """Step time over bandwidth: a curve for each delay, beside the floor; a part for each T."""
    num_parts = len(bench.devices_ms)
    figure = new_figure(width=1.0 + 4.5 * num_parts)
    for number, device_ms in enumerate(bench.devices_ms, start=1):
        axes = figure.add_subplot(1, num_parts, number)
        of_case = [
            each
            for each in found
            if each["device_ms"] == device_ms and each["arm"] not in ("device", "resident")
        ]
        for arm in dict.fromkeys(each["arm"] for each in of_case):
            for delay_ms, style in zip(bench.delays_ms, ("-", "--", "-.", ":") * 9, strict=False):
                points = [
                    each for each in of_case if (each["arm"], each["delay_ms"]) == (arm, delay_ms)
                ]
                axes.plot(
                    [each["gbit_per_s"] for each in points],
                    [each["step"].median_ms for each in points],
                    style,
                    marker="o",
                    markersize=3,
                    label=f"{arm}, {delay_ms:g} ms each way",
                )
        floors = [
            each
            for each in of_case
            if (each["arm"], each["delay_ms"]) == ("bagpipe", bench.delays_ms[0])
        ]
        axes.plot(
            [each["gbit_per_s"] for each in floors],
            [each["floor_ms"] for each in floors],
            color="gray",
            linewidth=1,
            label="bagpipe's floor",
        )
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="Gbit/s",
            ylabel="ms a step",
            title=f"{device_ms:g} ms on the device",
        )
        axes.grid(visible=True, which="both", alpha=0.3)
        axes.legend(fontsize="small")
    save_figure(figure, path)
