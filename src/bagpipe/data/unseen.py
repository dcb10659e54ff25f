"""How many of validation's lookups are of values that training does not have.

With a dictionary these have id 0: values that are new, or too rare in training to have an id of
their own. With hashing a new value has the row of its hash like any other, which some value of
training may share, and then it looks as if it had been trained. But values fall on rows evenly: of
new ones the share that falls on rows that training uses is the share of rows that it uses. So from
the lookups of unused rows, which are counted, the lookups of new values are estimated, unless
training uses nearly all rows.
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
    """Which rows of each table training looks up; a byte a row."""

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
        """Notes ids (n,) of training."""
        if table not in self._dictionaries:
            self._used[table][ids] = True

    def count_unseen(
        self, files: Sequence[Path], features: Sequence[FeatureEntry]
    ) -> dict[str, UnseenEntry]:
        """For each feature its lookups in the prepared `files` of validation, once all of training
        has been added.
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
