"""How often the trainer's thread calls CUDA's runtime and driver, as torch's profiler sees it."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

_KINDS = ("cuda_runtime", "cuda_driver")
_MARK = "cudaDeviceSynchronize"
"""What the trainer's thread alone calls: it tells which thread of a trace that is."""


def driver_calls_a_step(
    device: torch.device, step: Callable[[], object], num_steps: int
) -> dict[str, float]:
    """Calls of this thread in one of `num_steps`, by name; of a CPU none."""
    if device.type == "cpu":
        return {}
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True
    ) as profile:
        torch.cuda.synchronize(device)
        for _ in range(num_steps):
            step()
        torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory(prefix="bagpipe-bench-") as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        calls = calls_of_trainer(json.loads(path.read_text())["traceEvents"])
    return {name: count / num_steps for name, count in calls.items()}


def calls_of_trainer(events: Sequence[Mapping[str, Any]]) -> Counter[str]:
    """Calls by name in a trace of Chrome's format, of the thread that waits for the device.

    They are counted from its first waiting on, without any waiting: the profiler waits, too.
    """
    calls = [event for event in events if event.get("cat") in _KINDS]
    first = min(
        (event for event in calls if event["name"] == _MARK),
        key=lambda event: float(event["ts"]),
        default=None,
    )
    if first is None:
        return Counter()
    return Counter(
        event["name"]
        for event in calls
        if event["tid"] == first["tid"] and event["ts"] > first["ts"] and event["name"] != _MARK
    )


def describe(calls: Mapping[str, float]) -> str:
    """How many there are, and the most frequent ones."""
    most = sorted(calls.items(), key=lambda item: -item[1])[:4]
    names = ", ".join(f"{name} {count:.1f}" for name, count in most)
    return f"{sum(calls.values()):.1f}: {names}"
