"""One rank of `trainers`: its arms, their turns, and what it sees.

All ranks do the same in the same order, and meet before each turn. A step is timed from the end of
the one before to its own end, so that nothing falls between two steps: by the host's clock on a
CPU, by events on CUDA.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from bagpipe.data.prepared import PreparedSource
from bagpipe.distributed.communicator import Communicator
from bagpipe.jagged import share_of
from bagpipe.native.spans import named_by
from bagpipe.train.schedule import RemainingBatches
from benchmarks.clocks import clock_of
from benchmarks.dense import SharedDense
from benchmarks.driver_calls import driver_calls_a_step
from benchmarks.measure import Progress
from benchmarks.prepared_stream import all_batches
from benchmarks.streams import initial_records
from benchmarks.trainers.arms import (
    BagpipeShareArm,
    CountingCommunicator,
    DenseShareArm,
    Share,
    TrainersArm,
)
from benchmarks.trainers.peers import (
    HashedArm,
    ReplicatedArm,
    ReplicatedBatch,
    replicated_batch,
    ring_bytes,
)
from benchmarks.trainers.settings import ALONE, BY_NCCL, UNAVERAGED, WITHOUT_ROWS, TrainersBench
from benchmarks.trainers.stages import Stages
from benchmarks.trainers.torchrec import TORCHREC_ARMS, TorchRecArm

_TIMEOUT = timedelta(minutes=10)
_NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
"""NVLink multicast can put the GPUs of a host, which others may share, out of service."""


@dataclass(kw_only=True)
class _Run:
    """An arm and what was seen of it."""

    arm: TrainersArm
    dense: SharedDense
    parameters: list[Tensor]
    losses: list[Tensor] = field(default_factory=list)
    turns: list[list[float]] = field(default_factory=list)  # seconds of each measured step


def run_rank(
    bench: TrainersBench, rank: int, port: int, folder: Path, progress: Progress
) -> list[dict[str, Any]] | None:
    """Meets the other ranks at a key-value store and runs all arms.

    Args:
        bench: the workload, its trainers and arms.
        rank: this one.
        port: of the key-value store on this host.
        folder: where the stream's files are.
        progress: is told how far this rank is.

    Returns:
        On rank 0 what each rank saw, by rank; None on the others.
    """
    device = (
        torch.device(bench.device, rank) if bench.device == "cuda" else torch.device(bench.device)
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
        os.environ |= _NO_MULTICAST
        if bench.num_devices == 1:
            claim_own_host(rank)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // bench.num_trainers))
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=_TIMEOUT)  # type: ignore[attr-defined]
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=bench.num_trainers, timeout=_TIMEOUT
    )
    try:
        with ExitStack() as stack:
            seen = _Rank(bench, rank, device, folder, progress, stack).run()
        every = [None] * bench.num_trainers if rank == 0 else None
        dist.gather_object(seen, every)
        return every  # type: ignore[return-value]
    finally:
        dist.destroy_process_group()


def claim_own_host(rank: int) -> None:
    """Makes NCCL take this rank for a host of its own; call it before NCCL starts.

    NCCL lets ranks share a device only if they seem to be on different hosts. They talk by sockets
    then.
    """
    os.environ |= {"NCCL_HOSTID": f"host-{rank}", "NCCL_NET": "Socket", "NCCL_SOCKET_IFNAME": "lo"}


class _Rank:
    """All arms on one rank; `stack` closes them."""

    def __init__(
        self,
        bench: TrainersBench,
        rank: int,
        device: torch.device,
        folder: Path,
        progress: Progress,
        stack: ExitStack,
    ) -> None:
        self._bench, self._rank, self._device = bench, rank, device
        self._progress, self._stack = progress, stack
        self._workload, self._group = bench.workload, bench.workload.group
        self._source = PreparedSource(folder / "data", "train", verify=False)
        self._touched = np.load(folder / "touched.npy")
        self._shares, self._replicated = self._read()
        self._notes: list[str] = []
        has_others = bench.num_trainers > 1
        self._dense = self._make_dense(
            Communicator.from_default_group(timeout=_TIMEOUT) if has_others else None
        )
        self._runs: dict[str, _Run] = {}

    def run(self) -> dict[str, Any]:
        """Starts all arms, then lets them take turns."""
        workload, names = self._workload, list(self._bench.arms)
        for name in names:
            self._start(name)
        for number, name in enumerate(names):
            self._meet()
            if name in self._runs:
                self._steps(self._runs[name], workload.warmup_steps)
            self._progress("warming up", number + 1, len(names))
        before = {
            name: run.arm.counters()
            for name, run in self._runs.items()
            if isinstance(run.arm, BagpipeShareArm)
        }
        for turn in range(workload.rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                self._turn(name)
            self._progress("measuring", turn + 1, workload.rounds)
        self._meet()
        arms = {name: self._seen(run, before.get(name)) for name, run in self._runs.items()}
        return {
            "notes": self._notes,
            "arms": arms,
            "parts": self._time_parts(self._runs["bagpipe"]),
            "driver_calls": self._count_driver_calls(self._runs["bagpipe"]),
            "dense_bytes": ring_bytes(4 * self._dense.num_parameters, self._bench.num_trainers),
        }

    def _read(self) -> tuple[list[Share], list[ReplicatedBatch]]:
        """Reads the rank's share of every batch, and makes the schedules of `replicated`."""
        num_trainers, num_steps = self._bench.num_trainers, self._bench.num_steps
        shares, replicated = [], []
        batches = self._source.batches(batch_size=self._workload.batch_size * num_trainers)
        for step, batch in zip(range(num_steps), batches, strict=False):
            shares.append(Share.of(batch, self._rank, num_trainers, self._device))
            if "replicated" in self._bench.arms:
                every = [share_of(batch.sparse, rank, num_trainers) for rank in range(num_trainers)]
                replicated.append(
                    replicated_batch(self._group, every, self._rank, self._device, step=step)
                )
            self._progress("reading batches", step + 1, num_steps)
        return shares, replicated

    def _start(self, name: str) -> None:
        """Makes an arm, gives it the initial rows, and waits until all ranks have.

        `one_trainer` is on rank 0 alone; the others only wait.
        """
        if name != ALONE or self._rank == 0:
            arm = self._make(name)
            self._stack.callback(arm.close)
            for rows, records in initial_records(self._group, self._touched):
                arm.load(rows, records)
        self._meet()
        if name != ALONE or self._rank == 0:
            arm.start()
            dense = self._make_dense(None) if name in (ALONE, UNAVERAGED) else self._dense
            self._runs[name] = _Run(arm=arm, dense=dense, parameters=self._dense.save())

    def _make(self, name: str) -> TrainersArm:
        if name in WITHOUT_ROWS:
            return DenseShareArm(name, self._shares)
        if name == ALONE or (name == "bagpipe" and self._bench.num_trainers == 1):
            return self._alone(name)
        if name in TORCHREC_ARMS:
            return TorchRecArm(
                name,
                self._workload,
                self._group,
                self._shares,
                self._device,
                self._bench.num_devices,
            )
        # Each arm has its own: its background messages must not meet another's.
        base = Communicator.from_default_group(timeout=_TIMEOUT)
        match name:
            case "replicated":
                return ReplicatedArm(
                    self._group, self._shares, self._replicated, base, self._device
                )
            case "hashed":
                return HashedArm(self._group, self._shares, base, self._device)
        communicator = CountingCommunicator.of(base, name)
        communicator.by_peer_memory = name != BY_NCCL
        return BagpipeShareArm(
            name,
            self._workload,
            self._group,
            self._stream(self._workload.batch_size * self._bench.num_trainers),
            device=self._device,
            communicator=communicator,
            overlap=name != "no_overlap",
        )

    def _alone(self, name: str) -> BagpipeShareArm:
        """Bagpipe without other trainers, which plans where `bagpipe train` would."""
        workload = self._workload
        if self._bench.graph:
            workload = replace(workload, oracle=workload.oracle or "device")
        batches = self._stream(workload.batch_size)
        return BagpipeShareArm(name, workload, self._group, batches, device=self._device)

    def _make_dense(self, communicator: Communicator | None) -> SharedDense:
        """The dense part, averaged over the communicator's ranks."""
        return SharedDense(
            self._workload,
            self._device,
            graph=self._bench.graph,
            communicator=communicator,
            say=self._notes.append,
        )

    def _stream(self, batch_size: int) -> RemainingBatches:
        """Reads as many batches of `batch_size` as there are global ones."""
        return all_batches(self._source, batch_size, self._bench.num_batches)

    def _meet(self) -> None:
        """Waits for the device, for all ranks, and a while for this rank's background threads."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        time.sleep(self._bench.pause_s)
        dist.all_reduce(torch.zeros(1))  # not a barrier: with two backends it would use the GPU's

    def _turn(self, name: str) -> None:
        """Trains a turn of an arm; the steps after the first few are measured."""
        self._meet()
        run = self._runs.get(name)
        if run is None:
            return
        self._steps(run, self._workload.settle_steps)
        run.turns.append(self._steps(run, self._workload.turn_steps))

    def _steps(self, run: _Run, num_steps: int) -> list[float]:
        """Trains `num_steps` and returns the seconds that each took."""
        run.dense.load(run.parameters)
        clock = clock_of(self._device)
        for _ in range(num_steps):
            run.losses.append(self._step(run))
            clock.tick()
        run.parameters = run.dense.save()
        return clock.seconds()

    def _step(self, run: _Run) -> Tensor:
        """Makes one step, in one graph where it can be; returns its loss."""
        dense, labels = run.arm.next_batch()
        can_replay = run.dense.step.can_replay(self._workload.batch_size)
        rows = average = None
        if isinstance(run.arm, BagpipeShareArm):
            rows, average = run.arm.rows() if can_replay else None, run.arm.dense_average
        if rows is None:
            run.arm.lookup(run.dense.pooled)
        update = run.arm.update
        return run.dense.step(
            dense, labels, rows=rows, update=lambda grads: update(grads[0]), average=average
        )[0]

    def _time_parts(self, run: _Run) -> dict[str, float]:
        """Times Bagpipe's stages and waits in one more turn: milliseconds of a step."""
        assert isinstance(run.arm, BagpipeShareArm)
        workload, stages = self._workload, Stages(self._device)
        self._steps(run, workload.settle_steps)
        before = run.arm.counters()
        with named_by(stages):
            steps_s = self._steps(run, workload.turn_steps)
        counted = run.arm.counters_since(before)
        waits = {name: ms for name, ms in counted.items() if name.endswith("_wait_ms")}
        return {"step": 1e3 * float(np.mean(steps_s))} | stages.ms_a_step(len(steps_s)) | waits

    def _count_driver_calls(self, run: _Run) -> dict[str, float]:
        """Bagpipe's, of this rank's trainer in a step, by name; takes one more turn."""
        self._steps(run, self._workload.settle_steps)
        self._meet()
        return driver_calls_a_step(self._device, lambda: self._step(run), self._workload.turn_steps)

    def _seen(self, run: _Run, before: dict[str, float] | None) -> dict[str, Any]:
        """What this rank saw of an arm.

        Of bytes sent the last step is not counted: part of its gradients would travel with a step
        that never comes.
        """
        first, end = self._workload.warmup_steps, self._bench.num_steps - 1
        sent = run.arm.sent.of_steps(first, end)
        seen: dict[str, Any] = {
            "turns_s": run.turns,
            "losses": [float(loss) for loss in run.losses],
            "sent_bytes": {moment: num_bytes / (end - first) for moment, num_bytes in sent.items()},
        }
        if isinstance(run.arm, BagpipeShareArm) and before is not None:
            seen["counters"] = run.arm.counters_since(before)
        return seen
