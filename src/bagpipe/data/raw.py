"""What every raw source yields: blocks of labels, dense numbers and 64-bit keys.

A *key* stands for a categorical value. An integer is its own key (from 2**63 on, less 2**64). A
string's key is its xxh3_64. A missing value has the key MISSING_KEY and is a value like any other.
Two integers would have that key too, -2**63 and 2**63: they have the keys of their decimal digits.
A vocabulary turns keys into ids (`bagpipe.data.vocabulary`).

A *row number* counts all rows of the input in reading order, from 0, including those that can't be
read. So a split by row number stays the same whether bad rows are skipped or repaired.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from bagpipe.errors import DataError
from bagpipe.types import BoolArray, Float32Array, Int64Array

MISSING_KEY: Final = -(2**63)
ValueKind: TypeAlias = Literal["integer", "unsigned", "hexadecimal", "text", "nothing"]
"""What a feature's values are before they are keys: integers of up to 63 or 64 bits, Criteo's
categories, strings or binaries; nothing: all are missing, or their type makes no keys."""


@dataclass(frozen=True, kw_only=True)
class RawFeature:
    """A categorical feature of a raw source.

    When `num_embeddings` is None, a dictionary decides the size.
    """

    name: str
    table: str
    num_embeddings: int | None
    multi_hot: bool
    kind: ValueKind
    column: str
    """The column that it is read from."""
    separator: str | None = None
    """What splits the column's strings into values."""


@dataclass(frozen=True, kw_only=True)
class Texts:
    """The texts behind keys, which keys do not tell."""

    items: Any  # an Arrow array of strings or binaries
    places: Int64Array | None = None  # (n,) in it, of each key's text; None: one after another

    def take(self, chosen: Int64Array) -> Texts:
        """Those of the keys numbered `chosen` (m,)."""
        places = chosen if self.places is None else self.places[chosen]
        return Texts(items=self.items, places=places)

    def array(self) -> Any:
        """The texts (n,) as an Arrow array; null where a value is missing."""
        return self.items if self.places is None else self.items.take(pa.array(self.places))


@dataclass(frozen=True, kw_only=True)
class Keys:
    """One feature of a block; without `offsets` there is one key per row."""

    values: Int64Array  # (num_keys,)
    offsets: Int64Array | None  # (n + 1,)
    texts: Texts | None = None  # (num_keys,) where the values are texts

    def take(self, chosen: Int64Array) -> Keys:
        """The rows numbered `chosen` (m,), in that order."""
        if self.offsets is None:
            texts = None if self.texts is None else self.texts.take(chosen)
            return Keys(values=self.values[chosen], offsets=None, texts=texts)
        starts, lengths = self.offsets[chosen], self.offsets[chosen + 1] - self.offsets[chosen]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        places = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
        texts = None if self.texts is None else self.texts.take(places)
        return Keys(values=self.values[places], offsets=offsets, texts=texts)


