"""Timings with their spread, losses that must agree, and what a benchmark returns."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

import bagpipe

_PACKAGES = ("torch", "numpy", "numba", "fbgemm-gpu-cpu")

Progress = Callable[[str, int, int], None]
"""Is told a stage's name, how much of it is done, and how much there is."""

LOSS_TOLERANCE = 1e-3
"""The largest relative difference between losses of arms that compute the same.

Sums in another order move some values over a bfloat16 boundary, and steps magnify that: from 1e-6
at the second step to 1e-4 at the tenth on a CPU. An arm that drops its updates is off by 5e-2.
"""


def silent(stage: str, done: int, total: int) -> None:
    """A `Progress` that tells nobody."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """The distribution of repeated measurements, in milliseconds."""

    median_ms: float
    low_ms: float  # first quartile
    high_ms: float  # third quartile
    min_ms: float
    max_ms: float
    count: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Summarizes at least one measurement, given in seconds."""
        least, low, median, high, most = (
            float(value) * 1e3 for value in np.percentile(seconds, [0, 25, 50, 75, 100])
        )
        return cls(
            median_ms=median,
            low_ms=low,
            high_ms=high,
            min_ms=least,
            max_ms=most,
            count=len(seconds),
        )

    def __str__(self) -> str:
        return f"{self.median_ms:.2f} [{self.low_ms:.2f}, {self.high_ms:.2f}]"


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one benchmark found."""

    name: str
    tables: tuple[Table, ...]
    values: dict[str, Any]
    notes: tuple[str, ...] = field(default=())


def relative_differences(losses: Sequence[float], reference: Sequence[float]) -> list[float]:
    """How far `losses` are from `reference`, step by step; infinite where one is not finite."""
    found = [abs(one - other) / abs(other) for one, other in zip(losses, reference, strict=True)]
    # False for NaN, too, which no later comparison would find.
    return [difference if difference < float("inf") else float("inf") for difference in found]


def disagreements(differences: Mapping[str, Sequence[float]]) -> list[str]:
    """A sentence for each arm whose losses differ from Bagpipe's by more than `LOSS_TOLERANCE`.

    It is a note, not an error at that step: what was measured stays, and whether later steps agree
    again tells a slip from wrong updates.

    Args:
        differences: the relative differences of each arm's losses, step by step.
    """
    notes = []
    for name, found in differences.items():
        beyond = [step for step, difference in enumerate(found) if difference > LOSS_TOLERANCE]
        if beyond:
            notes.append(
                f"arm {name} does NOT compute the same: its loss differs from bagpipe's by more "
                f"than {LOSS_TOLERANCE:g} of it at {len(beyond)} of the first {len(found)} steps, "
                f"first at step {beyond[0]} by {found[beyond[0]]:.1e}, at most by {max(found):.1e}"
            )
    return notes


def as_json(value: Any) -> Any:
    """`value` with the timings inside it as dictionaries."""
    if isinstance(value, Timing):
        return asdict(value)
    if isinstance(value, dict):
        return {str(key): as_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(inner) for inner in value]
    return value


def describe_environment() -> dict[str, Any]:
    """The command, the hardware, the library versions and the commit, as JSON values.

    A value is None where it can't be found out.
    """
    return {
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "packages": {
            "bagpipe": bagpipe.__version__,
            **{name: _version(name) for name in _PACKAGES},
        },
        "commit": _commit(),
        "load_average": os.getloadavg()[0],
    }


def clock_of_process(process: int) -> int:
    """The clock of another process's CPU time, see clock_getcpuclockid(3) and linux/posix-timers.h.

    It has nanoseconds, where /proc has ticks of 10 ms.
    """
    scheduler = 2
    return (~process << 3) | scheduler


def resident_bytes() -> int | None:
    """Memory of this process that is in RAM now; None where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the source tree that runs, with "+" where it was changed."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10
        )
        status = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")
