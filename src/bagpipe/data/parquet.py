"""Any Parquet files as a raw source, by a mapping of their columns.

Only the mapped columns are read. Row groups are read in blocks of BLOCK_ROWS, and page checksums
are compared in files that have them. Row positions in messages count from 0 within a file, as data
frames do.

A column may have different types in different files if both types give a value the same meaning,
e.g. pandas' categories with an index of 8 bits on one day and of 16 bits on the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bagpipe.data.arrow_keys import (
    is_list,
    key_kind,
    list_keys,
    single_keys,
    split_keys,
    value_kind,
)
from bagpipe.data.arrow_numbers import dense_values, is_number, label_values, weight_values
from bagpipe.data.raw import BlockPlace, Keys, Problems, Progress, RawBlock, RawFeature
from bagpipe.errors import DataError
from bagpipe.types import BoolArray, Int64Array

if TYPE_CHECKING:
    from bagpipe.config.data import ParquetFiles, SparseColumn

BLOCK_ROWS: Final = 65_536
_FLOAT_SIGN: Final = 0x7FFF_FFFF_FFFF_FFFF


class ParquetSource:
    """Parquet files in the given order, as a `RawSource`.

    Args:
        files: The files to read.
        config: Which columns they are read by, and as what.
        has_label: Whether the files have the labels' columns; else all labels are 0.
        block_rows: The most rows of a block.

    Raises:
        DataError: A mapped column is missing or of different types, there are no rows, or a file
            can't be read.
    """

    def __init__(
        self,
        files: Sequence[Path],
        config: ParquetFiles,
        *,
        has_label: bool = True,
        block_rows: int = BLOCK_ROWS,
    ) -> None:
        self._files, self._config = tuple(files), config
        self._has_label, self._block_rows = has_label, block_rows
        self._columns = _mapped_columns(config, has_label=has_label)
        kinds = self._check_schemas()
        self.features = tuple(
            _raw_feature(column, kinds.get(column.column, [])) for column in config.sparse
        )
        self.dense_names = config.dense
        self.has_time = config.time is not None

    def num_rows(self) -> int:
        """Number of rows in all files, from their footers."""
        return sum(_open(file).metadata.num_rows for file in self._files)

    def times(self) -> Iterator[Int64Array]:
        """Yields the time column without the rows that have no time."""
        name = str(self._config.time)
        for file in self._files:
            for batch in _batches(file, [name], self._block_rows):
                values, good = _time_keys(batch.column(0), f"{file}, column {name!r}")
                yield values[good]

    def blocks(
        self, problems: Problems, progress: Callable[[Progress], None], stage: str
    ) -> Iterator[RawBlock]:
        """Yields all rows that can be read; the others go to `problems`."""
        total, row = self.num_rows(), 0
        for file in self._files:
            first_row = row
            for batch in _batches(file, self._columns, self._block_rows):
                yield self._block(batch, row, BlockPlace(file, row - first_row, problems))
                row += len(batch)
                progress(Progress(stage=stage, done=row, total=total, unit="rows"))

    def _check_schemas(self) -> dict[str, list[Any]]:
        """The types that each mapped column has, without the type of columns that are all null."""
        first: dict[str, tuple[Any, Path]] = {}
        kinds: dict[str, list[Any]] = {}
        for file in self._files:
            schema = schema_of(file)
            for name in self._columns:
                if (count := schema.names.count(name)) != 1:
                    has = f"has {count} columns named" if count else "has no column"
                    raise DataError(
                        f"{file} {has} {name!r}; its columns are {', '.join(schema.names)}"
                    )
                kind = schema.field(name).type
                if pa.types.is_null(kind) and name != self._config.time:
                    continue  # a column without a value goes with any other
                earlier, where = first.setdefault(name, (kind, file))
                kinds.setdefault(name, []).append(kind)
                if self._meaning(name, kind) != self._meaning(name, earlier):
                    raise DataError(
                        f"{file}: column {name!r} is of type {kind}, "
                        f"but {earlier} in {where}: write both with one type"
                    )
        if self.num_rows() == 0:
            raise DataError(f"{', '.join(map(str, self._files))}: no rows")
        return kinds

    def _meaning(self, name: str, kind: Any) -> list[object]:
        """What about a column's type must be the same in all files, for each of its uses."""
        config = self._config
        uses: list[object] = [str(kind)] if name == config.time else []
        if name in (*_label_columns(config), config.weight, *config.dense):
            uses.append(is_number(kind) or str(kind))
        for column in config.sparse:
            if column.column == name:
                key = key_kind(kind)
                uses.append((is_list(kind), str(kind) if key == "other" else key))
        return uses

    def _block(self, batch: Any, row: int, place: BlockPlace) -> RawBlock:
        config = self._config
        good = np.ones(len(batch), np.bool_)
        labels = np.zeros((len(batch), len(config.all_labels)), np.float32)
        for index, label in enumerate(config.all_labels if self._has_label else ()):
            values = batch.column(label.column)
            labels[:, index] = label_values(values, label.column, label.at_least, good, place)
        dense = np.empty((len(batch), len(config.dense)), np.float32)
        for index, name in enumerate(config.dense):
            dense[:, index] = dense_values(batch.column(name), name, good, place)
        weights = None
        if config.weight is not None:
            weights = weight_values(batch.column(config.weight), config.weight, good, place)
        times = None
        if config.time is not None:
            times, timed = _time_keys(
                batch.column(config.time), f"{place.file}, column {config.time!r}"
            )
            place.refuse(
                ~timed,
                good,
                "time is missing",
                f"column {config.time!r} is missing or not finite",
                None,
            )
        keys = tuple(
            feature_keys(batch.column(column.column), column, feature.multi_hot, place.file)
            for column, feature in zip(config.sparse, self.features, strict=True)
        )
        block = RawBlock(
            rows=np.arange(row, row + len(batch)),
            labels=labels[:, 0] if len(config.all_labels) == 1 else labels,
            weights=weights,
            dense=dense,
            keys=keys,
            times=times,
        )
        return block if good.all() else block.take(np.flatnonzero(good))


