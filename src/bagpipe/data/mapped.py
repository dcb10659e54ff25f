"""One Arrow file of prepared data, in mapped memory.

Compiled loops read ids and offsets where they lie, without checking bounds. So what a record batch
holds is compared with the manifest before it is used. Whoever wrote the file, it is read within its
bounds or refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

from bagpipe.errors import DataError
from bagpipe.types import Float32Array, Int32Array, Int64Array

_FIRST_FEATURE_COLUMN: Final = 2


@dataclass(frozen=True, kw_only=True)
class View:
    """The columns of one record batch, mapped."""

    labels: Float32Array  # (n,)
    dense: Float32Array  # (n, D)
    words: Int32Array  # the whole file, in which ids and offsets lie
    first_ids: Int64Array  # (F,) where in it each feature's ids begin
    first_offsets: Int64Array  # (F,) and its offsets (n + 1,); -1 for a single-hot feature
    of_samples: tuple[Float32Array, ...]  # (n,) each, of the columns behind the features


class MappedFile:
    """The record batches of one file.

    Raises:
        DataError: The file is not an Arrow file, or has another schema.
    """

    def __init__(self, path: Path, schema: Any, num_features: int) -> None:
        self._path = path
        self._num_features = num_features
        try:
            file = pa.memory_map(str(path)).read_buffer()
            self._reader = pa.ipc.open_file(file)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} can't be read as an Arrow file: {error}") from error
        self._words: Int32Array = np.frombuffer(file, np.int32, count=len(file) // 4)
        if not self._reader.schema.equals(schema):
            raise self._other("columns")
        self.num_record_batches: int = self._reader.num_record_batches

    def view(self, number: int, num_rows: int, columns: Sequence[int]) -> View:
        """The chosen features of one record batch.

        Args:
            number: The record batch's number in the file.
            num_rows: How many rows the manifest says it has.
            columns: The features' numbers in the file.

        Raises:
            DataError: It has another number of rows, or is laid out differently from what is
                prepared.
        """
        try:
            batch = self._reader.get_batch(number)
            batch.validate(full=True)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self._path}, record batch {number}: {error}") from error
        if len(batch) != num_rows:
            raise self._other("rows")
        numbers = batch.column(1).values
        first_ids, first_offsets, ids_and_offsets = [], [], []
        for column in columns:
            feature = batch.column(_FIRST_FEATURE_COLUMN + column)
            is_multi_hot = pa.types.is_list(feature.type)
            ids = feature.values if is_multi_hot else feature
            first_ids.append(self._place(ids))
            first_offsets.append(self._place(feature.offsets) if is_multi_hot else -1)
            ids_and_offsets += [feature, ids]
        of_samples = batch.columns[_FIRST_FEATURE_COLUMN + self._num_features :]
        read = (*batch.columns[:_FIRST_FEATURE_COLUMN], numbers, *ids_and_offsets, *of_samples)
        if any(array.null_count for array in read):
            raise self._other("columns: some have missing values")
        return View(
            labels=batch.column(0).to_numpy(),
            dense=numbers.to_numpy().reshape(num_rows, batch.column(1).type.list_size),
            words=self._words,
            first_ids=np.array(first_ids, np.int64),
            first_offsets=np.array(first_offsets, np.int64),
            of_samples=tuple(column.to_numpy() for column in of_samples),
        )

    def _place(self, column: Any) -> int:
        """Where in the file's words the numbers of an int32 column begin.

        An empty column begins anywhere.
        """
        if len(column) == 0:
            return 0
        place, odd = divmod(
            column.buffers()[1].address + 4 * column.offset - self._words.ctypes.data, 4
        )
        if odd or not 0 <= place <= len(self._words) - len(column):
            raise self._other("buffers: compressed, or laid out otherwise")
        return int(place)

    def _other(self, what: str) -> DataError:
        return DataError(
            f"{self._path} holds other {what} than the manifest says: prepare the data again"
        )
