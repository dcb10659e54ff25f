"""Turns raw blocks into the record batches that are written.

What a person should know about the data is counted on the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

import numpy as np

from bagpipe.data.base import Split
from bagpipe.data.manifest import FeatureEntry
from bagpipe.data.raw import RawBlock, RawSource
from bagpipe.data.unseen import UsedRows
from bagpipe.data.vocabulary import Vocabulary
from bagpipe.data.writer import prepared_schema, record_batch
from bagpipe.types import Float32Array

STRETCH_ROWS: Final = 1024


class Encoder:
    """Turns blocks of one source into record batches of `schema`.

    Args:
        source: Where the blocks come from.
        vocabularies: The vocabulary of each table.
        transform: What is done to dense features.
    """

    def __init__(
        self,
        source: RawSource,
        vocabularies: Mapping[str, Vocabulary],
        transform: Literal["log", "none"],
    ) -> None:
        self.features = tuple(
            FeatureEntry(name=feature.name, table=feature.table, multi_hot=feature.multi_hot)
            for feature in source.features
        )
        self.schema = prepared_schema(self.features, len(source.dense_names))
        self.used = UsedRows(vocabularies)
        self.clustering = LabelClustering()
        self._vocabularies, self._transform = vocabularies, transform
        self._dense_names = source.dense_names
        self._num_clipped = np.zeros(len(source.dense_names), np.int64)

    def encode(self, block: RawBlock, split: Split) -> Any:
        """The record batch of a block whose rows all go to `split`."""
        ids = []
        for feature, keys in zip(self.features, block.keys, strict=True):
            values = self._vocabularies[feature.table].ids(keys.values)
            ids.append((values, None if keys.offsets is None else keys.offsets.astype(np.int32)))
            if split == "train":
                self.used.add(feature.table, values)
        if split == "train":
            self.clustering.add(block.labels)
        dense = block.dense
        if self._transform == "log":
            self._num_clipped += np.count_nonzero(dense < 0, axis=0)
            dense = log_transform(dense)
        return record_batch(self.schema, block.labels, dense, ids)

    @property
    def num_clipped(self) -> dict[str, int]:
        """How many values below 0 the transform has made 0, by dense feature."""
        counts = zip(self._dense_names, self._num_clipped.tolist(), strict=True)
        return {name: count for name, count in counts if count}


def log_transform(dense: Float32Array) -> Float32Array:
    """``log(max(x, 0) + 1)`` in float32, as the DLRM reference does.

    Source: facebookresearch/dlrm, data_utils.py.
    """
    transformed: Float32Array = np.log(np.maximum(dense, np.float32(0)) + np.float32(1))
    return transformed


class LabelClustering:
    """Measures how much the labels of neighbouring rows are alike.

    The share is the part of the label's variance that lies between stretches of STRETCH_ROWS rows,
    beyond what it would be in random order: the intraclass correlation. It is 0 when rows come as
    if shuffled, and 1 when they are sorted by label.
    """

    def __init__(self) -> None:
        self._num_stretches = 0
        self._sum = self._sum_of_squares = self._sum_of_squared_means = 0.0

    def add(self, labels: Float32Array) -> None:
        """Takes the next labels (n,); those after their last whole stretch are left out."""
        whole = len(labels) // STRETCH_ROWS
        stretches = labels[: whole * STRETCH_ROWS].astype(np.float64).reshape(whole, STRETCH_ROWS)
        means = stretches.mean(axis=1)
        self._num_stretches += whole
        self._sum += float(means.sum())
        self._sum_of_squares += float((stretches**2).mean(axis=1).sum())
        self._sum_of_squared_means += float((means**2).sum())

    @property
    def share(self) -> float | None:
        """From 0 to 1, or None with fewer than two stretches or with equal labels."""
        if self._num_stretches < 2:
            return None
        mean = self._sum / self._num_stretches
        total = self._sum_of_squares / self._num_stretches - mean**2
        between = self._sum_of_squared_means / self._num_stretches - mean**2
        if total <= 0:
            return None
        by_chance = (1 - 1 / self._num_stretches) / STRETCH_ROWS
        return min(max((between / total - by_chance) / (1 - by_chance), 0.0), 1.0)
