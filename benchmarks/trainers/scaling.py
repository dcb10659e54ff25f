"""Weak and strong scaling: `trainers` with one trainer, two, four, and so on, in one command.

With weak scaling each trainer keeps its batch, so the global one grows. With strong scaling the
global batch stays, and each trainer has its part. A trainer's cache is the same in both. One
trainer is measured once for both, in the same command: Bagpipe as `bagpipe train` runs it alone,
without process groups. Its peers are not: some of them could not hold all rows on one GPU.

Each run starts its ranks anew, and is one of `bench.run_trainers`. Given a folder, it is kept there
as soon as it is over. So a command that was cut short goes on where it ended, if the machine
lets it run for some minutes only. A rank that dies, as for want of memory, costs its run alone.

`TARGETS` are those for GPUs of one host. On a CPU they say nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch

from bagpipe.cli.common import save_json
from bagpipe.errors import BackgroundError, ConfigError
from benchmarks.measure import Progress, Result, as_json, describe_environment
from benchmarks.trainers.bench import Float64Array, quartiles, run_trainers
from benchmarks.trainers.scaling_view import render, save_plot
from benchmarks.trainers.settings import ALONE, ALWAYS, ARMS, UNAVERAGED, TrainersBench
from benchmarks.workloads import Workload

Mode = Literal["weak", "strong"]
MODES: Final[Sequence[Mode]] = ("weak", "strong")
SCALING_ARMS: Final = tuple(name for name in ARMS if name != ALONE)
SCALING_ALWAYS: Final = (*ALWAYS, UNAVERAGED)
TARGETS: Final[Mapping[int, float]] = {4: 0.93, 8: 0.90}
"""Samples a second with weak scaling, over those of one trainer for each trainer, at least."""
TORCHREC_TARGET: Final = (8, 2.0)
"""With so many trainers, TorchRec's step (in the devices' memory) over Bagpipe's, at least."""


@dataclass(frozen=True, kw_only=True)
class ScalingBench:
    """What is run."""

    workloads: Sequence[Workload]
    trainers: Sequence[int]
    """How many, in the order of the runs; with one the others are compared."""
    modes: Sequence[Mode] = MODES
    arms: Sequence[str] = SCALING_ARMS
    device: str = "cpu"
    """As in `TrainersBench`. On CUDA the dense part is captured as a graph."""
    pause_s: float = 0.3
    keep: Path | None = None
    """The folder where runs are kept; None: nowhere."""

    def __post_init__(self) -> None:
        for _ in self.runs():  # refuses all that can't run before the first one does
            pass

    def runs(self) -> Iterator[tuple[Mode | None, TrainersBench]]:
        """All runs, each with its mode; None: one trainer, with which all are compared."""
        for workload in self.workloads:
            for num_trainers in sorted({1, *self.trainers}):
                for mode in self.modes if num_trainers > 1 else (None,):
                    yield mode, self._run(workload, num_trainers, mode)

    def _run(self, workload: Workload, num_trainers: int, mode: Mode | None) -> TrainersBench:
        if mode == "strong":
            batch_size, left = divmod(workload.batch_size, num_trainers)
            if left or not batch_size:
                raise ConfigError(
                    f"workload {workload.name}: its batch of {workload.batch_size:,} samples can't "
                    f"be shared alike by {num_trainers} trainers: give another --batch"
                )
            workload = replace(workload, batch_size=batch_size)
        return TrainersBench(
            workload=workload,
            num_trainers=num_trainers,
            arms=self.arms if num_trainers > 1 else ALWAYS,
            device=self.device,
            graph=self.device != "cpu",
            pause_s=self.pause_s,
        )


def counts_on(device: str) -> tuple[int, ...]:
    """How many trainers by default: 1, 2, 4 and so on, and all GPUs; on a CPU 1, 2, 4 and 8."""
    most = torch.cuda.device_count() if device == "cuda" else 8 if device == "cpu" else 2
    most = max(1, most)
    return tuple(sorted({*(1 << power for power in range(most.bit_length())), most}))


def checked_modes(asked: Sequence[str] | None) -> Sequence[str] | None:
    """Raises ConfigError if one of the modes is none."""
    for mode in asked or ():
        if mode not in MODES:
            raise ConfigError(f"--mode {mode}: must be {' or '.join(MODES)}")
    return asked or None


