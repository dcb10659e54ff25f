"""`network`: how fast a trainer fetches records from a shard server.

Over loopback the same is exchanged by Flight without a store behind it, by Flight with and without
TLS, and by shared memory.
Over links, hosts as network namespaces on this machine, the share of the link that fetches use is
what counts: the floor of a step is its records' bytes over the bandwidth, and headers of TCP, IP
and Ethernet leave 0.95 of it.

Server and trainer are processes of their own; CPU seconds are those of each process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from bagpipe.errors import ConfigError
from benchmarks.links import Link, Network, first_line, linked_hosts, running, why_not
from benchmarks.measure import Progress, Result
from benchmarks.network.server import make_credentials
from benchmarks.network.settings import OVER_LINKS, End, Fetched, NetworkBench

_START_TIMEOUT_S = 120.0
_LOOPBACK = "127.0.0.1"


def bench_network(bench: NetworkBench, progress: Progress) -> Result:
    """Runs all arms over loopback, then those that go over a network over all links.

    Raises:
        ConfigError: A process failed; its own words are on stderr.
    """
    loopback = _over_loopback(bench, progress)
    reason = why_not()
    links = [] if reason is not None else _over_links(bench, progress)
    notes = () if reason is None else (f"links are left out: {reason}",)
    return Result(
        name="network",
        tables=(_loopback_table(bench, loopback), *([_link_table(bench, links)] if links else [])),
        values={
            "sizes": asdict(bench),
            "step_bytes": bench.step_bytes,
            "loopback": loopback,
            "links": links,
        },
        notes=notes,
    )


def _over_loopback(bench: NetworkBench, progress: Progress) -> list[dict[str, Any]]:
    found = []
    for number, arm in enumerate(bench.arms, start=1):
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bagpipe-"))
            if arm == "tls":
                make_credentials(Path(folder), _LOOPBACK)
            end = replace(_end(bench, arm), host=_LOOPBACK, folder=folder)
            end = _served([], end, stack)
            found += _fetch([], end, bench)
        progress("loopback", number, len(bench.arms))
    return found


def _over_links(bench: NetworkBench, progress: Progress) -> list[dict[str, Any]]:
    found = []
    arms = [arm for arm in bench.arms if arm in OVER_LINKS]
    links = [
        Link(gbit_per_s=gbit, delay_ms=delay_ms)
        for gbit in bench.gbits
        for delay_ms in bench.delays_ms
    ]
    for number, link in enumerate(links, start=1):
        with linked_hosts(2, link) as network:
            for fetched in [each for arm in arms for each in _over_link(bench, arm, network)]:
                fetched["floor_ms"] = bench.step_bytes / link.bytes_per_s * 1e3
                fetched["share"] = fetched["bytes_per_s"] / link.bytes_per_s
                found.append(asdict(link) | fetched)
        progress("links", number, len(links))
    return found


def _over_link(bench: NetworkBench, arm: str, network: Network) -> list[dict[str, Any]]:
    trainer, host = network.hosts
    with ExitStack() as stack:
        end = _served(host.command(), replace(_end(bench, arm), host=host.address), stack)
        address, port = network.way_to(host, end.port)
        end = replace(end, host=address, port=port)
        return _fetch(trainer.command(), end, bench)


def _end(bench: NetworkBench, arm: str) -> End:
    return End(
        arm=arm,
        table_rows=bench.table_rows,
        embedding_dim=bench.embedding_dim,
        step_rows=bench.step_rows,
        measured_s=bench.measured_s,
        in_flight=bench.in_flight,
    )


def _served(before: Sequence[str], end: End, stack: ExitStack) -> End:
    """Starts a server, until the stack ends; returns what its client must know."""
    server = stack.enter_context(running([*before, *_command("server", end)]))
    port, instance = first_line(server).split()
    return replace(end, port=int(port), instance=instance, server_process=server.pid)


def _fetch(before: Sequence[str], end: End, bench: NetworkBench) -> list[dict[str, Any]]:
    """Runs a trainer's process; returns what it found, once for each number in flight."""
    command = [*before, *_command("client", end)]
    timeout_s = _START_TIMEOUT_S + 4 * bench.measured_s * len(bench.in_flight)
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=timeout_s)
    if ended.returncode:
        raise ConfigError(f"arm {end.arm} ended with status {ended.returncode}; see above")
    return [_result(bench, end.arm, Fetched(**each)) for each in json.loads(ended.stdout)]


def _command(name: str, end: End) -> list[str]:
    return [sys.executable, "-m", f"benchmarks.network.{name}", end.argument()]


def _result(bench: NetworkBench, arm: str, fetched: Fetched) -> dict[str, Any]:
    num_bytes = bench.step_bytes * fetched.num_steps
    return {
        "arm": arm,
        "in_flight": fetched.num_in_flight,
        "num_steps": fetched.num_steps,
        "step_ms": fetched.measured_s / fetched.num_steps * 1e3,
        "bytes_per_s": num_bytes / fetched.measured_s,
        "client_cpu_s_per_gb": fetched.client_cpu_s / num_bytes * 1e9,
        "server_cpu_s_per_gb": fetched.server_cpu_s / num_bytes * 1e9,
    }


def _loopback_table(bench: NetworkBench, found: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=f"Loopback, {bench.step_rows:,} rows a step, {bench.step_bytes:,} bytes")
    for column in ("arm", "in flight", "ms a step", "GB/s", "of bare"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for column in ("trainer", "server"):
        table.add_column(f"CPU s a GB, {column}", justify="right")
    bare = {each["in_flight"]: each["bytes_per_s"] for each in found if each["arm"] == "bare"}
    for each in found:
        floor = bare.get(each["in_flight"])
        table.add_row(
            each["arm"],
            str(each["in_flight"]),
            f"{each['step_ms']:.2f}",
            f"{each['bytes_per_s'] / 1e9:.2f}",
            "-" if floor is None else f"{each['bytes_per_s'] / floor:.2f}",
            f"{each['client_cpu_s_per_gb']:.2f}",
            f"{each['server_cpu_s_per_gb']:.2f}",
        )
    return table


def _link_table(bench: NetworkBench, found: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=f"Links, {bench.step_bytes:,} bytes a step")
    columns = ("arm", "Gbit/s", "delay, ms", "in flight", "ms a step", "floor, ms", "of the link")
    for column in columns:
        table.add_column(column, justify="left" if column == "arm" else "right")
    for each in found:
        table.add_row(
            each["arm"],
            f"{each['gbit_per_s']:g}",
            f"{each['delay_ms']:g}",
            str(each["in_flight"]),
            f"{each['step_ms']:.2f}",
            f"{each['floor_ms']:.2f}",
            f"{each['share']:.3f}",
        )
    return table
