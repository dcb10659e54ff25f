"""How a reader of batches may end in the oracle process."""

from __future__ import annotations

import os
import signal
import time


def end_as(end: str) -> None:
    """Fails, dies, hangs or is stopped as `end` says; returns if it says none of these."""
    if end == "fail":
        raise OSError("the disk is gone")
    if end == "die":
        time.sleep(0.5)  # what is on its way arrives
        os.kill(os.getpid(), signal.SIGKILL)
    if end == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if end == "hang":
        time.sleep(600)
