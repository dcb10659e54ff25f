"""One rank's side of the arms of `trainers` that are Bagpipe, and of the one without embeddings.

    bagpipe      Bagpipe as it is: reader, oracle, transfers and exchanges live
    no_overlap   the same plans with everything that trainers send each other on the critical path
    by_nccl      Bagpipe with rows that travel by NCCL, where they would by peer memory
    one_trainer  Bagpipe on rank 0 alone with one trainer's batch: tells what N trainers gain
    dense        no embedding work: the dense part and its averaged gradients, about the least that
                 a step can take
    dense_alone  the same without averaging: tells what averaging takes

The peers are in `peers` (`replicated`, `hashed`) and `torchrec`. On GPUs NCCL averages gradients of
the dense part in all arms but those of Bagpipe whose rows travel by peer memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from bagpipe.cache.averaging import PeerAverage
from bagpipe.data.base import Batch
from bagpipe.distributed.communicator import Communicator, Moment
from bagpipe.types import Group, Jagged
from benchmarks.gpu.arms import BagpipeArm, DenseArm, StepArm
from benchmarks.workloads import Workload


@dataclass(frozen=True, kw_only=True)
class Share:
    """One rank's samples of a global batch, made before the arms start."""

    dense: Tensor  # (B, num_dense) float32 on the device
    labels: Tensor  # (B,) float32 on the device
    sparse: Jagged  # on the host

    @classmethod
    def of(cls, batch: Batch, rank: int, num_trainers: int, device: torch.device) -> Share:
        """Takes a rank's samples out of a global batch."""
        own = batch.share(rank, num_trainers)
        return cls(
            dense=torch.tensor(own.dense, device=device),
            labels=torch.tensor(own.labels, device=device),
            sparse=own.sparse,
        )


class Sent:
    """Bytes that a rank has sent to others, by step."""

    def __init__(self) -> None:
        self._bytes: defaultdict[tuple[int, Moment], int] = defaultdict(int)

    def add(self, step: int, moment: Moment, num_bytes: int) -> None:
        """Counts a message; only one thread may do so for each moment."""
        self._bytes[step, moment] += num_bytes

    def of_steps(self, first: int, end: int) -> dict[Moment, int]:
        """Bytes sent by the steps from `first` to before `end`, by moment."""
        steps = range(first, end)
        return {"urgent": self._sum(steps, "urgent"), "overlapped": self._sum(steps, "overlapped")}

    def _sum(self, steps: Iterable[int], moment: Moment) -> int:
        return sum(self._bytes[step, moment] for step in steps)


class TrainersArm(StepArm, Protocol):
    """One rank's side of an arm, which counts what it sends."""

    sent: Sent


@dataclass(kw_only=True)
class CountingCommunicator(Communicator):
    """A `Communicator` that counts what it sends to other ranks."""

    sent: Sent = field(default_factory=Sent)

    @classmethod
    def of(cls, base: Communicator, name: str) -> CountingCommunicator:
        """Takes over the process groups of `base`.

        Several arms share the key-value store, so this one's keys begin with `name`.
        """
        settings = {each.name: getattr(base, each.name) for each in fields(base) if each.init}
        return cls(**settings | {"kv_store": dist.PrefixStore(name, base.kv_store)})  # type: ignore[attr-defined]

    def note_sent(self, num_bytes: int, *, moment: Moment, step: int) -> None:
        """See `Communicator.note_sent`."""
        self.sent.add(step, moment, num_bytes)  # plans send nothing to the rank itself


class DenseShareArm(DenseArm):
    """The dense part alone, on a rank's shares, which sends no embeddings."""

    def __init__(self, name: str, shares: Sequence[Share]) -> None:
        super().__init__(shares)
        self.name = name
        self.sent = Sent()


class BagpipeShareArm(BagpipeArm):
    """Bagpipe, as one rank of several or alone."""

    def __init__(
        self,
        name: str,
        workload: Workload,
        group: Group,
        batches: Iterable[Any],
        *,
        device: torch.device,
        communicator: CountingCommunicator | None = None,
        overlap: bool = True,
    ) -> None:
        """Makes the arm.

        Args:
            name: of the arm.
            workload: what is trained.
            group: the workload's tables.
            batches: global ones; without a communicator, those of this trainer alone.
            device: where the cache and the dense part are.
            communicator: of all ranks; None: this trainer is alone.
            overlap: as in `bagpipe.lookahead`.
        """
        super().__init__(
            workload,
            group,
            batches,
            device=device,
            name=name,
            communicator=communicator,
            overlap=overlap,
        )
        self.sent = Sent() if communicator is None else communicator.sent

    @property
    def dense_average(self) -> PeerAverage | None:
        """What averages the dense part's gradients in place of NCCL, as in `bagpipe train`."""
        executor = self.embeddings.executor
        return None if executor is None else executor.dense_average
