"""Several trainers on one host: Bagpipe against other ways to share tables and against one trainer.

The command starts one process for each rank. They talk by gloo on CPUs, and by NCCL on CUDA, with a
device each or one that all share. All arms (`arms`, `peers`, and `torchrec` where TorchRec is
installed) start from the same rows and parameters. They train the same global batches with the same
dense part, whose gradients are averaged, so their losses must agree. They take turns in whole
rounds, A B C D, and each round begins with another arm.

Bagpipe reads prepared files, plans and fetches from a store while it trains. The peers have ids,
dense features and labels on their devices, and all rows there, too. A step lasts until the slowest
rank has ended it. A ratio is the mean step of an arm over that of `bagpipe` in the same round.
"""

from __future__ import annotations

import multiprocessing
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from bagpipe.errors import BackgroundError, BagpipeError
from benchmarks.measure import (
    LOSS_TOLERANCE,
    Progress,
    Result,
    Timing,
    disagreements,
    relative_differences,
)
from benchmarks.prepared_stream import make_stream
from benchmarks.trainers.planned import plan_run
from benchmarks.trainers.rank import run_rank
from benchmarks.trainers.settings import ALONE, BY_NCCL, WITHOUT_ROWS, TrainersBench
from benchmarks.trainers.tables import render
from benchmarks.trainers.torchrec import missing_torchrec

Float64Array = npt.NDArray[np.float64]
_END_TIMEOUT_S = 60.0


def bench_trainers(bench: TrainersBench, progress: Progress) -> Result:
    """Measures and shows what was found; see `run_trainers`."""
    values = run_trainers(bench, progress)
    return Result(
        name="trainers", tables=render(values), values=values, notes=tuple(values.pop("notes"))
    )


def run_trainers(bench: TrainersBench, progress: Progress) -> dict[str, Any]:
    """Makes the stream, starts the ranks and adds up what they saw.

    Args:
        bench: the workload, its trainers and arms; arms that can't run here are left out.
        progress: is told how far rank 0 is.

    Returns:
        JSON values and `Timing`s; under "notes" what to say of arms that were left out and of
        losses that differ.

    Raises:
        BagpipeError: what a rank raised.
        BackgroundError: a rank died.
    """
    missing = missing_torchrec(bench.arms, bench.device)
    if BY_NCCL in bench.arms and bench.device != "cuda":
        missing[BY_NCCL] = "rows travel by peer memory with --device cuda alone"
    bench = replace(bench, arms=[name for name in bench.arms if name not in missing])
    folder = Path(tempfile.mkdtemp(prefix="bagpipe-bench-"))
    try:
        _write_stream(bench, folder, progress)
        seen = _run_ranks(bench, folder, progress)
        planned = plan_run(bench, folder / "data", progress)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    values = summarize(bench, seen) | {"planned": planned}
    differences = {name: arm["loss_differences"] for name, arm in values["arms"].items()}
    notes = [f"left out {name}: {why}" for name, why in missing.items()]
    wrong = disagreements(differences)
    notes += [*seen[0]["notes"], *wrong]
    if not wrong:
        lasts = ", ".join(
            f"{name} {arm['last_loss']:.6f}"
            for name, arm in values["arms"].items()
            if "last_loss" in arm
        )
        notes.append(
            f"losses of the first {bench.workload.num_compared} steps agree within "
            f"{LOSS_TOLERANCE:g} of them; means of the last turn: {lasts}"
        )
    return values | {"notes": notes}


