"""`bagpipe bench gpu`: a training step on one GPU, Bagpipe against FBGEMM and against no embedding
work at all.

All arms train the same batches with the same captured dense part, from the same rows and
parameters; over the first steps their losses must agree. Bagpipe runs live: it reads prepared
files, plans, copies and trains, in turns with one other arm after another, so that every ratio
comes from neighbouring minutes. The others hold their tables only while they run, which bounds the
memory.

A turn is measured between two events on the GPU's own clock (on a CPU, which only tests use, the
host's), after some steps that use up what Bagpipe's queues hold from the time when others ran. The
host waits for the device after a turn, never within.
"""

from __future__ import annotations

import gc
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bagpipe.bench.gpu_arms import BagpipeArm, DenseArm, GpuArm, TorchCpuArm
from bagpipe.bench.gpu_data import Stream, all_batches, make_stream
from bagpipe.bench.gpu_dense import SharedDense
from bagpipe.bench.gpu_fbgemm import FBGEMM_ARMS, FbgemmArm
from bagpipe.bench.gpu_floor import embedding_floor, measure_bandwidths
from bagpipe.bench.gpu_tables import render, save_plot
from bagpipe.bench.gpu_workloads import Workload
from bagpipe.bench.measure import Progress, Result, Timing
from bagpipe.data.prepared import PreparedSource
from bagpipe.errors import ConfigError
from bagpipe.store import FileStore, MemoryStore
from bagpipe.types import Float32Array, Group, Int64Array

LOSS_TOLERANCE = 1e-3
"""Relative, over the compared steps: sums in another order move some values over a bfloat16
boundary, and steps magnify that, from 1e-6 at the second step to 1e-4 at the tenth on a CPU. An arm
that drops its updates is off by 5e-2."""
OTHER_ARMS = (*FBGEMM_ARMS, "torch_cpu")
_LOAD_ROWS = 1 << 20
_KERNEL_REPEATS = 30
_HEAD_START_CYCLES = 20_000_000
"""Ten milliseconds or so that the device sleeps before repeated kernels, so that they do not wait
for the host's launches."""
_NUM_SHOWN = 16
"""Batches that the arm without embeddings goes through."""


def bench_gpu(
    workload: Workload, arms: Sequence[str] | None, progress: Progress, plot: Path | None = None
) -> Result:
    """Runs `dense`, `bagpipe`, and of the others `arms`, all by default; in tiny sizes also without
    CUDA.

    An arm that does not compute the same as Bagpipe is named in the notes. Raises ConfigError for
    an unknown arm.
    """
    for name in arms or ():
        if name not in OTHER_ARMS:
            raise ConfigError(
                f"arm {name!r} is unknown: dense and bagpipe always run, others are "
                f"{', '.join(OTHER_ARMS)}"
            )
    on_cuda = torch.cuda.is_available()
    names, notes = _available([name for name in OTHER_ARMS if not arms or name in arms], on_cuda)
    folder = Path(tempfile.mkdtemp(prefix="bagpipe-bench-"))
    try:
        bench = _Bench(
            workload, names, torch.device("cuda" if on_cuda else "cpu"), folder, progress
        )
        values = bench.run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if plot is not None:
        save_plot(values, plot)
    notes += [
        f"arm {name} failed and is left out: {error}" for name, error in bench.failures.items()
    ]
    notes += disagreements({name: arm["loss_differences"] for name, arm in values["arms"].items()})
    return Result(name="gpu", tables=render(values), values=values, notes=tuple(notes))


def disagreements(
    differences: Mapping[str, Sequence[float]], reference: str = "bagpipe"
) -> list[str]:
    """A sentence for each arm whose losses differ from those of `reference` by more than
    `LOSS_TOLERANCE`, relative, step by step.

    A note, not an error at that step: what was measured stays, and whether later steps agree again
    tells a slip from wrong updates.
    """
    return [
        f"arm {name} does NOT compute the same: its loss differs from {reference}'s by more than "
        f"{LOSS_TOLERANCE:g} of it at "
        f"{len(beyond)} of the first {len(found)} steps, first at step {beyond[0]} by "
        f"{found[beyond[0]]:.1e}, at most by "
        f"{max(found):.1e}"
        for name, found in differences.items()
        if (
            beyond := [step for step, difference in enumerate(found) if difference > LOSS_TOLERANCE]
        )
    ]


