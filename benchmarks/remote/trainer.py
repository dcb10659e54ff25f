"""The trainer's process of `remote`: arms take turns at training, and what they took is printed.

All turns train one set of tables, one after the other, each from an empty cache over the same
batches. Rows and their updates are exact, so what the tables hold at the end does not depend on
which arms had which turns.

**The device's part.** A GPU looks rows up, computes the dense part and updates rows, and the host's
cores are free meanwhile. Here it is a time, `device_ms`. Lookup and update are computed within it,
by Bagpipe's CPU kernels; what is left of it is waited. The gradient is drawn beforehand.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import cycle
from typing import Any

import torch

from bagpipe.data.base import Batch
from bagpipe.embeddings.batches import Lookahead
from bagpipe.embeddings.collection import EmbeddingBagCollection
from bagpipe.feed.stream import BatchAdapter, Deferred, StreamOptions
from bagpipe.oracle.dedup import dedup
from bagpipe.server.client import ShardServers
from bagpipe.server.control import ServerControl
from bagpipe.types import Group
from benchmarks.measure import clock_of_process, silent
from benchmarks.network.server import EPOCH, SEED
from benchmarks.remote.policy import no_cache_known
from benchmarks.remote.settings import ArmSettings, End, RemoteBench, Turn
from benchmarks.streams import make_batches

_GRADIENT_SCALE = 1e-3
_LEAST_STEPS = 5
ServerClock = Callable[[], float]


def main() -> None:
    """Runs the turns of its argument's benchmark."""
    end = End.told(sys.argv[1])
    bench = end.bench
    group = bench.group
    batches = make_batches(
        group,
        num_batches=bench.num_batches,
        batch_size=bench.batch_size,
        skew=bench.skew,
        progress=silent,
    )
    with joined(end) as (_, embeddings):
        clock = clock_of_process(end.server_process)
        turns = run_turns(bench, embeddings, batches, partial(time.clock_gettime, clock))
        found = [asdict(turn) for turn in turns]
    sys.stdout.write(json.dumps(found) + "\n")


@contextmanager
def joined(end: End) -> Iterator[tuple[ServerControl, EmbeddingBagCollection]]:
    """The server that `end` names, and tables whose records it has."""
    group = end.bench.group
    with ExitStack() as stack:
        address = f"{end.host}:{end.port}"
        control = stack.enter_context(closing(ServerControl([address], [group], SEED)))
        servers = stack.enter_context(ShardServers(control, [group], EPOCH, [end.instance]))
        embeddings = EmbeddingBagCollection(
            group.tables,
            optimizer=group.optimizer,
            seed=SEED,
            store=lambda group, seed: servers.stores[group.index],
        )
        stack.callback(embeddings.close)
        yield control, embeddings


def run_turns(
    bench: RemoteBench,
    embeddings: EmbeddingBagCollection,
    batches: Sequence[Batch],
    server_cpu_s: ServerClock,
) -> Iterator[Turn]:
    """Lets all arms have their turns: A B C A B C ..."""
    group = embeddings.groups[0]
    most_uniques = most_uniques_of(group, batches)
    device = Device(bench, embeddings)
    with no_cache_known():
        for _ in range(bench.num_rounds):
            for arm in bench.arms:
                if arm == "device":
                    yield from _device_alone(bench)
                else:
                    yield from _turn(bench, arm, device, batches, most_uniques, server_cpu_s)


def most_uniques_of(group: Group, batches: Sequence[Batch]) -> int:
    """The rows of the batch that has most."""
    return max(len(dedup(group, batch.sparse).unique_rows) for batch in batches)


class Device:
    """What a device would do in a step, in a time of its own."""

    def __init__(self, bench: RemoteBench, embeddings: EmbeddingBagCollection) -> None:
        group = embeddings.groups[0]
        shape = bench.batch_size, len(group.features), group.embedding_dim
        generator = torch.Generator().manual_seed(1)
        self.embeddings = embeddings
        self._pooled = torch.empty(shape)
        self._gradient = torch.randn(shape, generator=generator) * _GRADIENT_SCALE
        self._last_update_s = 0.0
        self.lookup_s = self.update_s = 0.0
        """Added up."""

    def step(self, batch: Batch, seconds: float) -> None:
        """Looks rows up, waits, and updates rows, so that all of it takes `seconds`."""
        began = time.perf_counter()
        self.embeddings.lookup(batch.sparse, out=[self._pooled])
        self.lookup_s += time.perf_counter() - began
        _wait_until(began + seconds - self._last_update_s)
        updating = time.perf_counter()
        self.embeddings.update([self._gradient])
        self._last_update_s = time.perf_counter() - updating
        self.update_s += self._last_update_s


