"""How calls of the driver are counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.driver_calls import calls_of_trainer, describe, driver_calls_a_step


def event(name: str, ts: float, *, tid: int = 1, cat: str = "cuda_runtime") -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "tid": tid}


def test_calls_of_the_thread_that_waits_are_counted_behind_its_first_wait() -> None:
    events = [
        {"ph": "M", "name": "process_name"},
        event("cudaLaunchKernel", 1),
        event("cudaDeviceSynchronize", 2),
        event("cudaGraphLaunch", 3),
        event("cuLaunchKernelEx", 4, cat="cuda_driver"),
        event("cudaEventQuery", 4, tid=2),
        event("a kernel", 5, cat="kernel"),
        event("cudaGraphLaunch", 6),
        event("cudaDeviceSynchronize", 7),
        event("cudaDeviceSynchronize", 8),
    ]
    assert calls_of_trainer(events) == {"cudaGraphLaunch": 2, "cuLaunchKernelEx": 1}
    assert calls_of_trainer(events[:2]) == {}


def test_they_are_told_with_the_most_frequent_ones() -> None:
    calls = {"a": 1.0, "b": 3.5, "c": 0.25, "d": 2.0, "e": 0.5}
    assert describe(calls) == "7.2: b 3.5, d 2.0, a 1.0, e 0.5"


def test_a_cpu_has_none() -> None:
    assert driver_calls_a_step(torch.device("cpu"), lambda: None, 3) == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_launches_of_kernels_are_counted() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    values = torch.zeros(5, device=device)

    def step() -> None:
        for _ in range(3):
            values.add_(1)

    step()
    calls = driver_calls_a_step(device, step, 4)
    assert sum(count for name, count in calls.items() if "Launch" in name) == 3.0