def _available(names: Sequence[str], on_cuda: bool) -> tuple[list[str], list[str]]:
    """The arms that can run here, and a sentence on those that can't."""
    left, notes = list(names), []
    if not on_cuda:
        notes.append(
            "no CUDA device: arms run on the CPU, to see that they work; the numbers mean nothing"
        )
        left = [name for name in left if name in ("fbgemm_hbm", "torch_cpu")]
    of_fbgemm = [name for name in left if name in FBGEMM_ARMS]
    try:
        import fbgemm_gpu  # noqa: F401
    except ImportError as error:
        left = [name for name in left if name not in of_fbgemm]
        if of_fbgemm:
            notes.append(
                f"left out {', '.join(of_fbgemm)}: {error}; pip install fbgemm-gpu (without a GPU "
                "fbgemm-gpu-cpu), of the version "
                "that belongs to this torch"
            )
    return left, notes


@dataclass(kw_only=True)
class _Run:
    """An arm and what was seen of it."""

    arm: GpuArm
    parameters: list[Tensor]  # its dense part's
    device_bytes: int
    losses: list[float]
    turns_s: list[float] = field(default_factory=list)  # a step's mean over each turn
    kernels_ms: dict[str, float] = field(default_factory=dict)


class _Bench:
    """One workload on one device."""

    def __init__(
        self,
        workload: Workload,
        names: Sequence[str],
        device: torch.device,
        folder: Path,
        progress: Progress,
    ) -> None:
        self._workload, self._names, self._device, self._progress = (
            workload,
            names,
            device,
            progress,
        )
        self._group: Group = workload.group
        self._folder = folder
        self._reference: list[float] = []  # Bagpipe's first losses
        self.failures: dict[str, str] = {}
        """Arms that failed, and with what."""
        num_turns = max(1, len(names)) * workload.rounds
        self._stream: Stream = make_stream(
            workload,
            folder / "data",
            # The window must not run out of batches while it is measured, or there would be less to
            # plan.
            num_batches=workload.warmup_steps
            + (num_turns + 1) * workload.turn_and_settle_steps
            + workload.lookahead
            + 2,
            num_resident=workload.warmup_steps
            + workload.rounds * workload.turn_and_settle_steps
            + 2,
            device=device,
            progress=progress,
        )
        self._dense = SharedDense(workload, device)
        self._initial = self._dense.save()

    def run(self) -> dict[str, Any]:
        """All arms, and what they add up to."""
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
            return self._values(runs, counted, bandwidths, bagpipe.lookahead.oracle_bytes)

    def _measure_beside(
        self, always: Mapping[str, _Run], names: Sequence[str], num_done: int, num_turns: int
    ) -> dict[str, _Run]:
        """Turns of the arms that always run and of those of `names`; one of these that fails is
        left out and noted.
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
        """What one arm can't do, say for want of memory, must not cost the others their numbers."""
        try:
            yield
        except Exception as error:
            self.failures[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"

    def _make(self, name: str) -> GpuArm:
        match name:
            case "bagpipe":
                source = PreparedSource(self._stream.folder, "train", verify=False)
                in_file = self._workload.store == "file"
                return BagpipeArm(
                    self._workload,
                    self._group,
                    all_batches(source, self._workload.batch_size, self._stream.num_batches),
                    device=self._device,
                    store=(lambda group, seed: FileStore(group, seed, self._folder / "store"))
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

    def _start(self, name: str, stack: ExitStack) -> _Run:
        """Makes an arm, which `stack` closes, gives it the initial rows, and trains its first
        steps.
        """
        before = self._allocated()
        arm = self._make(name)
        stack.callback(arm.close)
        for rows, records in self._initial_rows(
            self._stream.touched_rows if name == "bagpipe" else self._stream.resident_rows
        ):
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

    def _initial_rows(self, rows: Int64Array) -> Iterator[tuple[Int64Array, Float32Array]]:
        """What every arm starts from: `rows` and their records (n, record_width), in blocks."""
        store = MemoryStore(self._group, 0)
        for begin in range(0, len(rows), _LOAD_ROWS):
            block = rows[begin : begin + _LOAD_ROWS]
            records = np.empty((len(block), self._group.record_width), np.float32)
            store.fetch(block, records)
            yield block, records
        store.close()

    def _step(self, arm: GpuArm) -> Tensor:
        dense, labels = arm.next_batch()
        arm.lookup(self._dense.pooled)
        loss, grads = self._dense.step(dense, labels)
        arm.update(grads[0])
        return loss

    def _turn(self, run: _Run) -> None:
        """Some steps of an arm, and how long one took."""
        workload = self._workload
        is_slow = isinstance(run.arm, TorchCpuArm)
        self._dense.load(run.parameters)
        for _ in range(1 if is_slow else workload.settle_steps):
            self._step(run.arm)
        num_steps = workload.slow_steps if is_slow else workload.turn_steps
        seconds = self._time(lambda: self._step(run.arm), num_steps)
        run.turns_s.append(seconds)
        run.parameters = self._dense.save()

    def _time_kernels(self, run: _Run) -> None:
        """The embedding work alone on one batch, again and again."""
        run.arm.next_batch()
        run.arm.lookup(self._dense.pooled)
        grads = torch.randn_like(self._dense.pooled) * 1e-6
        for name, kernel in run.arm.kernels(self._dense.pooled, grads).items():
            kernel()
            if self._device.type == "cuda":
                torch.cuda._sleep(_HEAD_START_CYCLES)  # type: ignore[no-untyped-call]
            run.kernels_ms[name] = 1e3 * self._time(kernel, _KERNEL_REPEATS)

    def _time_idle(self, run: _Run) -> float:
        """Milliseconds between a step's update and the next one's lookup in which the device waits
        for rows or for the host.

        One more turn. What lies between them is that wait and the lookup, whose time alone is
        known.
        """
        if self._device.type == "cpu":
            return 0.0
        self._dense.load(run.parameters)
        updated, looked_up = list[torch.cuda.Event](), list[torch.cuda.Event]()
        for step in range(self._workload.turn_and_settle_steps):
            dense, labels = run.arm.next_batch()
            run.arm.lookup(self._dense.pooled)
            if updated:
                looked_up.append(_event())
            run.arm.update(self._dense.step(dense, labels)[1][0])
            if step >= self._workload.settle_steps:
                updated.append(_event())
        torch.cuda.synchronize(self._device)
        between = [begin.elapsed_time(end) for begin, end in zip(updated, looked_up, strict=False)]
        return max(0.0, float(sum(between)) / len(between) - run.kernels_ms["lookup"])

    def _time(self, function: Callable[[], object], num_calls: int) -> float:
        """Seconds a call, by the device's clock; the device may still be at earlier work when the
        calls begin.
        """
        if self._device.type == "cpu":
            started = time.perf_counter()
            for _ in range(num_calls):
                function()
            return (time.perf_counter() - started) / num_calls
        begin = _event()
        for _ in range(num_calls):
            function()
        end = _event()
        torch.cuda.synchronize(self._device)
        return float(begin.elapsed_time(end)) / 1e3 / num_calls

    def _allocated(self) -> int:
        if self._device.type == "cpu":
            return 0
        torch.cuda.reset_peak_memory_stats(self._device)
        return torch.cuda.memory_allocated(self._device)

    def _peak(self) -> int:
        return 0 if self._device.type == "cpu" else torch.cuda.max_memory_allocated(self._device)

    def _forget(self) -> None:
        """Gives memory back to the system, since the next arm allocates beside torch."""
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


def _event() -> torch.cuda.Event:
    """Recorded on the current stream, with its time."""
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def relative_differences(losses: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Relative differences step by step; of one that is not finite, infinite."""
    found = [abs(one - other) / abs(other) for one, other in zip(losses, reference, strict=True)]
    return [difference if difference < float("inf") else float("inf") for difference in found]
