"""What `trainers` measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bagpipe.errors import ConfigError
from benchmarks.trainers.torchrec import TORCHREC_ARMS
from benchmarks.workloads import Workload

ALWAYS = ("bagpipe", "dense")
ALONE = "one_trainer"
BY_NCCL = "by_nccl"
UNAVERAGED = "dense_alone"
WITHOUT_ROWS = ("dense", UNAVERAGED)
ARMS = (
    *("bagpipe", "no_overlap", "replicated", "hashed", BY_NCCL),
    *(*TORCHREC_ARMS, *WITHOUT_ROWS, ALONE),
)
QUICK: dict[str, Any] = {"pause_s": 0.05}


@dataclass(frozen=True, kw_only=True)
class TrainersBench:
    """The workload, its trainers, and the arms that take turns."""

    workload: Workload
    """`batch_size` is one trainer's, and so is `cache_rows`."""
    num_trainers: int = 2
    device: str = "cpu"
    """With "cuda" each rank has a device of its own. With "cuda:0" all share one, and talk by
    sockets, as over a slow network."""
    arms: Sequence[str] = ARMS
    """Some of `ARMS`, with all of `ALWAYS`."""
    graph: bool = False
    """Whether the dense part, with its averaging, is captured as a CUDA graph."""
    pause_s: float = 0.3
    """A pause before each turn, in which the background threads of the arm before come to rest."""

    def __post_init__(self) -> None:
        least = 2 if ALONE in self.arms else 1
        if self.num_trainers < least:
            raise ConfigError(
                f"--trainers {self.num_trainers}: must be at least {least}; the arm {ALONE} "
                "measures one"
            )
        if self.workload.store != "memory":
            raise ConfigError(
                f"workload {self.workload.name!r}: trainers share tables in memory, not in a "
                f"{self.workload.store}"
            )
        if self.device not in ("cpu", "cuda", "cuda:0"):
            raise ConfigError(f"--device {self.device!r}: must be 'cpu', 'cuda' or 'cuda:0'")
        if self.device == "cpu" and self.graph:
            raise ConfigError("--graph captures CUDA graphs: add --device cuda, or leave it out")
        if self.device != "cpu" and torch.cuda.device_count() < self.num_devices:
            raise ConfigError(
                f"--device {self.device} and {self.num_trainers} trainers need {self.num_devices} "
                f"CUDA devices: torch sees {torch.cuda.device_count()}; use cuda:0 to share one, "
                "or cpu"
            )

    @property
    def num_devices(self) -> int:
        """CUDA devices that the ranks have together."""
        return 1 if self.device == "cuda:0" else self.num_trainers

    @property
    def num_steps(self) -> int:
        """Steps of each arm."""
        return (
            self.workload.warmup_steps + self.workload.rounds * self.workload.turn_and_settle_steps
        )

    @property
    def num_batches(self) -> int:
        """Global batches of the stream: enough that the window stays full while it is measured.

        Bagpipe takes two more turns, in which its stages are timed and calls of the driver counted.
        """
        more = 2 * self.workload.turn_and_settle_steps
        return self.num_steps + more + self.workload.lookahead + 2