def summarize(bench: TrainersBench, seen: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Adds up what the ranks saw, given by rank, to JSON values and `Timing`s."""
    workload, group = bench.workload, bench.workload.group
    steps = {name: _slowest(seen, name) for name in seen[0]["arms"]}  # (rounds, steps) seconds
    means = {name: times.mean(1) for name, times in steps.items()}
    losses = {name: _mean_losses(seen, name) for name in steps if name != ALONE}
    parts = [rank["parts"] for rank in seen]
    compared, last = slice(workload.num_compared), slice(-workload.turn_steps, None)
    arms: dict[str, Any] = {}
    for name, times in steps.items():
        sent = [rank["arms"][name]["sent_bytes"] for rank in seen if name in rank["arms"]]
        arms[name] = {
            "step": Timing.of(times.ravel().tolist()),
            "means_ms": (1e3 * means[name]).tolist(),  # by round
            "over_bagpipe": quartiles(means[name] / means["bagpipe"]),
            "over_dense": quartiles(means[name] / means["dense"]),
            "sent_bytes": float(np.mean([sum(each.values()) for each in sent])),
            "critical_bytes": float(np.mean([each["urgent"] for each in sent])),
            "most_sent_bytes": max(sum(each.values()) for each in sent),
            "loss_differences": [],
            "counters": seen[0]["arms"][name].get("counters"),
        }
        if name not in (*WITHOUT_ROWS, ALONE):
            arms[name]["loss_differences"] = relative_differences(
                losses[name][compared], losses["bagpipe"][compared]
            )
            arms[name]["last_loss"] = float(np.mean(losses[name][last]))
    return {
        "workload": asdict(workload),
        "num_trainers": bench.num_trainers,
        "device": torch.cuda.get_device_name() if bench.device != "cpu" else "cpu",
        "num_rows": group.num_rows,
        "cache_share": bench.num_trainers * workload.cache_rows / group.num_rows,
        "dense_bytes": seen[0]["dense_bytes"],
        "graph": bench.graph,
        "arms": arms,
        "num_fetched": float(
            np.mean([rank["arms"]["bagpipe"]["counters"]["num_fetched"] for rank in seen])
        ),
        "driver_calls": seen[0]["driver_calls"],
        "parts_ms": {name: float(np.mean([each[name] for each in parts])) for name in parts[0]},
        # N trainers train N batches in the time in which one trains one.
        "speedup_over_one": quartiles(bench.num_trainers * means[ALONE] / means["bagpipe"])
        if ALONE in means
        else None,
    }


def _slowest(seen: Sequence[Mapping[str, Any]], name: str) -> Float64Array:
    """The time of each measured step on its slowest rank: (rounds, steps) seconds."""
    by_rank = [rank["arms"][name]["turns_s"] for rank in seen if name in rank["arms"]]
    slowest: Float64Array = np.array(by_rank, np.float64).max(0)
    return slowest


def _mean_losses(seen: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """The means of an arm's losses over all ranks, step by step."""
    means: list[float] = np.mean([rank["arms"][name]["losses"] for rank in seen], axis=0).tolist()
    return means


def quartiles(ratios: Float64Array) -> dict[str, float]:
    """The median and the quartiles of ratios (n,)."""
    low, median, high = np.percentile(ratios, [25, 50, 75])
    return {"median": float(median), "low": float(low), "high": float(high)}


def _write_stream(bench: TrainersBench, folder: Path, progress: Progress) -> None:
    """Writes global batches as prepared files, and the rows that they touch."""
    workload = replace(bench.workload, batch_size=bench.workload.batch_size * bench.num_trainers)
    stream = make_stream(
        workload,
        folder / "data",
        num_batches=bench.num_batches,
        num_resident=0,
        device=torch.device("cpu"),
        progress=progress,
    )
    np.save(folder / "touched.npy", stream.touched_rows)


@dataclass(frozen=True, kw_only=True)
class _Rank:
    """A rank's process and the connection over which it reports."""

    process: SpawnProcess
    reports: Connection


def _run_ranks(
    bench: TrainersBench, folder: Path, progress: Progress
) -> Sequence[Mapping[str, Any]]:
    """Runs all ranks and returns what they saw.

    When one fails the others are ended, since they would wait for it.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    context = multiprocessing.get_context("spawn")
    ranks = []
    try:
        for rank in range(bench.num_trainers):
            reports, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main,
                args=(bench, rank, store.port, folder, sender),
                name=f"rank-{rank}",
            )
            process.start()
            sender.close()  # leaves the child's end alone, so that its death is noticed
            ranks.append(_Rank(process=process, reports=reports))
        return _listen(ranks, progress)
    finally:
        for each in ranks:
            each.process.terminate()
            each.process.join()
            each.reports.close()


def _listen(ranks: Sequence[_Rank], progress: Progress) -> Sequence[Mapping[str, Any]]:
    """Passes progress on until the ranks are done; returns what they saw."""
    seen: Sequence[Mapping[str, Any]] = ()
    left = {each.reports: rank for rank, each in enumerate(ranks)}
    while left:
        for reports in wait(list(left)):
            assert isinstance(reports, Connection)
            try:
                report = reports.recv()
            except EOFError:
                rank = left.pop(reports)
                ranks[rank].process.join(_END_TIMEOUT_S)
                if ranks[rank].process.exitcode != 0:
                    raise BackgroundError(
                        f"rank {rank} ended with status {ranks[rank].process.exitcode}"
                    ) from None
                continue
            match report:
                case BagpipeError():
                    raise report
                case tuple():
                    progress(*report)
                case list():
                    seen = report
    return seen


def _rank_main(
    bench: TrainersBench, rank: int, port: int, folder: Path, sender: Connection
) -> None:
    """Runs a rank in its process; rank 0 tells how far all are."""

    def tell(stage: str, done: int, total: int) -> None:
        if rank == 0:
            sender.send((stage, done, total))

    try:
        seen = run_rank(bench, rank, port, folder, tell)
    except BagpipeError as error:
        sender.send(error)
        if isinstance(error, BackgroundError):
            raise  # its cause does not travel: it is printed here
    if seen is not None:
        sender.send(seen)
    sender.close()
