"""The data sections: what a run reads, and what `bagpipe data prepare` turns into files.

`DataConfig` is the one, `PrepareConfig` the other. A `kind` tells their variants apart. Only shapes
and limits are checked here. Whether files and columns exist is for the reader to say, with a
DataError.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from bagpipe.config.base import Count, Samples, Section, Seed, Share
from bagpipe.limits import MAX_EMBEDDING_DIM

NUM_CRITEO_TABLES = 26
BagLength: TypeAlias = Annotated[int, Field(ge=0, le=10_000)]
NumEmbeddings: TypeAlias = Annotated[int, Field(ge=1, lt=2**31)]
Cardinalities: TypeAlias = Annotated[tuple[NumEmbeddings, ...], Field(max_length=10_000)]
Name: TypeAlias = Annotated[str, Field(min_length=1)]


class SyntheticData(Section):
    """A Criteo-shaped stream made on the fly; see `bagpipe.data.synthetic` for what it draws."""

    kind: Literal["synthetic"]
    num_samples: Samples = 1_000_000
    num_validation_samples: Samples = 65_536
    num_test_samples: Annotated[int, Field(ge=0, le=10**12)] = 0
    num_embeddings: Literal["kaggle", "terabyte"] | Cardinalities = "kaggle"
    max_num_embeddings: NumEmbeddings | None = None
    """Every table is cut to at most this many rows."""
    num_dense: int = Field(default=13, ge=0, le=MAX_EMBEDDING_DIM)
    skew: float = Field(default=1.1, ge=0.0, le=8.0)
    """Zipf exponent: 0 draws ids uniformly."""
    multi_hot: dict[str, BagLength | tuple[BagLength, BagLength]] = Field(default_factory=dict)
    """Feature name -> ids in each of its bags: a number, or [least, most] to draw uniformly. Other
    features have one."""
    seed: Seed = 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.num_embeddings:
            raise ValueError("num_embeddings is an empty list: at least one table is needed")
        for feature, length in self.multi_hot.items():
            if isinstance(length, tuple) and length[0] > length[1]:
                raise ValueError(
                    f"multi_hot.{feature} is {list(length)}: the least must not be above the most"
                )
        return self


class PreparedData(Section):
    """A folder that `bagpipe data prepare` has written."""

    kind: Literal["prepared"]
    folder: Path
    features: tuple[Name, ...] | None = None
    """The features to read, in this order; all of them when left out."""
    labels: Annotated[tuple[Name, ...], Field(min_length=1)] | None = None
    """The labels to learn, in this order; all of them when left out."""
    ignore_weights: bool = False
    """Whether all samples count alike, in training and in scores, though the data have weights."""
    shuffle: bool = False
    """Whether each epoch reads the training split in another order. The validation split keeps its
    order."""
    seed: Seed = 0
    verify: bool = True
    """Whether the checksum of every file is compared before the first batch, which reads all of the
    split once."""


DataConfig: TypeAlias = Annotated[SyntheticData | PreparedData, Field(discriminator="kind")]


def data_name(config: SyntheticData | PreparedData) -> str:
    """What a plot calls the data."""
    if isinstance(config, PreparedData):
        return str(config.folder)
    tables = config.num_embeddings
    of_what = f"{len(tables)} tables" if isinstance(tables, tuple) else f"Criteo {tables.title()}"
    return f"synthetic data ({of_what}, skew {config.skew:g})"


class CriteoFiles(Section):
    """Criteo's raw text: label, I1..I13, C1..C26, tabs between, no header.

    A file is gzip where its name ends in `.gz`, else plain.
    """

    kind: Literal["criteo"]
    files: tuple[Name, ...] = Field(min_length=1)
    """Paths or glob patterns, read in this order. The files of one pattern are sorted by name. A
    name with brackets or stars that exists is that file, not a pattern."""
    num_embeddings: Literal["kaggle", "terabyte"] | NumEmbeddings | Cardinalities | None = None
    """Rows per table: the counts of a data set, one number for all tables, or 26 numbers."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if isinstance(self.num_embeddings, tuple) and len(self.num_embeddings) != NUM_CRITEO_TABLES:
            raise ValueError(
                f"num_embeddings lists {len(self.num_embeddings)} tables, Criteo has "
                f"{NUM_CRITEO_TABLES}"
            )
        return self


class LabelColumn(Section):
    """The column with the label: a number in [0, 1], or any number with a threshold."""

    column: Name
    name: Name | None = None
    """The label's name; the column's name when left out."""
    at_least: float | None = None
    """The label is 1 where the column's value is at least this, else 0."""

    @property
    def label(self) -> str:
        """The label's name."""
        return self.name or self.column


class SparseColumn(Section):
    """One categorical feature: integers, strings, booleans, lists of them, or strings to split."""

    column: Name
    name: Name | None = None
    """The feature's name; the column's name when left out."""
    table: Name | None = None
    """Features with the same table share its rows; the feature's name when left out."""
    num_embeddings: NumEmbeddings | None = None
    separator: str | None = Field(default=None, min_length=1)
    """Splits a string column into a multi-valued feature, e.g. "|"."""

    @property
    def feature(self) -> str:
        """The feature's name."""
        return self.name or self.column

    @property
    def table_name(self) -> str:
        """The table's name."""
        return self.table or self.feature


