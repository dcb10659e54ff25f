"""What a step reads: torch batches made of the reader's numpy ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bagpipe.data.base import Batch
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
