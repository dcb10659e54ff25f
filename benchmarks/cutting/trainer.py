"""The trainer's process of `cutting`: trains with cuts, and prints what they took.

The device's part of a step is that of `benchmarks.remote.trainer`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bagpipe.checkpoint.checkpoints import State, read_checkpoint
from bagpipe.checkpoint.epochs import claim_epoch
from bagpipe.data.base import Batch, Position
from bagpipe.distributed.trainers import Trainers
from bagpipe.embeddings.batches import Lookahead
from bagpipe.embeddings.collection import EmbeddingBagCollection
from bagpipe.errors import CheckpointError
from bagpipe.models import DLRM
from bagpipe.native.files import make_folder
from bagpipe.oracle.dedup import dedup
from bagpipe.train.cuts import Cuts
from bagpipe.types import Group
from benchmarks.cutting.settings import SETTLING_STEPS, Cut, CuttingBench, Found
from benchmarks.measure import silent
from benchmarks.network.server import EPOCH, SEED
from benchmarks.remote.settings import ArmSettings, End
from benchmarks.remote.trainer import Device, joined, most_uniques_of, stream_of
from benchmarks.streams import make_batches
from benchmarks.workloads import NUM_DENSE


def main() -> None:
    """Runs what its argument tells."""
    end = End.told(sys.argv[1])
    sys.stdout.write(json.dumps(asdict(measure_cuts(end))) + "\n")


def measure_cuts(end: End) -> Found:
    """Trains with cuts; before each, flushes the same cache within this process."""
    bench = CuttingBench.of(end.bench)
    group = end.bench.group
    batches = make_batches(
        group,
        num_batches=end.bench.num_batches,
        batch_size=end.bench.batch_size,
        skew=end.bench.skew,
        progress=silent,
    )
    planned = end.bench.settings_of("bagpipe", group.num_rows, most_uniques_of(group, batches))
    with ExitStack() as stack:
        in_process = _InProcess(bench, batches, planned, stack)
        return _train_with_cuts(bench, end, batches, planned, in_process)


@dataclass(kw_only=True)
class _Run:
    """A run with cuts, step by step."""

    bench: CuttingBench
    device: Device
    stream: Lookahead[Batch]
    step_s: list[float] = field(default_factory=list)
    """Seconds of each step, without cuts."""
    began_s: list[float] = field(default_factory=list)
    """When each began."""

    def steps(self, num_steps: int) -> None:
        """Trains so many."""
        for _ in range(num_steps):
            began = time.perf_counter()
            batch = next(self.stream)
            self.device.step(batch, self.bench.device_ms / 1e3)
            self.began_s.append(began)
            self.step_s.append(time.perf_counter() - began)

    def cut(self, cuts: Cuts, state: State) -> dict[str, Any]:
        """Takes a cut; returns when, and what training waited for."""
        began = time.perf_counter()
        self.stream.flush()
        flushed = time.perf_counter()
        cuts.begin(state, Position(epoch=0, batch=0), {})
        taken = time.perf_counter()
        return {
            "began_s": began,
            "flush_s": flushed - began,
            "take_s": taken - flushed,
            "rows_flushed": self.stream.report.peak_slots,
            "last_step": self.device.embeddings.step,
        }


def _train_with_cuts(
    bench: CuttingBench,
    end: End,
    batches: Sequence[Batch],
    planned: ArmSettings,
    in_process: _InProcess,
) -> Found:
    folder = Path(end.folder)
    make_folder(folder / "checkpoints")
    run_folder = claim_epoch(folder)
    assert run_folder.epoch == EPOCH
    with joined(end) as (control, embeddings):
        control.epoch = EPOCH
        dim = bench.remote.embedding_dim
        model = DLRM(embeddings, NUM_DENSE, bottom=(*bench.bottom, dim), top=bench.top)
        optimizer = torch.optim.Adagrad(model.parameters())
        state = State(model=model, optimizer=optimizer, embeddings=embeddings)
        cuts = Cuts(run_folder, control, None, keep=bench.num_cuts + 1, trainers=Trainers())
        with stream_of(embeddings, batches, planned) as stream:
            run = _Run(
                bench=bench,
                device=Device(bench.remote, embeddings),
                stream=stream,
            )
            run.steps(planned.warmup_steps)
            run.step_s.clear()
            run.began_s.clear()
            taken, in_process_s = [], []
            for _ in range(bench.num_cuts):
                run.steps(bench.steps_between)
                cuts.finish()
                in_process_s.append(in_process.flush_s())
                taken.append(run.cut(cuts, state))
            run.steps(bench.steps_between)
        cuts.finish()
        written = cuts.ended()
    failed = [each for each in written if each.error is not None]
    if failed:
        raise CheckpointError(f"a cut failed: {failed[0].error}")
    base_ms, num_base = _undisturbed(run, taken, [each.elapsed_s for each in written])
    found: list[Cut] = []
    last_steps = [0, *(cut["last_step"] for cut in taken)]
    for number, (cut, ended) in enumerate(zip(taken, written, strict=True)):
        files = [file for files in read_checkpoint(ended.path).record_files for file in files]
        excess_s = _excess(run, cut["began_s"], ended.elapsed_s, base_ms / 1e3)
        found.append(
            Cut(
                flush_s=cut["flush_s"],
                take_s=cut["take_s"],
                rows_flushed=cut["rows_flushed"],
                rows_used=_num_used(batches, end.bench.group, *last_steps[number : number + 2]),
                written_s=ended.elapsed_s,
                slower_s=excess_s,
                file_bytes=files[-1].size_bytes,
                num_records=files[-1].num_records or 0,
            )
        )
    return Found(step_ms=base_ms, num_base=num_base, cuts=found, in_process_s=in_process_s)


def _num_used(batches: Sequence[Batch], group: Group, first_step: int, end_step: int) -> int:
    """How many rows these steps use, each counted once."""
    is_used = np.zeros(group.num_rows, np.bool_)
    for step in range(first_step, end_step):
        batch = batches[step % len(batches)]
        is_used[dedup(group, batch.sparse).unique_rows] = True
    return int(np.count_nonzero(is_used))


def _within(run: _Run, began_s: float, elapsed_s: float) -> list[int]:
    """Which steps a cut may have slowed: those up to its end, and some behind it."""
    behind = [index for index, moment in enumerate(run.began_s) if moment >= began_s]
    num_beside = sum(run.began_s[index] < began_s + elapsed_s for index in behind)
    return behind[: num_beside + SETTLING_STEPS]


def _undisturbed(
    run: _Run, taken: Sequence[dict[str, Any]], written_s: Sequence[float]
) -> tuple[float, int]:
    """The mean ms of the steps that no cut can have slowed, and how many they are."""
    slowed = {
        index
        for cut, elapsed_s in zip(taken, written_s, strict=True)
        for index in _within(run, cut["began_s"], elapsed_s)
    }
    others = [seconds for index, seconds in enumerate(run.step_s) if index not in slowed]
    return 1e3 * float(np.mean(others)), len(others)


def _excess(run: _Run, began_s: float, elapsed_s: float, base_s: float) -> float:
    """By how many seconds the steps that a cut may have slowed took longer than others."""
    return sum(run.step_s[index] - base_s for index in _within(run, began_s, elapsed_s))


class _InProcess:
    """The same cache over a store of this process, whose flushes show what memory gives."""

    def __init__(
        self, bench: CuttingBench, batches: Sequence[Batch], planned: ArmSettings, stack: ExitStack
    ) -> None:
        group = bench.remote.group
        embeddings = EmbeddingBagCollection(group.tables, optimizer=group.optimizer, seed=SEED)
        stack.callback(embeddings.close)
        self._device = Device(bench.remote, embeddings)
        self._stream = stack.enter_context(stream_of(embeddings, batches, planned))
        self._steps(planned.warmup_steps)

    def flush_s(self) -> float:
        """Seconds of a flush, some steps behind the one before."""
        self._steps(SETTLING_STEPS)
        began = time.perf_counter()
        self._stream.flush()
        return time.perf_counter() - began

    def _steps(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self._device.step(next(self._stream), 0.0)


if __name__ == "__main__":
    main()
