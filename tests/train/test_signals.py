"""The first signal asks, the second kills, and handlers are put back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from tests.soon import SOON_S

from bagpipe.train.trainer import StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_remembered(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.signal is None
        os.kill(os.getpid(), number)
        assert stop.signal is number
    assert signal.getsignal(number) is before


def test_the_second_signal_kills() -> None:
    code = """
import os, signal
from bagpipe.train.trainer import StopRequest
with StopRequest():
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    print("alive")
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, timeout=SOON_S, check=False
    )
    assert ended.returncode == -signal.SIGINT
    assert ended.stdout == b""
