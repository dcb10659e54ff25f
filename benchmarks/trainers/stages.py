"""How long the named stages of a step (`bagpipe.native.spans`) take, in steps made for it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Final

import torch

from benchmarks.clocks import timed_event

STAGES: Final = (
    "lookup",
    "dense",
    "update",
    "replicas_urgent",
    "sync_urgent",
    "replicas_overlapped",
    "sync_overlapped",
)
"""`dense` averages, too; `update` sums gradients by row and has `sync_urgent` in it."""


class Stages:
    """Times `STAGES`; give it to `bagpipe.native.spans.named_by`.

    On a CPU by the host's clock, which counts what a stage waits for. On CUDA between two events on
    the stream that is current, so a stage that waits for another rank on the device counts that,
    too. Other stages run in threads that have no stream of their own, and are left out.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def __call__(self, name: str) -> AbstractContextManager[object]:
        """Times the block, if it is one of `STAGES`; called with "bagpipe." before the name."""
        stage = name.removeprefix("bagpipe.")
        if stage not in STAGES:
            return nullcontext()
        return self._on_device(stage) if self._device.type == "cuda" else self._on_host(stage)

    def ms_a_step(self, num_steps: int) -> dict[str, float]:
        """Milliseconds of each stage in one of `num_steps`; waits for the device."""
        seconds = self._seconds
        if self._events:
            torch.cuda.synchronize(self._device)
        for stage, begin, end in self._events:
            seconds[stage] += begin.elapsed_time(end) / 1e3
        self._events = []
        return {stage: 1e3 * seconds[stage] / num_steps for stage in STAGES}

    @contextmanager
    def _on_host(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[stage] += time.perf_counter() - begin

    @contextmanager
    def _on_device(self, stage: str) -> Iterator[None]:
        begin = timed_event()
        try:
            yield
        finally:
            self._events.append((stage, begin, timed_event()))
