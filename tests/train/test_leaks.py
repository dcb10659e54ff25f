"""A long run with every plan checked: the memory of trainer, oracle process and device stays where
it was after the first steps.
"""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest
import torch
from tests.train.runs import small_config

from bagpipe.train.report import SilentReporter
from bagpipe.train.trainer import train

_MIB = 1 << 20


class MemoryWatch(SilentReporter):
    """Looks at the memory in use, by kind, after some steps."""

    def __init__(self, device: str, steps: tuple[int, ...]) -> None:
        self._device, self._steps = device, steps
        self.seen: list[dict[str, float]] = []
        """MiB."""

    def advance(self, step: int) -> None:
        """Looks after the steps asked for."""
        if step not in self._steps:
            return
        seen = {"trainer": anonymous_mib(os.getpid())}
        seen |= {
            child.name: anonymous_mib(child.pid)
            for child in multiprocessing.active_children()
            if child.pid
        }
        if self._device == "cuda":
            torch.cuda.synchronize()
            seen["device"] = torch.cuda.memory_allocated() / _MIB
            seen["device, reserved"] = torch.cuda.memory_reserved() / _MIB
            seen["pinned"] = torch.cuda.host_memory_stats()["allocated_bytes.current"] / _MIB
        self.seen.append(seen)


def anonymous_mib(pid: int) -> float:
    """Memory that is no file's: pages of the mapped files that are read count for nobody."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) / 1024
    raise AssertionError(pid)


@pytest.mark.parametrize(
    ("device", "batch_size", "num_steps"),
    [("cpu", 64, 800), pytest.param("cuda", 1024, 5_000, marks=pytest.mark.gpu)],
)
def test_memory_stays(device: str, batch_size: int, num_steps: int, tmp_path: Path) -> None:
    watch = MemoryWatch(device, (num_steps // 4, num_steps // 2, num_steps - 10))
    config = small_config(
        tmp_path,
        data={
            "num_samples": 400 * batch_size,
            "num_validation_samples": 64,
            "num_embeddings": [batch_size * factor for factor in (1, 5, 20, 60, 2, 8)],
        },
        cache={"size": 12 * batch_size, "lookahead": 20, "check": True, "oracle": "process"},
        train={"device": device, "batch_size": batch_size, "steps": num_steps},
    )
    result = train(config, reporter=watch)
    assert result.step == num_steps
    first, *overlapped = watch.seen
    assert "bagpipe-oracle" in first
    for seen in overlapped:
        assert seen.keys() == first.keys()
        for kind, found in seen.items():
            # what the C library keeps, and a larger batch's buffers
            allowed = 16.0 if kind in ("trainer", "bagpipe-oracle") else 2.0
            assert found <= first[kind] + allowed, (kind, watch.seen)