@dataclass(frozen=True, kw_only=True)
class _Counted:
    """What has been added up at one moment."""

    num_steps: int
    uniques: int
    fetched: int
    written_back: int
    lookup_s: float
    update_s: float
    waits_s: dict[str, float]
    trainer_cpu_s: float
    server_cpu_s: float

    @classmethod
    def now(cls, stream: Lookahead[Any], device: Device, server_cpu_s: ServerClock) -> _Counted:
        report = stream.report
        return cls(
            num_steps=report.num_steps,
            uniques=report.num_uniques,
            fetched=report.num_fetched,
            written_back=report.num_written_back,
            lookup_s=device.lookup_s,
            update_s=device.update_s,
            waits_s=asdict(stream.waits),
            trainer_cpu_s=time.process_time(),
            server_cpu_s=server_cpu_s(),
        )

    def a_step_since(self, before: _Counted) -> dict[str, Any]:
        """By the names of a `Turn`."""
        num_steps = self.num_steps - before.num_steps
        found: dict[str, Any] = {
            name: (getattr(self, name) - getattr(before, name)) / num_steps
            for name in (
                *("uniques", "fetched", "written_back", "lookup_s", "update_s"),
                *("trainer_cpu_s", "server_cpu_s"),
            )
        }
        found["waits_s"] = {
            name: (seconds - before.waits_s[name]) / num_steps
            for name, seconds in self.waits_s.items()
        }
        return found


def _device_alone(bench: RemoteBench) -> Iterator[Turn]:
    for device_ms in bench.devices_ms:
        seconds = []
        for _ in range(bench.measured_steps):
            began = time.perf_counter()
            _wait_until(began + device_ms / 1e3)
            seconds.append(time.perf_counter() - began)
        yield Turn(arm="device", device_ms=device_ms, step_s=seconds)


def _turn(
    bench: RemoteBench,
    arm: str,
    device: Device,
    batches: Sequence[Batch],
    most_uniques: int,
    server_cpu_s: ServerClock,
) -> list[Turn]:
    """An arm's turn, from an empty cache to a flush."""
    embeddings = device.embeddings
    planned = bench.settings_of(arm, embeddings.groups[0].num_rows, most_uniques)
    stream = stream_of(embeddings, batches, planned)
    turns = []
    with stream:
        for _ in range(planned.warmup_steps):
            device.step(next(stream), 0.0)
        for device_ms in bench.devices_ms:
            for _ in range(bench.settle_steps):
                device.step(next(stream), device_ms / 1e3)
            before = _Counted.now(stream, device, server_cpu_s)
            step_s = _measured(bench, stream, device, device_ms / 1e3)
            counted = _Counted.now(stream, device, server_cpu_s).a_step_since(before)
            turns.append(Turn(arm=arm, device_ms=device_ms, step_s=step_s, **counted))
        began = time.perf_counter()
        stream.flush()
        flush_s = time.perf_counter() - began
        turns[-1] = replace(turns[-1], flush_s=flush_s, flushed=stream.report.peak_slots)
    return turns


def stream_of(
    embeddings: EmbeddingBagCollection, batches: Sequence[Batch], planned: ArmSettings
) -> Lookahead[Batch]:
    """Batches again and again, planned as an arm does."""
    options = StreamOptions(
        groups=embeddings.groups,
        num_slots=(planned.num_slots,),
        lookahead=planned.lookahead,
        prefetch_depth=planned.prefetch_depth,
        first_step=embeddings.step,
        policy=planned.policy,
    )
    reads = (Deferred(partial(_as_it_is, each)) for each in cycle(batches[: planned.num_batches]))
    return Lookahead(reads, embeddings, options, BatchAdapter(), None, oracle="thread")


def _measured(
    bench: RemoteBench, stream: Lookahead[Batch], device: Device, seconds: float
) -> list[float]:
    """Seconds of each step, from one batch's end to the next one's."""
    step_s: list[float] = []
    started = before = time.perf_counter()
    while len(step_s) < _LEAST_STEPS or (
        len(step_s) < bench.measured_steps and before - started < bench.measured_s
    ):
        device.step(next(stream), seconds)
        now = time.perf_counter()
        step_s.append(now - before)
        before = now
    return step_s


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _wait_until(moment: float) -> None:
    left = moment - time.perf_counter()
    if left > 0:
        time.sleep(left)


if __name__ == "__main__":
    main()
