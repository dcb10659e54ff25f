"""How long work takes, by the host's clock or by a GPU's own.

A GPU is never waited for between two ticks, so that the host may run ahead of it as in training.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch


class Clock(Protocol):
    """Times steps, from the moment that the clock is made."""

    def tick(self) -> None:
        """Notes the end of a step; on a GPU, that all its work has been issued."""

    def seconds(self) -> list[float]:
        """Seconds that each step took; waits for the GPU."""


class HostClock:
    """A `Clock` by the host's own."""

    def __init__(self) -> None:
        self._ends = [time.perf_counter()]

    def tick(self) -> None:
        """See `Clock.tick`."""
        self._ends.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """See `Clock.seconds`."""
        return np.diff(self._ends).tolist()


class CudaClock:
    """A `Clock` by events on the current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ends = [timed_event()]

    def tick(self) -> None:
        """See `Clock.tick`."""
        self._ends.append(timed_event())

    def seconds(self) -> list[float]:
        """See `Clock.seconds`."""
        torch.cuda.synchronize(self._device)
        return [
            begin.elapsed_time(end) / 1e3
            for begin, end in zip(self._ends, self._ends[1:], strict=False)
        ]


def clock_of(device: torch.device) -> Clock:
    """The clock of a device, started now."""
    return CudaClock(device) if device.type == "cuda" else HostClock()


def seconds_a_call(device: torch.device, function: Callable[[], object], num_calls: int) -> float:
    """The mean seconds that `function` takes over `num_calls`.

    The GPU may still be at earlier work when they begin: its events count from the end of that.
    """
    clock = clock_of(device)
    for _ in range(num_calls):
        function()
    clock.tick()
    return clock.seconds()[0] / num_calls


def timed_event() -> torch.cuda.Event:
    """An event that keeps its time, recorded on the current stream."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
