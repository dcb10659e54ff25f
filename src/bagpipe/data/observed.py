"""What preparing observes about the data, for the notes that a person reads (`bagpipe.data.notes`).

Unseen values: how many of validation's lookups are of values that training does not have.

With a dictionary such values have id 0: they are new, or too rare in training for an id of their
own.

With hashing a new value gets the row of its hash like any other. If a value of training shares that
row, the new one looks as if it had been trained. But values fall on rows evenly: the share of new
values that fall on rows that training uses is the share of rows that training uses. So the lookups
of unused rows are counted, and from them the lookups of new values are estimated, unless training
uses nearly all rows.

Label clustering: how much training rows lie grouped by label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa

from bagpipe.data.manifest import FeatureEntry, UnseenEntry
from bagpipe.data.vocabulary import DictionaryVocabulary, Vocabulary
from bagpipe.types import Float32Array, Int32Array

STRETCH_ROWS: Final = 1024


class UsedRows:
    """Which rows of each table training looks up; memory is a byte per row."""

    def __init__(self, vocabularies: Mapping[str, Vocabulary]) -> None:
        self._used = {
            table: np.zeros(vocabulary.num_embeddings, np.bool_)
            for table, vocabulary in vocabularies.items()
        }
        self._dictionaries = {
            table
            for table, vocabulary in vocabularies.items()
            if isinstance(vocabulary, DictionaryVocabulary)
        }
        for table in self._dictionaries:
            self._used[table][1:] = True

    def add(self, table: str, ids: Int32Array) -> None:
        """Notes the ids (n,) of training rows."""
        if table not in self._dictionaries:
            self._used[table][ids] = True

    def count_unseen(
        self, files: Sequence[Path], features: Sequence[FeatureEntry]
    ) -> dict[str, UnseenEntry]:
        """Counts each feature's lookups in validation, once all of training has been added.

        Args:
            files: The prepared files of validation.
            features: The features in column order.
        """
        num_lookups, num_unused = (dict.fromkeys((f.name for f in features), 0) for _ in range(2))
        for file in files:
            with pa.memory_map(str(file)) as source, pa.ipc.open_file(source) as reader:
                for number in range(reader.num_record_batches):
                    batch = reader.get_batch(number)
                    # behind the features may be further labels and weights
                    for feature, column in zip(features, batch.columns[2:], strict=False):
                        ids = (column.flatten() if feature.multi_hot else column).to_numpy()
                        used = self._used[feature.table][ids]
                        num_lookups[feature.name] += len(ids)
                        num_unused[feature.name] += len(ids) - int(np.count_nonzero(used))
        shares = {
            table: 0.0 if table in self._dictionaries else float(used.mean())
            for table, used in self._used.items()
        }
        return {
            feature.name: UnseenEntry(
                num_lookups=num_lookups[feature.name],
                num_unused=num_unused[feature.name],
                used_share=shares[feature.table],
            )
            for feature in features
        }


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
