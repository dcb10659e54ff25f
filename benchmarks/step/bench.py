"""A whole training step on a CPU, and its embedding part alone, against whole tables in memory.

Tables are Criteo-Kaggle's, cut so that all arms (`benchmarks.step.arms`) fit memory together. Every
arm starts from the same rows and the same dense part (DLRM, SGD), and trains the same batches, none
of them twice. For each batch size:

1. Warm-up: every arm trains whole steps. The losses of the first ones are compared (not those of
   `torch_bags`, which has another optimizer). The cache should be full afterwards, and the result
   says whether it is.
2. Rounds of whole steps, arm after arm: A B C D A B C D ... A step is timed from asking for the
   batch to the end of its optimizers, so that waiting for plans, rows and slots counts.
3. Rounds of the embedding part alone: ask for the batch, look up, and send a fixed gradient
   backward.

Bagpipe's background threads work ahead, by no more plans than fit their queues. A pause before
another arm's turn lets them finish these, so that they disturb no other arm. The queues are full
again when Bagpipe's next turn starts; within a round everything that planning costs is paid on the
same cores as the step itself. `cpu ms` counts all threads of the process.

The floor is the least that the embedding part must move, over the copy bandwidth measured here with
all cores. Lookup reads each unique row once and writes the pooled output; backward reads its
gradient, and reads and writes the record of each unique row. A cache also moves each fetched and
written-back record twice (store, staging, slots), and each move is a read and a write.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bagpipe.models import DLRM
from bagpipe.train.torch_batch import TorchBatch
from bagpipe.types import Group
from benchmarks.measure import Progress, Result, Timing, relative_differences
from benchmarks.step.arms import Arm, BagpipeArm, FbgemmArm, FusedArm, TorchBagsArm
from benchmarks.step.tables import render
from benchmarks.streams import SKEW, initial_records, kaggle_group, make_batches

ARMS = ("bagpipe", "fused", "fbgemm", "torch_bags")
ALWAYS = ("bagpipe",)
SAME_ARITHMETIC = ("bagpipe", "fused", "fbgemm")
QUICK: dict[str, Any] = {
    "batch_sizes": (32,),
    "max_rows": 300,
    "embedding_dim": 8,
    "cache_share": 0.5,
    "lookahead": 3,
    "num_rounds": 2,
    "round_samples": 160,
    "warmup_samples": 320,
    "pause_s": 0.0,
    "bottom": (16, 8),
    "top": (16, 1),
}
_DENSE_LR = 0.01
_GRADIENT_SCALE = 1e-5


@dataclass(frozen=True, kw_only=True)
class StepBench:
    """Sizes of the benchmark."""

    batch_sizes: Sequence[int] = (2_048, 16_384)
    max_rows: int | None = 2_200_000
    embedding_dim: int = 64
    skew: float = SKEW
    cache_share: float = 0.02
    lookahead: int = 50
    num_rounds: int = 6
    round_samples: int = 40_960
    """Samples that an arm trains in one turn, but never less than 5 steps."""
    warmup_samples: int = 163_840
    """Samples that every arm trains before measuring, but never less than 10 steps."""
    pause_s: float = 0.25
    """A pause before each turn, in which the background threads of the arm before come to rest."""
    num_compared: int = 5
    """First steps whose losses are compared."""
    arms: Sequence[str] = ARMS
    """Some of `ARMS`, with `bagpipe`."""
    bottom: Sequence[int] = (512, 256, 64)
    top: Sequence[int] = (512, 512, 256, 1)

    def round_steps(self, batch_size: int) -> int:
        """Steps that an arm makes in one turn."""
        return max(5, self.round_samples // batch_size)

    def warmup_steps(self, batch_size: int) -> int:
        """Steps before measuring."""
        return max(10, self.warmup_samples // batch_size)

    def num_batches(self, batch_size: int) -> int:
        """Batches needed, none of which is used twice: trained ones, and a full window beyond."""
        return (
            self.warmup_steps(batch_size)
            + 2 * self.num_rounds * self.round_steps(batch_size)
            + self.lookahead
            + 8
        )


@dataclass(kw_only=True)
class _Runner:
    """One arm under measurement."""

    arm: Arm
    model: DLRM
    optimizer: torch.optim.Optimizer
    batches: Iterator[tuple[TorchBatch, Any]]
    gradient: Tensor  # (B, F * D)
    times: dict[str, list[float]] = field(
        default_factory=lambda: {"step": [], "lookup": [], "update": [], "embedding": []}
    )
    cpu_s: dict[str, float] = field(default_factory=lambda: {"step": 0.0, "embedding": 0.0})

    def step(self) -> float:
        """Trains a whole step; returns the loss."""
        started, cpu_started = time.perf_counter(), time.process_time()
        batch, sparse = next(self.batches)
        loss: Tensor = nn.functional.binary_cross_entropy_with_logits(
            self.model(batch.dense, sparse), batch.labels
        )
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.arm.finish_step()
        self._note(started, cpu_started, "step")
        return float(loss.detach())

    def embedding_step(self) -> None:
        """Does the embedding part of a step alone."""
        started, cpu_started = time.perf_counter(), time.process_time()
        _, sparse = next(self.batches)
        pooled = self.arm.embeddings(sparse).values()
        looked_up = time.perf_counter()
        pooled.backward(self.gradient)
        self.arm.finish_step()
        self.times["lookup"].append(looked_up - started)
        self.times["update"].append(time.perf_counter() - looked_up)
        self._note(started, cpu_started, "embedding")

    def forget_times(self) -> None:
        """Drops what was measured so far."""
        for times in self.times.values():
            times.clear()
        self.cpu_s = dict.fromkeys(self.cpu_s, 0.0)

    def _note(self, started: float, cpu_started: float, what: str) -> None:
        self.times[what].append(time.perf_counter() - started)
        self.cpu_s[what] += time.process_time() - cpu_started


def bench_step(sizes: StepBench, progress: Progress) -> Result:
    """Runs every batch size, one after the other, each from the initial rows."""
    group = kaggle_group(max_rows=sizes.max_rows, embedding_dim=sizes.embedding_dim)
    bandwidth = copy_bandwidth()
    by_batch = {
        size: _bench_batch_size(sizes, group, size, bandwidth, progress)
        for size in sizes.batch_sizes
    }
    values: dict[str, Any] = {
        "sizes": asdict(sizes),
        "num_rows": group.num_rows,
        "cache_rows": int(sizes.cache_share * group.num_rows),
        "threads": torch.get_num_threads(),
        "copy_bytes_per_s": bandwidth,
        "by_batch_size": by_batch,
    }
    notes = [
        "every arm ran in this process, with one THP_MEM_ALLOC_ENABLE for all (the command sets it "
        "to 1 unless it is given)"
    ]
    if any("fbgemm" in result["missing"] for result in by_batch.values()):
        notes.append(
            "fbgemm-gpu-cpu is not installed, its arm is left out: pip install --no-deps "
            "fbgemm-gpu-cpu"
        )
    return Result(name="step", tables=render(values), values=values, notes=tuple(notes))


def copy_bandwidth(num_bytes: int = 1 << 28) -> float:
    """Bytes a second that a copy of `num_bytes` reads and writes, the best of five.

    It runs on all of torch's threads.
    """
    source, target = torch.ones(num_bytes // 4), torch.zeros(num_bytes // 4)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - started)
    return 2 * num_bytes / min(times)


def _bench_batch_size(
    sizes: StepBench, group: Group, batch_size: int, bandwidth: float, progress: Progress
) -> dict[str, Any]:
    num_batches = sizes.num_batches(batch_size)
    made = make_batches(
        group, num_batches=num_batches, batch_size=batch_size, skew=sizes.skew, progress=progress
    )
    batches = [TorchBatch.of(batch) for batch in made]
    arms, missing = _make_arms(sizes, group)
    try:
        _load(group, arms, progress)
        runners = {arm.name: _make_runner(sizes, group, arm, batches) for arm in arms}
        losses = _warm_up(sizes, runners, batch_size, progress)
        counted = _measure(sizes, runners, batch_size, progress)
    finally:
        for arm in arms:
            arm.close()
    return {
        "missing": missing,
        "loss_differences": _loss_differences(losses, sizes.num_compared),
        "arms": {name: _summary(runner) for name, runner in runners.items()},
        "ratios": _ratios(runners),
        "bagpipe": counted,
        "floor": _floors(group, batch_size, counted, bandwidth),
    }


def _make_arms(sizes: StepBench, group: Group) -> tuple[list[Arm], list[str]]:
    """The arms that can run here, and the names of the others."""
    makers: dict[str, Callable[[], Arm]] = {
        "bagpipe": lambda: BagpipeArm(
            group, cache_rows=int(sizes.cache_share * group.num_rows), lookahead=sizes.lookahead
        ),
        "fused": lambda: FusedArm(group),
        "fbgemm": lambda: FbgemmArm(group),
        "torch_bags": lambda: TorchBagsArm(group),
    }
    arms, missing = [], []
    for name in sizes.arms:
        try:
            arms.append(makers[name]())
        except ImportError:
            missing.append(name)
    return arms, missing


def _load(group: Group, arms: Sequence[Arm], progress: Progress) -> None:
    """Gives all arms the rows with which Bagpipe's store starts, block by block."""
    for rows, records in initial_records(group, np.arange(group.num_rows)):
        for arm in arms:
            arm.load(int(rows[0]), records)
        progress("loading tables", int(rows[-1]) + 1, group.num_rows)


