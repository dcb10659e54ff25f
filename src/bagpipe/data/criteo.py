"""Criteo's raw text files, plain or gzip, read in blocks of a few MiB.

A block ends at its last newline; what follows is carried over to the next block. Memory is the
block and its arrays, about three times BLOCK_BYTES. A line longer than MAX_LINE_BYTES is refused,
since a file that has one is not Criteo text.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final, Literal, TypeAlias, cast

import numpy as np

from bagpipe.data import criteo_lines
from bagpipe.data.criteo_lines import NUM_COLUMNS, NUM_DENSE, NUM_SPARSE, parse_lines
from bagpipe.data.raw import Keys, Problems, Progress, RawBlock, RawFeature
from bagpipe.errors import DataError
from bagpipe.types import Int64Array, UInt8Array

BLOCK_BYTES: Final = 8 << 20
MAX_LINE_BYTES: Final = 1 << 20
_NEWLINE: Final = 10
_SHOWN_CHARACTERS: Final = 40

DENSE_NAMES: Final = tuple(f"I{i}" for i in range(1, NUM_DENSE + 1))
SPARSE_NAMES: Final = tuple(f"C{i}" for i in range(1, NUM_SPARSE + 1))
_COLUMNS: Final = ("label", *DENSE_NAMES, *SPARSE_NAMES)
_REASONS: Final = {
    criteo_lines.WRONG_COLUMN_COUNT: "wrong number of columns",
    criteo_lines.BAD_LABEL: "label is not 0 or 1",
    criteo_lines.BAD_DENSE: "dense value is not an integer",
    criteo_lines.BAD_CATEGORY: "category is not hexadecimal",
}

DatasetName: TypeAlias = Literal["kaggle", "terabyte"]

# Sizes of the categorical columns of Criteo's two public data sets: the numbers of unique values
# that the DLRM reference counts.
# fmt: off
CARDINALITIES: Final[dict[DatasetName, tuple[int, ...]]] = {
    "kaggle": (
        1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194,
        27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572,
    ),
    # MLPerf's, over days 0 to 23.
    "terabyte": (
        45833188, 36746, 17245, 7413, 20243, 3, 7114, 1441, 62, 29275261, 1572176, 345138, 10,
        2209, 11267, 128, 4, 974, 14, 48937457, 11316796, 40094537, 452104, 12606, 104, 35,
    ),
}
# fmt: on


class CriteoSource:
    """Criteo files in the given order, as a `RawSource`.

    Args:
        files: The files to read.
        num_embeddings: Rows of each of the 26 tables; None leaves the size to a dictionary.
    """

    def __init__(self, files: Sequence[Path], num_embeddings: Sequence[int | None]) -> None:
        self._files = tuple(files)
        self.features = tuple(
            RawFeature(
                name=name,
                table=name,
                num_embeddings=size,
                multi_hot=False,
                kind="hexadecimal",
                column=name,
            )
            for name, size in zip(SPARSE_NAMES, num_embeddings, strict=True)
        )
        self.dense_names: tuple[str, ...] = DENSE_NAMES
        self.has_time = False

    def num_rows(self) -> int:
        """Number of lines in all files.

        Raises:
            DataError: A file is empty or damaged gzip.
        """
        total = 0
        for file in self._files:
            total += sum(int(np.count_nonzero(text == _NEWLINE)) for text, _ in _whole_lines(file))
        return total

    def times(self) -> Iterator[Int64Array]:
        """Criteo has no time column; its lines are in order of time."""
        raise AssertionError("has_time is False")

    def blocks(
        self, problems: Problems, progress: Callable[[Progress], None], stage: str
    ) -> Iterator[RawBlock]:
        """Yields all well-formed lines; the others go to `problems`."""
        total = sum(file.stat().st_size for file in self._files)
        before, row = 0, 0
        for file in self._files:
            first_row = row
            for text, done in _whole_lines(file):
                block, num_lines = _parse(text, row, file, 1 + row - first_row, problems)
                row += num_lines
                yield block
                progress(Progress(stage=stage, done=before + done, total=total, unit="bytes"))
            before += file.stat().st_size


def _whole_lines(file: Path) -> Iterator[tuple[UInt8Array, int]]:
    """Blocks that end with a newline, and how many bytes of the file have been read so far."""
    carried, seen = b"", False
    with _open(file) as (stream, raw), _translated(file):
        while block := stream.read(BLOCK_BYTES):
            seen = True
            cut = block.rfind(b"\n") + 1
            if cut == 0:
                carried += block
            else:
                yield np.frombuffer(carried + block[:cut], np.uint8), raw.tell()
                carried = block[cut:]
            if len(carried) > MAX_LINE_BYTES:
                raise DataError(
                    f"{file} has a line longer than {MAX_LINE_BYTES:,} bytes: is it tab-separated "
                    "Criteo text?"
                )
        if carried:
            yield np.frombuffer(carried + b"\n", np.uint8), raw.tell()
    if not seen:
        raise DataError(f"{file} is empty")


@contextmanager
def _open(file: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The text of the file, and the file itself, whose position tells the progress."""
    with open(file, "rb") as raw:
        if file.suffix == ".gz":
            with gzip.open(raw, "rb") as text:
                yield cast(BinaryIO, text), raw
        else:
            yield raw, raw