def bench_scaling(bench: ScalingBench, progress: Progress, plot: Path | None = None) -> Result:
    """Makes all runs, one after the other.

    Args:
        bench: what is run.
        progress: is told how far it is.
        plot: where to save samples a second over trainers; None: nowhere.

    Returns:
        Tables, the values of each run, and notes on what was left out or computes something else.

    Raises:
        BagpipeError: what a rank raised, but that it died.
    """
    runs: list[dict[str, Any]] = []
    notes: dict[str, list[str]] = {}  # the runs of which one is to be told
    every = list(bench.runs())
    for number, (mode, each) in enumerate(every, start=1):
        name = run_name(each, mode)
        try:
            values = _made_or_kept(bench.keep, name, each, progress)
        except BackgroundError as error:
            notes.setdefault(f"left out: {error}", []).append(name)
        else:
            for note in values["notes"]:
                notes.setdefault(note, []).append(name)
            runs.append(values | {"mode": mode})
        progress("runs", number, len(every))
    found = [_compared(run, runs) for run in runs]
    if plot is not None:
        save_plot(found, plot)
    told = tuple(f"{', '.join(names)}: {note}" for note, names in notes.items())
    return Result(name="scaling", tables=render(found), values={"runs": found}, notes=told)


def run_name(bench: TrainersBench, mode: Mode | None) -> str:
    """What a run is called, also in its file."""
    return "-".join(filter(None, (bench.workload.name, mode, str(bench.num_trainers))))


def _made_or_kept(
    folder: Path | None, name: str, bench: TrainersBench, progress: Progress
) -> dict[str, Any]:
    """Makes a run, unless it is kept: with the same settings, at the same commit if git tells."""
    environment = describe_environment()
    made_of = json.loads(json.dumps({"bench": asdict(bench), "commit": environment["commit"]}))
    file = None if folder is None else folder / f"{name}.json"
    if file is not None and file.exists():
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["made_of"] == made_of:
            values: dict[str, Any] = kept["values"]
            return values

    def tell(stage: str, done: int, total: int) -> None:
        progress(f"{name}: {stage}", done, total)

    values = as_json(run_trainers(bench, tell))
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_json({"made_of": made_of, "environment": environment, "values": values}, file)
    return values


def _compared(run: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A run's values, with those beside one trainer's and with targets."""
    name, num_trainers, arms = run["workload"]["name"], run["num_trainers"], run["arms"]
    alone = next(
        (each for each in runs if each["num_trainers"] == 1 and each["workload"]["name"] == name),
        None,
    )
    rates = _samples_a_second(run)  # by round
    share = None if alone is None else quartiles(rates / _samples_a_second(alone).mean())
    torchrec = arms["torchrec"]["over_bagpipe"]["median"] if "torchrec" in arms else None
    averaging_ms = 0.0
    if UNAVERAGED in arms:
        averaging_ms = _mean_ms(arms["dense"]) - _mean_ms(arms[UNAVERAGED])
    targets: dict[str, dict[str, Any]] = {}
    if share is not None and run["mode"] == "weak" and num_trainers in TARGETS:
        found, least = share["median"] / num_trainers, TARGETS[num_trainers]
        targets["samples"] = {"found": found, "least": least, "is_reached": found >= least}
    if torchrec is not None and num_trainers == TORCHREC_TARGET[0]:
        least = TORCHREC_TARGET[1]
        targets["torchrec"] = {"found": torchrec, "least": least, "is_reached": torchrec >= least}
    return dict(run) | {
        "samples_a_second": float(rates.mean()),
        "over_one": share,
        "averaging_ms": averaging_ms,
        "targets": targets,
    }


def _samples_a_second(run: Mapping[str, Any]) -> Float64Array:
    """Those of Bagpipe, in each round."""
    samples = run["num_trainers"] * run["workload"]["batch_size"]
    rates: Float64Array = 1e3 * samples / np.array(run["arms"]["bagpipe"]["means_ms"], np.float64)
    return rates


def _mean_ms(arm: Mapping[str, Any]) -> float:
    return float(np.mean(arm["means_ms"]))
