"""What `cutting` measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.remote.settings import QUICK as REMOTE_QUICK
from benchmarks.remote.settings import RemoteBench

SETTLING_STEPS = 10
"""Steps behind the end of a cut that still count as slowed by it."""
CUTTING: dict[str, Any] = {"devices_ms": (20.0,), "num_rounds": 4, "measured_steps": 300}
"""What differs from `remote`, where a round is a cut here."""
QUICK: dict[str, Any] = REMOTE_QUICK | {
    "gbits": (),
    "devices_ms": (0.5,),
    "num_rounds": 2,
    "measured_steps": 20,
}


@dataclass(frozen=True, kw_only=True)
class CuttingBench:
    """A run with cuts; its tables, batches, device time and links are those of a `RemoteBench`."""

    remote: RemoteBench
    num_cuts: int = 4
    bottom: Sequence[int] = (512, 256)
    """Of the model whose dense state is in each cut; the last layer is added."""
    top: Sequence[int] = (512, 256, 1)

    @classmethod
    def of(cls, remote: RemoteBench) -> CuttingBench:
        """With as many cuts as `remote` has rounds."""
        return cls(remote=replace(remote, arms=()), num_cuts=remote.num_rounds)

    @property
    def device_ms(self) -> float:
        """What a step takes on the device."""
        return self.remote.devices_ms[0]

    @property
    def steps_between(self) -> int:
        """Steps before each cut, and behind the last one."""
        return self.remote.measured_steps


@dataclass(frozen=True, kw_only=True)
class Cut:
    """One cut."""

    flush_s: float
    take_s: float
    """What training waited for beside the flush: dense state, and servers that take the cut."""
    rows_flushed: int
    rows_used: int
    """Rows of the batches since the last cut, each once."""
    written_s: float
    """From its beginning to the rename, beside training."""
    slower_s: float
    """What the steps beside it took longer, in all."""
    file_bytes: int
    num_records: int


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one run found."""

    step_ms: float
    """The mean of steps beside which no cut was written."""
    num_base: int
    """How many these are."""
    cuts: list[Cut]
    in_process_s: list[float] = field(default_factory=list)
    """What a flush of the same cache to a store of the trainer's own process takes, before each
    cut."""