def _make_runner(
    sizes: StepBench, group: Group, arm: Arm, batches: Sequence[TorchBatch]
) -> _Runner:
    torch.manual_seed(0)
    model = DLRM(arm.embeddings, batches[0].dense.shape[1], bottom=sizes.bottom, top=sizes.top)
    dense = [
        parameter for part in (model.dense_arch, model.over_arch) for parameter in part.parameters()
    ]
    shape = (batches[0].batch_size, len(group.features) * group.embedding_dim)
    return _Runner(
        arm=arm,
        model=model,
        optimizer=torch.optim.SGD(dense, lr=_DENSE_LR),
        batches=arm.batches(batches),
        gradient=torch.randn(shape, generator=torch.Generator().manual_seed(1)) * _GRADIENT_SCALE,
    )


def _warm_up(
    sizes: StepBench, runners: Mapping[str, _Runner], batch_size: int, progress: Progress
) -> dict[str, list[float]]:
    """Trains the first steps of each arm; returns their losses by arm."""
    num_steps = sizes.warmup_steps(batch_size)
    losses: dict[str, list[float]] = {name: [] for name in runners}
    for number, (name, runner) in enumerate(runners.items()):
        for step in range(num_steps):
            losses[name].append(runner.step())
            progress(
                f"warming up, batch {batch_size:,}",
                number * num_steps + step + 1,
                len(runners) * num_steps,
            )
        runner.forget_times()
    return losses


