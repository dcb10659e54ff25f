"""How long `bagpipe train` takes from the start of its process to its first step.

The run is examples/quickstart.toml, with compiled code: starts that are not counted come first.
Another clone, at another commit, takes turns with this one. Each start is ended at its first step.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from bagpipe.errors import BackgroundError
from bagpipe.train.logs import LOG_NAME
from benchmarks.measure import Progress, Result

QUICK: dict[str, Any] = {"num_rounds": 1, "num_uncounted": 0}
_HERE = Path(__file__).resolve().parent.parent
_LOOK_EVERY_S = 0.003
_TRAINED = '"kind": "train"'


@dataclass(frozen=True, kw_only=True)
class StartBench:
    """Sizes of the benchmark."""

    num_rounds: int = 5
    num_uncounted: int = 1
    """Rounds before, in which code is compiled that is not yet."""
    other: Path | None = None
    """The top folder of another clone."""


def bench_start(sizes: StartBench, progress: Progress) -> Result:
    """Starts runs in turns, and ends each at its first step."""
    clones = [_HERE] if sizes.other is None else [_HERE, sizes.other.resolve()]
    found: dict[str, list[tuple[float, float]]] = {str(clone): [] for clone in clones}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(-sizes.num_uncounted, sizes.num_rounds):
            for clone in clones if number % 2 == 0 else clones[::-1]:
                seconds = _start(clone, Path(folder) / "run")
                if number >= 0:
                    found[str(clone)].append(seconds)
            progress("rounds", max(number + 1, 0), sizes.num_rounds)
    table = Table(title="To the first step: seconds (of CPU)")
    for name in ("clone", "median", "each"):
        table.add_column(name)
    for name, times in found.items():
        middle = tuple(median(column) for column in zip(*times, strict=True))
        table.add_row(name, _shown(middle), ", ".join(map(_shown, times)))
    return Result(name="start", tables=(table,), values={"seconds_and_cpu": found})


def _start(clone: Path, folder: Path) -> tuple[float, float]:
    """Seconds, and seconds of CPU, until the log has a first step."""
    shutil.rmtree(folder, ignore_errors=True)
    run = str(clone / "examples" / "quickstart.toml")
    changes = ("--set", f"log.folder={folder}", "--set", "log.every_steps=1")
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "bagpipe", "train", run, *changes],
        env={**os.environ, "PYTHONPATH": str(clone / "src")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            while not _has_trained(folder / LOG_NAME):
                if process.poll() is not None:
                    assert process.stderr is not None
                    raise BackgroundError(f"the run has ended: {process.stderr.read()}")
                time.sleep(_LOOK_EVERY_S)
            return time.perf_counter() - began, _cpu_s(process.pid)
        finally:
            process.kill()


def _has_trained(log: Path) -> bool:
    try:
        return _TRAINED in log.read_text()
    except OSError:  # not there yet
        return False


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # of user and system


def _shown(times: Sequence[float]) -> str:
    elapsed, cpu = times
    return f"{elapsed:.2f} ({cpu:.2f})"
