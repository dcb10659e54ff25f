"""`manifest.json`: what a folder of prepared data holds.

It is written last, so a folder without one is not finished. It carries a checksum of itself, so an
edited or damaged manifest is refused just as an altered data file is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final, Literal, Self

import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from bagpipe.data.base import FeatureSpec, Split
from bagpipe.data.files import checksum_file, write_atomically
from bagpipe.data.raw import ValueKind
from bagpipe.errors import DataError
from bagpipe.native.files import is_file_name

MANIFEST_NAME: Final = "manifest.json"
FORMAT_VERSION: Final = 1
_MOST_USED_SHARE: Final = 0.8  # beyond it the estimate is coarse


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Entry):
    """One file of the folder."""

    name: str
    num_bytes: int
    checksum: str  # xxh3_128
    num_rows: int

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not is_file_name(name):
            raise ValueError(f"it names {name!r}, must be a file in its own folder")
        return name


class LabelEntry(_Entry):
    """One of several labels, or one with a name of its own."""

    name: str
    column: str
    at_least: float | None = None  # the label is 1 where the column is at least this


class FeatureEntry(_Entry):
    """One categorical feature, in column order."""

    name: str
    table: str
    multi_hot: bool
    kind: ValueKind | None = None  # of its values; None in data prepared by older versions
    column: str | None = None  # of the raw files; None there, too
    separator: str | None = None


class SkippedEntry(_Entry):
    """Rows left out for one reason, and the first of them."""

    count: int
    first: str


class UnseenEntry(_Entry):
    """A feature's lookups in validation; `bagpipe.data.observed` says what is counted and why."""

    num_lookups: int
    num_unused: int  # of them, of rows that training does not use; with a dictionary of row 0
    used_share: float  # of the table's rows, that training uses; 0 with a dictionary

    @property
    def share(self) -> float | None:
        """The share of lookups that are of values training does not have.

        With hashing it is an estimate. It is None when it can't be told.
        """
        if self.used_share > _MOST_USED_SHARE:
            return None
        counted = self.num_unused / max(self.num_lookups, 1)
        return min(counted / (1 - self.used_share), 1.0)


class VocabularyEntry(_Entry):
    """The prepared data whose ids these go on with."""

    folder: str
    num_known: dict[str, int]  # by table: ids that were there before, id 0 among them


class SourceEntry(_Entry):
    """What the data were prepared from."""

    kind: str
    files: tuple[str, ...]
    num_rows_read: int
    skipped: dict[str, SkippedEntry]

    @property
    def num_rows_skipped(self) -> int:
        return sum(entry.count for entry in self.skipped.values())


