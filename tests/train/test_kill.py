"""kill -9 at any moment, then resume: the run ends in the parameters of one that nothing happened
to.

Moments are drawn in two ways: after so many flushes and renames of files, which falls into
checkpoints, and after so much time, which falls anywhere. Runs are forked from a server that has
imported everything, so that most of the time is training.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
from pathlib import Path
from typing import Literal

import pytest
from tests.train.runs import newest_files, small_config

Moment = tuple[Literal["calls"], int] | tuple[Literal["seconds"], float]


def run(folder: str, moment: Moment | None) -> None:
    """Trains or resumes; dies at the given moment, without a chance to clean up."""
    from bagpipe.train.report import SilentReporter
    from bagpipe.train.trainer import train

    if moment is not None and moment[0] == "calls":
        die_at_call(moment[1])
    elif moment is not None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # whose default is to die at once
        signal.setitimer(signal.ITIMER_REAL, moment[1])
    config = small_config(
        Path(folder), train={"steps": 60}, checkpoint={"every_steps": 2, "keep": 2}
    )
    train(config, reporter=SilentReporter(), resume=True)


def die_at_call(number: int) -> None:
    """Makes this process die at its n-th call of fsync or rename."""
    calls = itertools.count(1)
    real_fsync, real_rename = os.fsync, Path.rename

    def die_in_time() -> None:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def fsync(descriptor: int) -> None:
        die_in_time()
        real_fsync(descriptor)

    def rename(path: Path, target: Path) -> Path:
        die_in_time()
        return real_rename(path, target)

    os.fsync, Path.rename = fsync, rename  # type: ignore[method-assign]


@pytest.mark.parametrize("num_kills", [4, pytest.param(24, marks=pytest.mark.soak)])
def test_killed_at_any_moment_a_run_ends_like_an_undisturbed_one(
    tmp_path: Path, num_kills: int
) -> None:
    context = multiprocessing.get_context("forkserver")

    def run_once(name: str, moment: Moment | None) -> int | None:
        process = context.Process(target=run, args=(str(tmp_path / name), moment))
        process.start()
        process.join()
        return process.exitcode

    assert run_once("undisturbed", None) == 0
    moments = random.Random(0)
    exits = [
        run_once(
            "killed",
            ("seconds", moments.uniform(0.05, 0.5))
            if kill % 2
            else ("calls", moments.randint(1, 20)),
        )
        for kill in range(num_kills)
    ]
    assert exits.count(-signal.SIGKILL) == num_kills // 2
    assert run_once("killed", None) == 0
    assert newest_files(tmp_path / "killed") == newest_files(tmp_path / "undisturbed")
    assert [
        path.name for path in (tmp_path / "killed" / "checkpoints").iterdir() if "tmp" in path.name
    ] == []
