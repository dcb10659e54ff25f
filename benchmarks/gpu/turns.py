"""The turns of `gpu`.

Bagpipe runs live: it reads prepared files, plans, copies and trains. It takes turns with one other
arm after another, so that every ratio comes from neighbouring minutes. The others hold their tables
only while they run, which bounds the memory.

A turn is measured between two events on the GPU's own clock; on a CPU, which only tests use, by the
host's. Some steps precede it, which use up what Bagpipe's queues hold from the time when others
ran. The host waits for the device after a turn, never within.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bagpipe.cache.graph_rows import GraphRows
from bagpipe.data.prepared import PreparedSource
from bagpipe.store import FileStore
from bagpipe.types import Group
from benchmarks.clocks import seconds_a_call, timed_event
from benchmarks.dense import SharedDense
from benchmarks.driver_calls import driver_calls_a_step
from benchmarks.gpu.arms import BagpipeArm, DenseArm, GpuArm, TorchCpuArm
from benchmarks.gpu.fbgemm import FbgemmArm
from benchmarks.gpu.floor import embedding_floor, measure_bandwidths
from benchmarks.gpu.served import ServedArm
from benchmarks.measure import Progress, Timing, relative_differences
from benchmarks.prepared_stream import Stream, all_batches, make_stream
from benchmarks.streams import initial_records
from benchmarks.workloads import Workload

_KERNEL_REPEATS = 30
_HEAD_START_CYCLES = 20_000_000
"""Ten milliseconds or so that the device sleeps before repeated kernels: the host's launches get
ahead meanwhile."""
_NUM_SHOWN = 16
"""Batches that the arm without embeddings repeats."""


@dataclass(kw_only=True)
class _Run:
    """An arm and what was seen of it."""

    arm: GpuArm
    parameters: list[Tensor]  # its dense part's
    device_bytes: int
    losses: list[float]
    turns_s: list[float] = field(default_factory=list)  # a step's mean over each turn
    kernels_ms: dict[str, float] = field(default_factory=dict)


class Turns:
    """One workload on one device."""

    def __init__(
        self,
        workload: Workload,
        names: Sequence[str],
        device: torch.device,
        folder: Path,
        progress: Progress,
    ) -> None:
        self._workload, self._names = workload, names
        self._device, self._progress = device, progress
        self._group: Group = workload.group
        self._folder = folder
        self._reference: list[float] = []  # Bagpipe's first losses
        self.failures: dict[str, str] = {}
        """Arms that failed, and with what."""
        warmup, turn = workload.warmup_steps, workload.turn_and_settle_steps
        # the last two tell idle time and calls of the driver
        num_turns = max(1, len(names)) * workload.rounds + 2
        self._stream: Stream = make_stream(
            workload,
            folder / "data",
            # The window must stay full while it is measured, or there would be less to plan.
            num_batches=warmup + num_turns * turn + workload.lookahead + 2,
            num_resident=warmup + workload.rounds * turn + 2,
            device=device,
            progress=progress,
        )
        self._dense = SharedDense(workload, device)
        self._initial = self._dense.save()

    def run(self) -> dict[str, Any]:
        """Runs all arms; returns what they add up to."""
        bandwidths = measure_bandwidths(self._device)
        sets: list[tuple[str, ...]] = [(name,) for name in self._names] or [()]
        with ExitStack() as stack:
            runs = {name: self._start(name, stack) for name in ("bagpipe", "dense")}
            bagpipe = runs["bagpipe"].arm
            assert isinstance(bagpipe, BagpipeArm)
            before = bagpipe.counters()
            for number, names in enumerate(sets):
                runs |= self._measure_beside(
                    runs, names, number * self._workload.rounds, len(sets) * self._workload.rounds
                )
                self._forget()
            counted = bagpipe.counters_since(before)
            self._time_kernels(runs["bagpipe"])
            counted["device_idle_ms"] = self._time_idle(runs["bagpipe"])
            calls = self._count_driver_calls(runs["bagpipe"])
            values = self._values(runs, counted, bandwidths, bagpipe.lookahead.oracle_bytes)
            return values | {"driver_calls": calls}

    def _measure_beside(
        self, always: Mapping[str, _Run], names: Sequence[str], num_done: int, num_turns: int
    ) -> dict[str, _Run]:
        """Lets the arms of `names` take turns with those that always run.

        One of `names` that fails is left out and noted.
        """
        with ExitStack() as beside:
            runs: dict[str, _Run] = {}
            for name in names:
                with self._noting_failure(name):
                    runs[name] = self._start(name, beside)
            for turn in range(self._workload.rounds):
                for name in ("dense", "bagpipe"):
                    self._turn(always[name])
                for name, run in runs.items():
                    if name not in self.failures:
                        with self._noting_failure(name):
                            self._turn(run)
                self._progress("measuring", num_done + turn + 1, num_turns)
            for name, run in runs.items():
                if name not in self.failures:
                    with self._noting_failure(name):
                        self._time_kernels(run)
            return {name: run for name, run in runs.items() if name not in self.failures}

    @contextmanager
    def _noting_failure(self, name: str) -> Iterator[None]:
        """Notes an arm's error: one that runs out of memory must not cost others their numbers."""
        try:
            yield
        except Exception as error:
            self.failures[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"

    def _make(self, name: str) -> GpuArm:
        match name:
            case "served":
                return ServedArm(self._workload, self._group, self._batches(), device=self._device)
            case "bagpipe":
                in_file = self._workload.store == "file"
                return BagpipeArm(
                    self._workload,
                    self._group,
                    self._batches(),
                    device=self._device,
                    store=(
                        lambda group, seed: FileStore(
                            group, seed, self._folder / "store", existing="overwrite"
                        )
                    )
                    if in_file
                    else None,
                )
            case "dense":
                return DenseArm(self._stream.resident[:_NUM_SHOWN])
            case "torch_cpu":
                return TorchCpuArm(self._group, self._stream)
        return FbgemmArm(
            name,
            self._group,
            self._stream,
            cache_rows=self._workload.cache_rows,
            device=self._device,
        )

    def _batches(self) -> Iterable[Any]:
        source = PreparedSource(self._stream.folder, "train", verify=False)
        return all_batches(source, self._workload.batch_size, self._stream.num_batches)

    def _start(self, name: str, stack: ExitStack) -> _Run:
        """Makes an arm, gives it the initial rows and trains its first steps; `stack` closes it."""
        before = self._allocated()
        arm = self._make(name)
        stack.callback(arm.close)
        is_live = isinstance(arm, BagpipeArm)
        touched = self._stream.touched_rows if is_live else self._stream.resident_rows
        for rows, records in initial_records(self._group, touched):
            arm.load(rows, records)
        arm.start()
        self._dense.load(self._initial)
        num_steps = (
            self._workload.num_compared
            if isinstance(arm, TorchCpuArm)
            else self._workload.warmup_steps
        )
        losses = []
        for step in range(num_steps):
            losses.append(self._step(arm))
            if step % 50 == 0:
                self._progress(f"warming up {name}", step, num_steps)
        run = _Run(
            arm=arm,
            parameters=self._dense.save(),
            device_bytes=self._peak() - before,
            losses=[float(loss) for loss in losses[: self._workload.num_compared]],
        )
        if name == "bagpipe":
            self._reference = run.losses
        return run

    def _step(self, arm: GpuArm) -> Tensor:
        dense, labels = arm.next_batch()
        rows = self._rows(arm)
        if rows is not None:
            return self._dense.step(dense, labels, rows=rows)[0]
        arm.lookup(self._dense.pooled)
        loss, grads = self._dense.step(dense, labels)
        arm.update(grads[0])
        return loss

    def _rows(self, arm: GpuArm) -> GraphRows | None:
        """What looks up and updates within the dense part's graph, as in `bagpipe train`."""
        can_replay = self._dense.step.can_replay(self._workload.batch_size)
        return arm.rows() if isinstance(arm, BagpipeArm) and can_replay else None

    def _turn(self, run: _Run) -> None:
        """Trains a turn of an arm, and notes how long a step took."""
        workload = self._workload
        is_slow = isinstance(run.arm, TorchCpuArm)
        self._dense.load(run.parameters)
        for _ in range(1 if is_slow else workload.settle_steps):
            self._step(run.arm)
        num_steps = workload.slow_steps if is_slow else workload.turn_steps
        seconds = seconds_a_call(self._device, lambda: self._step(run.arm), num_steps)
        run.turns_s.append(seconds)
        run.parameters = self._dense.save()

    def _time_kernels(self, run: _Run) -> None:
        """Times the embedding work alone, on one batch that is repeated."""
        run.arm.next_batch()
        run.arm.lookup(self._dense.pooled)
        grads = torch.randn_like(self._dense.pooled) * 1e-6
        for name, kernel in run.arm.kernels(self._dense.pooled, grads).items():
            kernel()
            if self._device.type == "cuda":
                torch.cuda._sleep(_HEAD_START_CYCLES)
            run.kernels_ms[name] = 1e3 * seconds_a_call(self._device, kernel, _KERNEL_REPEATS)

    def _time_idle(self, run: _Run) -> float:
        """Milliseconds that the device waits, in a step, for rows or for the host.

        Takes one more turn. Between a step's update and the end of the next one's lookup lie that
        wait and the lookup, whose own time is known. Where one graph holds all, between two graphs
        lies nothing else.
        """
        if self._device.type == "cpu":
            return 0.0
        self._dense.load(run.parameters)
        updated, looked_up = list[torch.cuda.Event](), list[torch.cuda.Event]()
        lookup_ms = run.kernels_ms["lookup"]
        for step in range(self._workload.turn_and_settle_steps):
            dense, labels = run.arm.next_batch()
            rows = self._rows(run.arm)
            if rows is None:
                run.arm.lookup(self._dense.pooled)
            else:
                lookup_ms = 0.0
            if updated:
                looked_up.append(timed_event())
            grads = self._dense.step(dense, labels, rows=rows)[1]
            if rows is None:
                run.arm.update(grads[0])
            if step >= self._workload.settle_steps:
                updated.append(timed_event())
        torch.cuda.synchronize(self._device)
        between = [begin.elapsed_time(end) for begin, end in zip(updated, looked_up, strict=False)]
        return max(0.0, float(sum(between)) / len(between) - lookup_ms)

    def _count_driver_calls(self, run: _Run) -> dict[str, float]:
        """Those of this thread in a step, by name. Takes one more turn."""
        self._dense.load(run.parameters)
        for _ in range(self._workload.settle_steps):
            self._step(run.arm)
        return driver_calls_a_step(
            self._device, lambda: self._step(run.arm), self._workload.turn_steps
        )

    def _allocated(self) -> int:
        if self._device.type == "cpu":
            return 0
        torch.cuda.reset_peak_memory_stats(self._device)
        return torch.cuda.memory_allocated(self._device)

    def _peak(self) -> int:
        return 0 if self._device.type == "cpu" else torch.cuda.max_memory_allocated(self._device)

    def _forget(self) -> None:
        """Gives memory back to the system: the next arm does not allocate from torch's pool."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _values(
        self,
        runs: Mapping[str, _Run],
        counted: dict[str, float],
        bandwidths: dict[str, float],
        oracle_bytes: int,
    ) -> dict[str, Any]:
        workload, group = self._workload, self._group
        steps = {name: Timing.of(run.turns_s) for name, run in runs.items()}
        num_lookups = workload.batch_size * sum(workload.lengths)
        return {
            "workload": asdict(workload),
            "device": torch.cuda.get_device_name(self._device)
            if self._device.type == "cuda"
            else "cpu",
            "num_rows": group.num_rows,
            "table_bytes": group.num_rows * group.record_bytes,
            "cache_share": workload.cache_rows / group.num_rows,
            "cache_bytes": workload.cache_rows * group.record_bytes,
            "arms": {
                name: {
                    "step": steps[name],
                    "over_dense": steps[name].median_ms / steps["dense"].median_ms,
                    "over_bagpipe": steps[name].median_ms / steps["bagpipe"].median_ms,
                    "kernels_ms": run.kernels_ms,
                    "device_bytes": run.device_bytes,
                    "loss_differences": relative_differences(run.losses, self._reference)
                    if name != "dense"
                    else [],
                }
                for name, run in runs.items()
            },
            "bagpipe": counted
            | {"idle_share": counted["device_idle_ms"] / steps["bagpipe"].median_ms},
            "bandwidths": bandwidths,
            "floor": embedding_floor(workload, group, num_lookups, counted, bandwidths),
            "oracle_bytes": oracle_bytes,
        }
