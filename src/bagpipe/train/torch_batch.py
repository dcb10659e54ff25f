"""A batch as the dense part takes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bagpipe.data.base import Batch
from bagpipe.types import Float32Array, Jagged


@dataclass(frozen=True, kw_only=True)
class TorchBatch:
    """One step's data, which shares the memory of the reader's arrays or lies on the device.

    The sparse part stays on the host.
    """

    dense: Tensor  # (B, num_dense) float32
    sparse: Jagged
    labels: Tensor  # (B,) or (B, L) float32
    weights: Tensor | None = None  # (B,) float32, of the samples

    @classmethod
    def of(cls, batch: Batch) -> TorchBatch:
        """Shares the arrays' memory."""
        arrays, make = cls.moved(batch)
        return make([torch.from_numpy(array) for array in arrays])

    @classmethod
    def moved(
        cls, batch: Batch
    ) -> tuple[Sequence[Float32Array], Callable[[Sequence[Tensor]], TorchBatch]]:
        """For `bagpipe.lookahead(move=...)`: all but the sparse part goes to the device."""
        weights = () if batch.weights is None else (batch.weights,)
        return (batch.dense, batch.labels, *weights), lambda tensors: cls(
            dense=tensors[0],
            sparse=batch.sparse,
            labels=tensors[1],
            weights=tensors[2] if weights else None,
        )

    @property
    def batch_size(self) -> int:
        return len(self.labels)
