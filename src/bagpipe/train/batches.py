"""What a step reads: torch batches made of the reader's numpy ones, from any position on, over as many epochs as it takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from bagpipe.data.base import Batch, BatchSource
from bagpipe.train.checkpoint import Position
from bagpipe.types import Jagged


@dataclass(frozen=True, kw_only=True)
class TorchBatch:
    """One step's data. The sparse part stays on the host, where the oracle reads it."""

    dense: Tensor  # (B, num_dense) float32
    sparse: Jagged
    labels: Tensor  # (B,) float32

    @classmethod
    def of(cls, batch: Batch, *, pin_memory: bool = False) -> TorchBatch:
        """Shares the arrays' memory, or copies dense features and labels into pinned memory, for a copy behind compute."""
        dense, labels = torch.from_numpy(batch.dense), torch.from_numpy(batch.labels)
        if pin_memory:
            dense, labels = dense.pin_memory(), labels.pin_memory()
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


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Which batches a run trains: `num_steps` of them, `num_batches` an epoch."""

    batch_size: int
    drop_last: bool
    num_batches: int
    num_steps: int

    def position_after(self, step: int) -> Position:
        """The next batch after `step` steps."""
        epoch, batch = divmod(step, self.num_batches)
        return Position(epoch=epoch, batch=batch)

    def remaining(self, source: BatchSource, start: Position, *, pin_memory: bool) -> Iterator[TorchBatch]:
        """The batches from `start` to the end of the run."""
        left = self.num_steps - (start.epoch * self.num_batches + start.batch)
        epoch, first = start.epoch, start.batch
        while left > 0:
            batches = source.batches(batch_size=self.batch_size, epoch=epoch, start=first, drop_last=self.drop_last)
            for batch in islice(batches, left):
                yield TorchBatch.of(batch, pin_memory=pin_memory)
            left -= self.num_batches - first
            epoch, first = epoch + 1, 0
