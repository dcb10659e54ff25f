"""kill -9 at any moment, then resume: the run ends in the parameters of one that nothing happened to.

Moments are drawn in two ways: after so many flushes and renames of files, which falls into checkpoints, and after so much
time, which falls anywhere. Runs are forked from a server that has imported everything, so that most of the time is training.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

from tests.train.runs import newest_files, small_config

NUM_KILLS = 8


def run(folder: str, kill_after_calls: int | None) -> None:
    """Trains or resumes; dies at the given call of fsync or rename."""
    from bagpipe.train.report import SilentReporter
    from bagpipe.train.trainer import train

    if kill_after_calls is not None:
        calls = itertools.count(1)
        real_fsync, real_rename = os.fsync, Path.rename

        def die_in_time() -> None:
            if next(calls) == kill_after_calls:
                os.kill(os.getpid(), signal.SIGKILL)

        def fsync(descriptor: int) -> None:
            die_in_time()
            real_fsync(descriptor)

        def rename(path: Path, target: Path) -> Path:
            die_in_time()
            return real_rename(path, target)

        os.fsync, Path.rename = fsync, rename  # type: ignore[method-assign]
    config = small_config(Path(folder), checkpoint={"every_steps": 2, "keep": 2})
    train(config, reporter=SilentReporter(), resume=True)


def test_killed_at_any_moment_a_run_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bagpipe.train.trainer", "tests.train.runs"])

    def start(folder: Path, kill_after_calls: int | None = None) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=run, args=(str(folder), kill_after_calls))
        process.start()
        return process

    start(tmp_path / "warm").join()  # starts the server
    started = time.perf_counter()
    undisturbed = start(tmp_path / "undisturbed")
    undisturbed.join()
    elapsed_s = time.perf_counter() - started
    assert undisturbed.exitcode == 0

    moments, num_killed = random.Random(0), 0
    for kill in range(NUM_KILLS):
        process = start(tmp_path / "killed", moments.randint(1, 14) if kill % 2 else None)
        process.join(timeout=None if kill % 2 else moments.uniform(0.2, 0.8) * elapsed_s)
        process.kill()
        process.join()
        num_killed += process.exitcode == -signal.SIGKILL
    assert num_killed >= NUM_KILLS // 2
    last = start(tmp_path / "killed")
    last.join()
    assert last.exitcode == 0
    assert newest_files(tmp_path / "killed") == newest_files(tmp_path / "undisturbed")
    leftovers = [path.name for path in (tmp_path / "killed" / "checkpoints").iterdir() if "tmp" in path.name]
    assert leftovers == []
