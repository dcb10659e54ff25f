"""What a reader yields: batches of numpy arrays, in an order that depends on nothing but the data and the configuration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from bagpipe.types import Float32Array, Jagged


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One step's data on the host."""

    dense: Float32Array  # (B, num_dense)
    sparse: Jagged
    labels: Float32Array  # (B,)

    @property
    def batch_size(self) -> int:
        return len(self.labels)


class BatchSource(Protocol):
    """A split of a data set that can be read from any batch on, always in the same order."""

    @property
    def num_dense(self) -> int:
        """Dense features a sample."""

    @property
    def num_samples(self) -> int:
        """Samples in one epoch."""

    def batches(self, *, batch_size: int, epoch: int = 0, start: int = 0, drop_last: bool = False) -> Iterator[Batch]:
        """Yields the batches of one epoch from batch number `start` on; the last one may be smaller unless dropped."""