class ParquetFiles(Section):
    """Any Parquet files, with a mapping of their columns."""

    kind: Literal["parquet"]
    files: tuple[Name, ...] = Field(min_length=1)
    label: LabelColumn | None = None
    """What is learned. Required, unless `labels` are given."""
    labels: tuple[LabelColumn, ...] = ()
    """Several labels in place of `label`, for a model that learns them all."""
    dense: tuple[Name, ...] = ()
    sparse: tuple[SparseColumn, ...] = Field(min_length=1)
    weight: Name | None = None
    """The column with each sample's weight, 0 or more. Left out: all samples count alike."""
    time: Name | None = None
    """The column by which a split by time goes: integers, floats, dates or timestamps. Left out:
    the order of rows."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [column.feature for column in self.sparse]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"feature {name!r} is given more than once: set `name` to tell them apart"
                )
        for name in self.dense:
            if self.dense.count(name) > 1:
                raise ValueError(f"dense column {name!r} is given more than once")
        self._check_labels()
        sizes: dict[str, int | None] = {}
        for column in self.sparse:
            if sizes.setdefault(column.table_name, column.num_embeddings) != column.num_embeddings:
                raise ValueError(
                    f"table {column.table_name!r} has num_embeddings {sizes[column.table_name]} "
                    f"for one feature and {column.num_embeddings} for {column.feature!r}: give the "
                    "same number to both"
                )
        return self

    def _check_labels(self) -> None:
        if (self.label is None) == (not self.labels):
            what = "neither is" if self.label is None else "both are"
            raise ValueError(f"give label, or labels where there are several: {what} given")
        labels = [label.label for label in self.all_labels]
        for label in self.all_labels:
            if labels.count(label.label) > 1:
                raise ValueError(
                    f"label {label.label!r} is given more than once: set `name` to tell them apart"
                )
            if label.column in (*self.dense, *(c.column for c in self.sparse), self.time):
                raise ValueError(
                    f"column {label.column!r} is the label, so it can't be a feature or the "
                    "time too"
                )
            if self.weight == label.column:
                raise ValueError(
                    f"column {self.weight!r} is the label, so it can't be the weight too"
                )

    @property
    def all_labels(self) -> tuple[LabelColumn, ...]:
        """The labels' columns, of which there is at least one."""
        return self.labels if self.label is None else (self.label,)


class HashConfig(Section):
    """An id is a hash of the value, modulo the table's num_embeddings."""

    kind: Literal["hash"]


class DictionaryConfig(Section):
    """Ids count from 1 by falling frequency in the training split.

    Id 0 is every value that is new, or rarer than `min_count`. `num_embeddings`, where it is given,
    keeps only the most frequent values.
    """

    kind: Literal["dictionary"]
    min_count: Samples = 1


class SplitConfig(Section):
    """Which rows are held out for validation and for a test."""

    by: Literal["time", "share"] = "time"
    """time: the last rows by prepare.source.time, or without it in the order of reading; share:
    rows by a hash of their number."""
    validation_share: Share = 0.1
    test_share: Share = 0.0
    """Rows that neither train nor choose a model. By time they come after those of validation."""
    seed: Seed = 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.validation_share + self.test_share >= 1.0:
            raise ValueError(
                f"validation_share = {self.validation_share} and test_share = {self.test_share} "
                "leave no rows to train: together they must be below 1"
            )
        return self


class PrepareConfig(Section):
    """The input of `bagpipe data prepare`."""

    output: Path
    source: Annotated[CriteoFiles | ParquetFiles, Field(discriminator="kind")]
    vocabulary: Annotated[HashConfig | DictionaryConfig, Field(discriminator="kind")] = HashConfig(
        kind="hash"
    )
    vocabulary_from: Path | None = None
    """Goes on with the ids of earlier prepared data, or of a run's: known values keep them, and new
    ones get ids behind them."""
    dense_transform: Literal["log", "none"] | None = None
    """log: log(max(x, 0) + 1), as the DLRM reference does, the default for Criteo. Values below 0
    become 0. none: values as they are, the default for Parquet. Missing values are 0 either way."""
    split: SplitConfig = SplitConfig()
    on_error: Literal["raise", "skip"] = "raise"
    """skip: rows that can't be read are left out, counted and reported."""
    overwrite: bool = False
    rows_per_batch: int = Field(default=65_536, ge=1, le=2**24)
    batches_per_file: Count = 64

    @property
    def transform(self) -> Literal["log", "none"]:
        """The dense transform, given or by default."""
        return self.dense_transform or ("log" if self.source.kind == "criteo" else "none")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.vocabulary.kind != "hash":
            return self
        if self.source.kind == "criteo":
            if self.source.num_embeddings is None:
                raise ValueError(
                    "source.num_embeddings is needed with vocabulary.kind = 'hash', e.g. 'kaggle' "
                    "or a number"
                )
            return self
        for column in self.source.sparse:
            if column.num_embeddings is None:
                raise ValueError(
                    f"sparse feature {column.feature!r} needs num_embeddings with vocabulary.kind "
                    "= 'hash'"
                )
        return self