@dataclass(frozen=True, kw_only=True)
class RawBlock:
    """Rows that could be read, with F features and D dense columns."""

    rows: Int64Array  # (n,) row numbers, ascending
    labels: Float32Array  # (n,) in [0, 1], or (n, L) for several
    dense: Float32Array  # (n, D) as read, 0 where missing
    keys: tuple[Keys, ...]  # F of them
    weights: Float32Array | None = None  # (n,) 0 or more; None: there is no such column
    times: Int64Array | None = None  # (n,) in the order of time; None: there is no time column

    def take(self, chosen: Int64Array) -> RawBlock:
        """The rows at positions `chosen` (m,) of this block."""
        return RawBlock(
            rows=self.rows[chosen],
            labels=self.labels[chosen],
            dense=self.dense[chosen],
            keys=tuple(keys.take(chosen) for keys in self.keys),
            weights=None if self.weights is None else self.weights[chosen],
            times=None if self.times is None else self.times[chosen],
        )


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a stage of preparing has come, in bytes of the input files or in rows."""

    stage: str
    done: int
    total: int
    unit: Literal["bytes", "rows"]


@dataclass(kw_only=True)
class Skipped:
    """Rows left out for one reason, and the first of them."""

    count: int
    first: str


@dataclass(kw_only=True)
class Problems:
    """What becomes of rows that can't be read: the first is raised, or all are counted."""

    on_error: Literal["raise", "skip"] = "raise"
    skipped: dict[str, Skipped] = field(default_factory=dict)

    def add(self, reason: str, count: int, first: str) -> None:
        """Notes rows that can't be read for one reason.

        Args:
            reason: What is wrong, in words that are the same for all such rows.
            count: How many rows there are.
            first: Where the first of them is, and what is wrong with it.

        Raises:
            DataError: `on_error` is "raise".
        """
        if self.on_error == "raise":
            raise DataError(
                f"{first}; repair the row, or set on_error = 'skip' to leave such rows out and "
                "count them"
            )
        self.skipped.setdefault(reason, Skipped(count=0, first=first)).count += count


class BlockPlace:
    """Where a block lies, so that its bad rows can be named: in a file, or in what a text names."""

    def __init__(self, file: Path | str, first_row: int, problems: Problems) -> None:
        self.file, self._first_row, self._problems = file, first_row, problems

    def refuse(
        self,
        bad: BoolArray,
        good: BoolArray,
        reason: str,
        what: str,
        values: npt.NDArray[Any] | None,
    ) -> None:
        """Reports the rows of `bad` that were good so far, and marks them."""
        bad = bad & good
        if not bad.any():
            return
        index = int(np.argmax(bad))
        shown = "" if values is None else f" is {values[index]}"
        where = f"{self.file}, row {self._first_row + index} (from 0)"
        self._problems.add(
            reason, int(np.count_nonzero(bad)), f"{where}: {what.replace('{}', shown)}"
        )
        good &= ~bad


class RawSource(Protocol):
    """Files in a raw format, read front to back as often as needed."""

    @property
    def features(self) -> tuple[RawFeature, ...]:
        """The features, in the order of `RawBlock.keys`."""

    @property
    def dense_names(self) -> tuple[str, ...]:
        """The dense columns, in the order of `RawBlock.dense`."""

    @property
    def has_time(self) -> bool:
        """Whether there is a time column."""

    def num_rows(self) -> int:
        """Number of rows in all files, including those that can't be read.

        Raises:
            DataError: A file is missing, damaged or empty.
        """

    def times(self) -> Iterator[Int64Array]:
        """Yields the time column alone, in blocks; only if `has_time`."""

    def blocks(
        self, problems: Problems, progress: Callable[[Progress], None], stage: str
    ) -> Iterator[RawBlock]:
        """Yields all rows that can be read; the others go to `problems`."""


def find_files(patterns: Sequence[str]) -> tuple[Path, ...]:
    """The files that paths and glob patterns name.

    A pattern that is the very name of something that exists means just that, even if the name has
    brackets or stars.

    Raises:
        DataError: A pattern matches no file, or an empty one.
    """
    files: list[Path] = []
    for pattern in patterns:
        base, rest = _literal_part(Path(pattern))
        found = sorted(base / name for name in glob.glob(rest, root_dir=base, recursive=True))
        found = [path for path in found if path.is_file()] if rest else [base]
        if not found:
            raise DataError(f"no file at {pattern!r}, seen from {Path.cwd()}")
        files += found
    for path in files:
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty")
    return tuple(files)


def _literal_part(path: Path) -> tuple[Path, str]:
    """The longest beginning of `path` that exists, and the rest.

    The beginning is a folder, unless all of `path` exists and is a file. Then the rest is empty.
    """
    if path.is_file():
        return path, ""
    parents = [parent for parent in path.parents if parent.is_dir()]
    base = parents[0] if parents else Path()
    return base, str(path.relative_to(base))
