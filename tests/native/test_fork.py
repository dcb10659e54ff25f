"""A process that forks while it trains: what the child inherits is not ended by it, nor held."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.processes import is_alive
from tests.soon import TIMEOUT_S, wait_until

from bagpipe.checkpoint.run_folder import claim_run_folder

ROOT = Path(__file__).parents[2]


def run(folder: Path, *names: str) -> tuple[int, str]:
    """How a process ended that ran these programs, and what it said."""
    with (folder / "out").open("w") as out:  # not a pipe, which a child that lives on would hold
        ended = subprocess.run(
            [sys.executable, "-m", "tests.native.forking", str(folder), *names],
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            timeout=TIMEOUT_S,
            check=False,
        )
    return ended.returncode, (folder / "out").read_text()


def test_children_disturb_nothing_and_are_told_what_they_can_not_use(tmp_path: Path) -> None:
    assert run(tmp_path, "compile", "go_on", "use") == (0, "")


def test_a_killed_trainers_oracle_and_lock_end_with_it_though_a_child_lives(
    tmp_path: Path,
) -> None:
    assert run(tmp_path, "die") == (-signal.SIGKILL, "")
    child, oracle = map(int, (tmp_path / "pids").read_text().split())
    try:
        assert is_alive(child)
        with claim_run_folder(tmp_path):
            pass
        wait_until(lambda: not is_alive(oracle))
        assert is_alive(child)
    finally:
        os.kill(child, signal.SIGKILL)
