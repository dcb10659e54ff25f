"""A trainer that has failed ends at once, since the others wait for it to start again. One whose
launcher is gone ends, too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from unittest.mock import Mock

import pytest
from tests.processes import is_alive
from tests.soon import SOON_S, TIMEOUT_S, wait_until

from bagpipe.launch import torchrun

SLOW_TO_END = """
import threading
from bagpipe.launch.torchrun import end_soon

class Slow:
    def __del__(self, wait=threading.Event().wait):
        wait()

slow = Slow()
print("all is told", end="")
end_soon()
"""


@pytest.mark.parametrize(
    ("failing", "status", "told"), [("raise SystemExit(2)", 2, ""), ("1 / 0", 1, "Zero")]
)
def test_it_takes_none_of_its_objects_apart(failing: str, status: int, told: str) -> None:
    command = [sys.executable, "-c", SLOW_TO_END + failing]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert ended.returncode == status
    assert ended.stdout == "all is told"
    assert told in ended.stderr


WAITING = """
import os, sys, time
from bagpipe.launch.torchrun import end_with

end_with(os.getppid(), within_s=0.1)
print(os.getpid(), flush=True)
time.sleep(600)
"""
LAUNCHER = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", sys.argv[1]])
sys.stdin.read()
"""


def test_it_ends_with_the_process_that_has_started_it() -> None:
    command = [sys.executable, "-c", LAUNCHER, WAITING]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as launcher:
        assert launcher.stdout is not None
        trainer = int(launcher.stdout.readline())
        assert is_alive(trainer)
        launcher.kill()
        wait_until(lambda: not is_alive(trainer))
        assert (
            f"started this trainer ({launcher.pid}) has ended: start it again"
            in (launcher.communicate(timeout=SOON_S)[1])
        )


def test_it_ends_also_where_nobody_reads_what_it_says() -> None:
    """As where a terminal is gone with the launcher."""
    command = [sys.executable, "-c", LAUNCHER, WAITING]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as launcher:
        assert launcher.stdout is not None
        assert launcher.stderr is not None
        trainer = int(launcher.stdout.readline())
        launcher.stderr.close()
        launcher.kill()
        wait_until(lambda: not is_alive(trainer))


def test_only_torchrun_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a trainer would watch a process that may end before it, as a shell's job."""
    watched: list[int] = []
    monkeypatch.setattr(torchrun, "end_with", watched.append)
    monkeypatch.setattr(torchrun, "rendezvous", Mock(side_effect=LookupError))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for run, expected in ((None, []), ("of this test", [os.getppid()])):
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
        if run is not None:
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", run)
        with pytest.raises(LookupError), torchrun.joined_trainers(1.0):
            pass
        assert watched == expected
