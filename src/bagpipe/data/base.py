"""What a reader yields: batches of numpy arrays.

Their order depends on nothing but the data and the configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeAlias

import numpy as np

from bagpipe.jagged import share_bounds, share_of
from bagpipe.types import Float32Array, Jagged

Split: TypeAlias = Literal["train", "validation", "test"]

_NO_IDS = np.empty(0, np.int32)


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """A categorical feature of a data set, and the table that its ids belong to."""

    name: str
    table: str
    num_embeddings: int
    multi_hot: bool = False  # whether a bag may hold another number of ids than one


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One step's data on the host."""

    dense: Float32Array  # (B, num_dense)
    sparse: Jagged
    labels: Float32Array  # (B,), or (B, L) of L labels
    weights: Float32Array | None = None  # (B,) 0 or more; None: all samples count alike

    @property
    def batch_size(self) -> int:
        return len(self.labels)

    def without_ids(self) -> Batch:
        """The same batch with no features.

        Training loops get it: once the ids are planned nobody needs them.
        """
        return replace(self, sparse=Jagged(keys=(), values=_NO_IDS, batch_size=self.batch_size))

    def share(self, rank: int, num_trainers: int) -> Batch:
        """The samples of one rank, when this is the global batch of several trainers."""
        begin, end = share_bounds(self.batch_size, rank, num_trainers)
        sparse = share_of(self.sparse, rank, num_trainers)
        return Batch(
            dense=self.dense[begin:end],
            sparse=sparse,
            labels=self.labels[begin:end],
            weights=None if self.weights is None else self.weights[begin:end],
        )


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where the reader continues: the next batch to train."""

    epoch: int = 0
    batch: int = 0


class BatchSource(Protocol):
    """A split of a data set that can be read from any batch on, always in the same order."""

    @property
    def features(self) -> tuple[FeatureSpec, ...]:
        """The features of every batch, in the order of its `sparse.keys`."""

    @property
    def num_dense(self) -> int:
        """Number of dense features per sample."""

    @property
    def label_names(self) -> tuple[str, ...]:
        """The names of the labels of every batch."""

    @property
    def has_weights(self) -> bool:
        """Whether every batch has weights; else none has."""

    @property
    def num_samples(self) -> int:
        """Number of samples in one epoch."""

    def batches(
        self, *, batch_size: int, epoch: int = 0, start: int = 0, drop_last: bool = False
    ) -> Iterator[Batch]:
        """Yields the batches of one epoch.

        Args:
            batch_size: Samples per batch; the last batch may have fewer.
            epoch: Number of the epoch, from 0.
            start: Number of the first batch to yield.
            drop_last: Whether a last batch with fewer samples is left out.
        """

    def reads(
        self, *, batch_size: int, epoch: int = 0, start: int = 0, drop_last: bool = False
    ) -> Iterator[Callable[[], Batch]]:
        """Yields the batches of `batches` as calls that read them.

        The calls may run in any order, and in several threads at once.
        """


def count_batches(num_samples: int, batch_size: int, *, drop_last: bool = False) -> int:
    """Number of batches in an epoch of `num_samples`.

    Raises:
        ValueError: `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, must be at least 1")
    return num_samples // batch_size if drop_last else -(-num_samples // batch_size)