class Column(Protocol):
    """Which column a feature is read from."""

    @property
    def column(self) -> str:
        """Its name."""

    @property
    def separator(self) -> str | None:
        """What splits its strings into values, if they hold several."""


def _label_columns(config: ParquetFiles) -> list[str]:
    return [label.column for label in config.all_labels]


def _mapped_columns(config: ParquetFiles, *, has_label: bool) -> list[str]:
    names = _label_columns(config) if has_label else []
    names += [config.weight] if config.weight else []
    names += [*config.dense, *(column.column for column in config.sparse)]
    return list(dict.fromkeys(names + ([config.time] if config.time else [])))


def _raw_feature(column: SparseColumn, kinds: Sequence[Any]) -> RawFeature:
    return RawFeature(
        name=column.feature,
        table=column.table_name,
        num_embeddings=column.num_embeddings,
        multi_hot=any(map(is_list, kinds)) or column.separator is not None,
        kind=value_kind(kinds),
        column=column.column,
        separator=column.separator,
    )


def feature_keys(array: Any, column: Column, multi_hot: bool, file: Path | str) -> Keys:
    """The keys of a feature's column.

    Raises:
        DataError: The column is of a type that can't be keys.
    """
    where = f"{file}, column {column.column!r}"
    if column.separator is not None:
        return split_keys(array, column.separator, where)
    if not multi_hot:
        return single_keys(array, where)
    return list_keys(
        array.cast(pa.list_(pa.null())) if pa.types.is_null(array.type) else array, where
    )


def _time_keys(array: Any, where: str) -> tuple[Int64Array, BoolArray]:
    """Integers in the order of the times (n,), and which rows have one (n,)."""
    kind = array.type
    present: BoolArray = array.is_valid().to_numpy(zero_copy_only=False)
    if pa.types.is_floating(kind):
        times = pc.fill_null(array.cast(pa.float64()), 0.0).to_numpy(zero_copy_only=False)
        bits = (times + 0.0).view(np.int64)  # + 0.0 turns -0.0 into 0.0
        # IEEE 754 numbers compare as their bits do once the negative ones are turned round.
        return np.where(bits < 0, bits ^ _FLOAT_SIGN, bits), present & np.isfinite(times)
    if pa.types.is_date32(kind) or pa.types.is_time32(kind):
        array = array.cast(pa.int32())
    elif pa.types.is_temporal(kind):
        array = array.cast(pa.int64())
    elif not pa.types.is_integer(kind):
        raise DataError(
            f"{where} is of type {kind}; a time must be an integer, a float, a date or a timestamp"
        )
    values: Int64Array = pc.fill_null(array, 0).to_numpy(zero_copy_only=False).astype(np.int64)
    return values, present


def schema_of(file: Path) -> Any:
    """The Arrow schema of a Parquet file. DataError: it can't be read."""
    return _open(file).schema_arrow


def _open(file: Path) -> Any:
    try:
        return pq.ParquetFile(file, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} can't be read as Parquet: {error}") from error


def _batches(file: Path, columns: list[str], block_rows: int) -> Iterator[Any]:
    try:
        yield from _open(file).iter_batches(batch_size=block_rows, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{file} can't be read to its end, it is damaged or on a bad disk: {error}"
        ) from error
