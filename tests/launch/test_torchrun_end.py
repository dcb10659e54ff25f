"""A trainer that has failed ends at once, since the others wait for it to start again."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tests.soon import TIMEOUT_S

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
