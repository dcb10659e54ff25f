"""What a step reads: torch batches made of the reader's numpy ones, from any position on, over as many epochs as it takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from bagpipe.data.base import Batch, BatchSource
from bagpipe.oracle.stream import Deferred
from bagpipe.train.checkpoint import Position
from bagpipe.types import Float32Array, Jagged


@dataclass(frozen=True, kw_only=True)
class TorchBatch:
    """One step's data. The sparse part stays on the host, where the oracle reads it."""

    dense: Tensor  # (B, num_dense) float32
    sparse: Jagged
    labels: Tensor  # (B,) float32

    @classmethod
    def of(cls, batch: Batch, *, pin_memory: bool = False) -> TorchBatch:
        """Shares the arrays' memory, or copies dense features and labels into pinned memory, for a copy behind compute."""
        dense, labels = (_pinned(array) if pin_memory else torch.from_numpy(array) for array in (batch.dense, batch.labels))
        return cls(dense=dense, sparse=batch.sparse, labels=labels)

    def to(self, device: torch.device) -> TorchBatch:
        """Dense features and labels on `device`; itself on a CPU."""
        if device.type == "cpu":
            return self
        dense, labels = (tensor.to(device, non_blocking=True) for tensor in (self.dense, self.labels))
        return TorchBatch(dense=dense, sparse=self.sparse, labels=labels)

    @property
    def batch_size(self) -> int:
        return len(self.labels)


def _pinned(array: Float32Array) -> Tensor:
    """A copy in pinned memory. Made by numpy: torch would share it between threads, which then wait for cores (2 ms for 1 MB)."""
    pinned = torch.empty(array.shape, pin_memory=True)
    np.copyto(pinned.numpy(), array)
    return pinned


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Which batches a run trains: `num_steps` of them, `num_batches` an epoch."""

    batch_size: int
    drop_last: bool
    num_batches: int
    num_steps: int

    def batch_size_of(self, step: int, num_samples: int) -> int:
        """Samples of the batch of step `step`, from 0, of an epoch of `num_samples`: the last one may be smaller."""
        return min(self.batch_size, num_samples - step % self.num_batches * self.batch_size)

    def position_after(self, step: int) -> Position:
        """The next batch after `step` steps."""
        epoch, batch = divmod(step, self.num_batches)
        return Position(epoch=epoch, batch=batch)


@dataclass(frozen=True, kw_only=True)
class RemainingBatches:
    """The batches of a run from `start` to its end, to be read where they are de-duplicated. Can be sent to another process."""

    source: BatchSource
    schedule: Schedule
    start: Position

    def __iter__(self) -> Iterator[Deferred[Batch]]:
        schedule, epoch, first = self.schedule, self.start.epoch, self.start.batch
        left = schedule.num_steps - (epoch * schedule.num_batches + first)
        while left > 0:
            reads = self.source.reads(batch_size=schedule.batch_size, epoch=epoch, start=first, drop_last=schedule.drop_last)
            for read in islice(reads, left):
                yield Deferred(read)
            left -= schedule.num_batches - first
            epoch, first = epoch + 1, 0
