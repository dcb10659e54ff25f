"""Later data for an earlier model: ids that it does not have are its id 0."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from bagpipe.data.base import Batch, BatchSource, FeatureSpec


@dataclass(frozen=True, kw_only=True)
class KnownIds:
    """A `BatchSource` whose dictionaries extend those of a model.

    Id 0 is what the model's dictionaries give to values that they do not have.
    """

    source: BatchSource
    features: tuple[FeatureSpec, ...]
    """Those of the source, with the sizes of the model's tables."""

    @property
    def num_dense(self) -> int:
        """Number of dense features per sample."""
        return self.source.num_dense

    @property
    def label_names(self) -> tuple[str, ...]:
        """The names of the labels."""
        return self.source.label_names

    @property
    def has_weights(self) -> bool:
        """Whether every batch has weights."""
        return self.source.has_weights

    @property
    def num_samples(self) -> int:
        """Number of samples in one epoch."""
        return self.source.num_samples

    def batches(
        self, *, batch_size: int, epoch: int = 0, start: int = 0, drop_last: bool = False
    ) -> Iterator[Batch]:
        """Yields the batches of one epoch; see `BatchSource.batches`."""
        for read in self.reads(
            batch_size=batch_size, epoch=epoch, start=start, drop_last=drop_last
        ):
            yield read()

    def reads(
        self, *, batch_size: int, epoch: int = 0, start: int = 0, drop_last: bool = False
    ) -> Iterator[Callable[[], Batch]]:
        """See `BatchSource.reads`."""
        for read in self.source.reads(
            batch_size=batch_size, epoch=epoch, start=start, drop_last=drop_last
        ):
            yield partial(self._known, read)

    def _known(self, read: Callable[[], Batch]) -> Batch:
        batch = read()
        sparse, size = batch.sparse, batch.batch_size
        limits = np.array([feature.num_embeddings for feature in self.features])
        ends = sparse.offsets
        of_values = limits.repeat(size if ends is None else np.diff(ends[::size]))
        values = np.where(sparse.values < of_values, sparse.values, np.int32(0))
        return replace(batch, sparse=replace(sparse, values=values))
