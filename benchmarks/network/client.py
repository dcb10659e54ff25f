"""The trainer's process of `network`: fetches for a while, and prints what it took as JSON."""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np

from bagpipe.server.client import ShardServers
from bagpipe.server.control import ServerControl
from bagpipe.types import Float32Array, Int64Array
from benchmarks.measure import clock_of_process
from benchmarks.network.bare import BareClient
from benchmarks.network.server import EPOCH, SEED, credentials
from benchmarks.network.settings import End, Fetched

Ask = Callable[[Int64Array, Float32Array], Callable[[], None]]
MakeOuts = Callable[[int], Float32Array]

_NUM_DRAWN = 16
"""Steps whose rows are drawn; they repeat, and together are more than caches of processors hold."""


def main() -> None:
    """Fetches what its argument tells."""
    end = End.told(sys.argv[1])
    with _asking(end) as (ask, make_outs):
        found = [
            _measure(end, ask, make_outs(num_in_flight), num_in_flight)
            for num_in_flight in end.in_flight
        ]
    sys.stdout.write(json.dumps([asdict(each) for each in found]) + "\n")


@contextmanager
def _asking(end: End) -> Iterator[tuple[Ask, MakeOuts]]:
    """What asks a server, and what makes arrays (num_in_flight, step_rows, record_width)."""
    shape = end.step_rows, end.group.record_width

    def make_outs(num_in_flight: int) -> Float32Array:
        return np.zeros((num_in_flight, *shape), np.float32)

    if end.arm == "bare":
        with closing(BareClient(end.host, end.port, end.group)) as bare:
            yield bare.ask, make_outs
        return
    own = credentials(Path(end.folder), of_server=False) if end.arm == "tls" else None
    address = f"{end.host}:{end.port}"
    with (
        closing(ServerControl([address], [end.group], SEED, own)) as control,
        ShardServers(
            control, [end.group], EPOCH, [end.instance], staging=end.arm in ("staging", "direct")
        ) as servers,
    ):

        def make_shared_outs(num_in_flight: int) -> Float32Array:
            assert servers.memory is not None
            records = servers.memory.take(num_in_flight * shape[0], shape[1])
            return records.reshape(num_in_flight, *shape)

        yield servers.stores[0].ask, make_shared_outs if end.arm == "direct" else make_outs


def _measure(end: End, ask: Ask, outs: Float32Array, num_in_flight: int) -> Fetched:
    draw = np.random.default_rng(0)
    steps = [draw.integers(0, end.table_rows, end.step_rows) for _ in range(_NUM_DRAWN)]
    _run(steps, outs, ask, end.measured_s / 5)
    server_clock = clock_of_process(end.server_process)
    started_s = time.perf_counter()
    client_s, server_s = time.process_time(), time.clock_gettime(server_clock)
    num_steps = _run(steps, outs, ask, end.measured_s)
    client_cpu_s = time.process_time() - client_s
    server_cpu_s = time.clock_gettime(server_clock) - server_s
    measured_s = time.perf_counter() - started_s
    if end.arm != "bare":
        assert (outs == 1).all(), "records are wrong"
    return Fetched(
        num_in_flight=num_in_flight,
        num_steps=num_steps,
        measured_s=measured_s,
        client_cpu_s=client_cpu_s,
        server_cpu_s=server_cpu_s,
    )


def _run(steps: list[Int64Array], outs: Float32Array, ask: Ask, seconds: float) -> int:
    """Fetches steps, with as many under way as `outs` has; returns how many."""
    under_way: deque[Callable[[], None]] = deque()
    until_s, num_steps = time.perf_counter() + seconds, 0
    while time.perf_counter() < until_s:
        under_way.append(ask(steps[num_steps % len(steps)], outs[num_steps % len(outs)]))
        num_steps += 1
        if len(under_way) == len(outs):
            under_way.popleft()()
    for wait in under_way:
        wait()
    return num_steps


if __name__ == "__main__":
    main()