@contextmanager
def _translated(file: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{file} is not whole gzip data ({error}): fetch it again") from error


def _parse(
    text: UInt8Array, row: int, file: Path, line: int, problems: Problems
) -> tuple[RawBlock, int]:
    """One block of rows, and how many lines its text has.

    The block begins at row number `row` of the input and at line number `line` of the file.
    """
    ends = np.flatnonzero(text == _NEWLINE)
    n = len(ends)
    labels = np.empty(n, np.float32)
    dense = np.empty((n, NUM_DENSE), np.float32)
    keys = np.empty((NUM_SPARSE, n), np.int64)
    faults = np.empty((n, 2), np.int64)
    parse_lines(text, ends, labels, dense, keys, faults)
    block = RawBlock(
        rows=np.arange(row, row + n),
        labels=labels,
        dense=dense,
        keys=tuple(Keys(values=column, offsets=None) for column in keys),
    )
    if faults[:, 0].any():
        _report(text, ends, faults, file, line, problems)
        block = block.take(np.flatnonzero(faults[:, 0] == criteo_lines.OK))
    return block, n


def _report(
    text: UInt8Array,
    ends: Int64Array,
    faults: Int64Array,
    file: Path,
    line: int,
    problems: Problems,
) -> None:
    codes = faults[:, 0]
    kinds, firsts = np.unique(codes[codes != criteo_lines.OK], return_index=True)
    # by first appearance, so that the earliest line is the one raised
    for code in kinds[np.argsort(firsts)]:
        index = int(np.argmax(codes == code))
        begin = 0 if index == 0 else int(ends[index - 1]) + 1
        content = text[begin : int(ends[index])].tobytes().decode("utf-8", "replace").rstrip("\r")
        what = _describe(int(code), int(faults[index, 1]), content)
        problems.add(
            _REASONS[int(code)],
            int(np.count_nonzero(codes == code)),
            f"{file}, line {line + index}: {what}",
        )


def _describe(code: int, column: int, content: str) -> str:
    if code == criteo_lines.WRONG_COLUMN_COUNT:
        must_be = f"{NUM_COLUMNS} (label, I1 to I13, C1 to C26)"
        return f"{column} columns, must be {must_be}, separated by tabs"
    value = content.split("\t")[column][:_SHOWN_CHARACTERS]
    must = {
        criteo_lines.BAD_LABEL: "0 or 1",
        criteo_lines.BAD_DENSE: "an integer or empty",
        criteo_lines.BAD_CATEGORY: (
            f"1 to {criteo_lines.MAX_HEX_DIGITS} hexadecimal digits or empty"
        ),
    }[code]
    return f"column {_COLUMNS[column]} is {value!r}, must be {must}"