class PreparedManifest(_Entry):
    """The content of `manifest.json`.

    The record batches of a data file have `rows_per_batch` rows each, except for its last one.
    """

    format_version: Literal[1] = 1
    label: str
    label_at_least: float | None = None  # labels are 1 where the column is at least this
    labels: tuple[LabelEntry, ...] = ()  # empty: the one that `label` tells
    weight: str | None = None  # the column with samples' weights
    dense_names: tuple[str, ...]
    dense_transform: Literal["log", "none"]
    features: tuple[FeatureEntry, ...]
    num_embeddings: dict[str, int]  # by table
    vocabulary: Literal["hash", "dictionary"]
    dictionaries: dict[str, FileEntry]  # by table; see `bagpipe.data.dictionaries`
    min_count: int | None = None  # of a dictionary; None in data prepared by older versions
    vocabulary_from: VocabularyEntry | None = None
    rows_per_batch: int
    splits: dict[Split, tuple[FileEntry, ...]]
    source: SourceEntry
    num_clipped: dict[str, int] = {}  # by dense feature: values that dense_transform has made 0
    unseen: dict[str, UnseenEntry] = {}  # by feature
    label_clustering: float | None = None  # of the training rows; see `bagpipe.data.observed`

    @model_validator(mode="after")
    def _check(self) -> Self:
        for feature in self.features:
            if feature.table not in self.num_embeddings:
                raise ValueError(
                    f"table {feature.table!r} of feature {feature.name!r} has no num_embeddings"
                )
        return self

    @property
    def feature_specs(self) -> tuple[FeatureSpec, ...]:
        """The features with their tables' sizes, in column order."""
        return tuple(
            FeatureSpec(
                name=entry.name,
                table=entry.table,
                num_embeddings=self.num_embeddings[entry.table],
                multi_hot=entry.multi_hot,
            )
            for entry in self.features
        )

    @property
    def all_labels(self) -> tuple[LabelEntry, ...]:
        """The labels, of which there is at least one."""
        only = LabelEntry(name=self.label, column=self.label, at_least=self.label_at_least)
        return self.labels or (only,)

    @property
    def content(self) -> str:
        """A hash of the training split, by which it is known wherever the folder lies."""
        files = self.splits.get("train", ())
        return xxhash.xxh3_128("".join(file.checksum for file in files).encode()).hexdigest()

    def num_rows(self, split: Split) -> int:
        """Number of rows of a split; 0 if there is no such split."""
        return sum(file.num_rows for file in self.splits.get(split, ()))

    def save(self, folder: Path) -> None:
        """Writes it into `folder`, all or nothing."""
        content = self.model_dump(mode="json")
        for key in ("labels", "weight"):  # only where there are any, for versions before them
            if not content[key]:
                del content[key]
        write_atomically(
            folder / MANIFEST_NAME, _encode({**content, "manifest_checksum": _checksum(content)})
        )

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads the manifest of a folder.

        Raises:
            DataError: There is none, it was altered, or another version of the format is in it.
        """
        path = folder / MANIFEST_NAME
        try:
            content = json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DataError(
                f"{folder} holds no {MANIFEST_NAME}, so it is not prepared data, or preparing was "
                "interrupted: run `bagpipe data prepare` again"
            ) from error
        except ValueError as error:
            raise _altered(path) from error
        if not isinstance(content, dict):
            raise _altered(path)
        if (version := content.get("format_version")) != FORMAT_VERSION:
            raise DataError(
                f"{path} has format version {version}, this version of Bagpipe reads "
                f"{FORMAT_VERSION}: prepare it again"
            )
        if content.pop("manifest_checksum", None) != _checksum(content):
            raise _altered(path)
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise DataError(f"{path} is not a valid manifest: {error}") from error


def check_file(folder: Path, entry: FileEntry, *, verify: bool) -> Path:
    """The path of a file of the folder, after checking that it is the one that was written.

    Args:
        folder: The folder of prepared data.
        entry: What the manifest says of the file.
        verify: Whether to compare its checksum, which means reading all of it. Sizes are always
            compared.

    Raises:
        DataError: The file is missing, truncated or altered.
    """
    path = folder / entry.name
    try:
        num_bytes = path.stat().st_size
    except OSError as error:
        raise DataError(
            f"{path} is missing, though the manifest lists it: prepare the data again"
        ) from error
    if num_bytes != entry.num_bytes:
        raise DataError(
            f"{path} has {num_bytes:,} bytes, but {entry.num_bytes:,} were written: it is "
            "truncated or altered, so prepare the data again"
        )
    if verify and (checksum := checksum_file(path)) != entry.checksum:
        raise DataError(
            f"{path} has checksum {checksum}, but {entry.checksum} was written: it is altered, "
            "prepare it again"
        )
    return path


def _altered(path: Path) -> DataError:
    return DataError(f"{path} is not as it was written (damaged or edited): prepare the data again")


def _encode(content: dict[str, object]) -> bytes:
    return json.dumps(content, indent=1, sort_keys=True).encode() + b"\n"


def _checksum(content: dict[str, object]) -> str:
    return xxhash.xxh3_128_hexdigest(_encode(content))
