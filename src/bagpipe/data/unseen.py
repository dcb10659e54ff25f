"""How many of validation's lookups are of values that training does not have.

With a dictionary such values have id 0: they are new, or too rare in training for an id of their
own.

With hashing a new value gets the row of its hash like any other. If a value of training shares that
row, the new one looks as if it had been trained. But values fall on rows evenly: the share of new
values that fall on rows that training uses is the share of rows that training uses. So the lookups
of unused rows are counted, and from them the lookups of new values are estimated, unless training
uses nearly all rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from bagpipe.data.manifest import FeatureEntry, UnseenEntry
from bagpipe.data.vocabulary import DictionaryVocabulary, Vocabulary
from bagpipe.types import Int32Array


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
                    for column, feature in zip(batch.columns[2:], features, strict=True):
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