def _measure(
    sizes: StepBench, runners: Mapping[str, _Runner], batch_size: int, progress: Progress
) -> dict[str, Any]:
    """Measures whole steps, then the embedding part, in rounds.

    Returns:
        What Bagpipe's oracle decided meanwhile and the loop waited for, a step.
    """
    bagpipe = runners["bagpipe"].arm
    assert isinstance(bagpipe, BagpipeArm)
    before = _counters(bagpipe)
    for what in ("step", "embedding"):
        for turn in range(sizes.num_rounds):
            for runner in runners.values():
                time.sleep(sizes.pause_s)
                for _ in range(sizes.round_steps(batch_size)):
                    runner.step() if what == "step" else runner.embedding_step()
            progress(f"measuring {what}s, batch {batch_size:,}", turn + 1, sizes.num_rounds)
    after = _counters(bagpipe)
    num_steps = after["num_steps"] - before["num_steps"]
    per_step = {
        name: (after[name] - before[name]) / num_steps for name in after if name != "num_steps"
    }
    return per_step | {
        "cache_was_full": bagpipe.stream.report.peak_slots
        == int(sizes.cache_share * bagpipe.embeddings.groups[0].num_rows),
        "hit_rate": 1.0 - per_step["num_fetched"] / per_step["num_uniques"],
        "mean_lookahead": bagpipe.stream.report.mean_lookahead,
    }


def _counters(arm: BagpipeArm) -> dict[str, float]:
    report, waits = arm.stream.report, arm.stream.waits
    names = (
        "num_steps",
        "num_uniques",
        "num_fetched",
        "num_fetched_urgent",
        "num_written_back",
        "num_waiting_steps",
    )
    waited = {
        name.replace("_s", "_wait_ms"): 1e3 * seconds for name, seconds in asdict(waits).items()
    }
    return {name: float(getattr(report, name)) for name in names} | waited


def _summary(runner: _Runner) -> dict[str, Any]:
    timings: dict[str, Any] = {name: Timing.of(times) for name, times in runner.times.items()}
    return timings | {
        f"{name}_cpu_ms": 1e3 * seconds / len(runner.times[name])
        for name, seconds in runner.cpu_s.items()
    }


def _ratios(runners: Mapping[str, _Runner]) -> dict[str, float]:
    """Bagpipe's medians over those of each other arm."""
    medians = {
        name: {what: float(np.median(runner.times[what])) for what in ("step", "embedding")}
        for name, runner in runners.items()
    }
    return {
        f"{what}_over_{name}": medians["bagpipe"][what] / medians[name][what]
        for name in runners
        if name != "bagpipe"
        for what in ("step", "embedding")
    }


def _loss_differences(losses: Mapping[str, list[float]], num_compared: int) -> dict[str, float]:
    """The largest relative differences to Bagpipe's first losses, of arms of equal arithmetic."""
    return {
        f"{name} to bagpipe": max(
            relative_differences(found[:num_compared], losses["bagpipe"][:num_compared])
        )
        for name, found in losses.items()
        if name != "bagpipe" and name in SAME_ARITHMETIC
    }


def _floors(
    group: Group, batch_size: int, counted: dict[str, Any], bandwidth: float
) -> dict[str, Any]:
    """Bytes that the embedding part must move in a step, and the milliseconds that a copy takes."""
    output_bytes = 4 * batch_size * len(group.features) * group.embedding_dim
    row_bytes = 4 * counted["num_uniques"] * group.embedding_dim
    record_bytes = counted["num_uniques"] * group.record_bytes
    in_memory = row_bytes + output_bytes + output_bytes + 2 * record_bytes
    moved = 4 * (counted["num_fetched"] + counted["num_written_back"]) * group.record_bytes
    return {
        "in_memory_bytes": in_memory,
        "cached_bytes": in_memory + moved,
        "in_memory_ms": 1e3 * in_memory / bandwidth,
        "cached_ms": 1e3 * (in_memory + moved) / bandwidth,
    }
