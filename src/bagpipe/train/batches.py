"""What a step reads: torch batches made of the reader's numpy ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bagpipe.data.base import Batch
from bagpipe.types import Float32Array, Jagged


@dataclass(frozen=True, kw_only=True)
class TorchBatch:
    """One step's data. The sparse part stays on the host."""

    dense: Tensor  # (B, num_dense) float32
    sparse: Jagged
    labels: Tensor  # (B,) float32

    @classmethod
    def of(cls, batch: Batch) -> TorchBatch:
        """Shares the arrays' memory."""
        return cls(
            dense=torch.from_numpy(batch.dense),
            sparse=batch.sparse,
            labels=torch.from_numpy(batch.labels),
        )

    @classmethod
    def moved(
        cls, batch: Batch
    ) -> tuple[Sequence[Float32Array], Callable[[Sequence[Tensor]], TorchBatch]]:
        """For `bagpipe.lookahead(move=...)`: dense features and labels go to the device."""
        return (batch.dense, batch.labels), lambda tensors: cls(
            dense=tensors[0], sparse=batch.sparse, labels=tensors[1]
        )

    @property
    def batch_size(self) -> int:
        return len(self.labels)
