"""Criteo's text: whole files, blocks that end anywhere, and every kind of bad line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.data.naive import criteo_key, criteo_line, write_criteo

from bagpipe.data import criteo
from bagpipe.data.criteo import CriteoSource
from bagpipe.data.raw import Problems, Progress, RawBlock, find_files
from bagpipe.errors import DataError

LINES = [criteo_line(seed) for seed in range(40)]


def read(path: Path, problems: Problems | None = None) -> list[RawBlock]:
    source = CriteoSource([path], [None] * 26)
    return list(source.blocks(problems or Problems(), lambda _: None, "test"))


def assert_equals_naive(blocks: list[RawBlock], lines: list[str]) -> None:
    rows = [line.split("\t") for line in lines]
    assert np.concatenate([block.labels for block in blocks]).tolist() == [
        float(row[0]) for row in rows
    ]
    assert np.concatenate([block.dense for block in blocks]).tolist() == [
        [float(x or 0) for x in row[1:14]] for row in rows
    ]
    for index in range(26):
        keys = np.concatenate([block.keys[index].values for block in blocks])
        assert keys.tolist() == [criteo_key(row[14 + index]) for row in rows]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
@pytest.mark.parametrize(("end", "last"), [("\n", "\n"), ("\n", ""), ("\r\n", "\r\n")])
def test_plain_and_gzip_with_any_line_ends(tmp_path: Path, name: str, end: str, last: str) -> None:
    path = write_criteo(tmp_path / name, LINES, end=end, last=last)
    assert_equals_naive(read(path), LINES)
    assert CriteoSource([path], [None] * 26).num_rows() == len(LINES)


@pytest.mark.parametrize("block_bytes", [1, 7, 100, 251, 1000])
def test_blocks_may_end_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(criteo, "BLOCK_BYTES", block_bytes)
    blocks = read(write_criteo(tmp_path / "a.txt", LINES))
    assert_equals_naive(blocks, LINES)
    assert np.concatenate([block.rows for block in blocks]).tolist() == list(range(len(LINES)))


def replaced(column: int, value: str) -> str:
    parts = LINES[0].split("\t")
    parts[column] = value
    return "\t".join(parts)


@pytest.mark.parametrize(
    ("bad", "facts"),
    [
        (LINES[0].rsplit("\t", 1)[0], ["39 columns", "must be 40"]),
        (LINES[0] + "\t", ["41 columns", "must be 40"]),
        ("", ["1 columns"]),
        (replaced(14, "12g4"), ["column C1", "'12g4'", "hexadecimal"]),
        (replaced(39, "123456789"), ["column C26", "1 to 8 hexadecimal"]),
        (replaced(1, "1.5"), ["column I1", "'1.5'", "integer"]),
        (replaced(13, "nan"), ["column I13", "'nan'"]),
        (replaced(13, "-"), ["column I13", "'-'"]),
        (replaced(5, "9" * 19), ["column I5"]),
        (replaced(0, "2"), ["column label", "'2'", "0 or 1"]),
        (replaced(0, ""), ["column label"]),
    ],
)
def test_a_bad_line_is_named_or_skipped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: str, facts: list[str]
) -> None:
    monkeypatch.setattr(criteo, "BLOCK_BYTES", 1000)
    path = write_criteo(tmp_path / "a.txt", [*LINES[:20], bad, *LINES[20:], bad])
    with pytest.raises(DataError) as raised:
        read(path)
    for fact in [str(path), "line 21:", *facts]:
        assert fact in str(raised.value)
    problems = Problems(on_error="skip")
    blocks = read(path, problems)
    assert_equals_naive(blocks, LINES)
    assert [(rows.count, "line 21:" in rows.first) for rows in problems.skipped.values()] == [
        (2, True)
    ]
    assert 20 not in np.concatenate([block.rows for block in blocks])


def test_the_first_of_several_bad_lines_is_raised(tmp_path: Path) -> None:
    path = write_criteo(tmp_path / "a.txt", [LINES[0], replaced(14, "xyz"), "1\t2", LINES[1]])
    with pytest.raises(DataError, match="line 2: column C1"):
        read(path)


def test_lines_are_counted_per_file_and_rows_over_all(tmp_path: Path) -> None:
    first, second = (
        write_criteo(tmp_path / "a.txt", LINES[:3]),
        write_criteo(tmp_path / "b.txt", [*LINES[:2], "x"]),
    )
    source = CriteoSource([first, second], [None] * 26)
    with pytest.raises(DataError, match=r"b\.txt, line 3:"):
        list(source.blocks(Problems(), lambda _: None, "test"))
    blocks = list(source.blocks(Problems(on_error="skip"), lambda _: None, "test"))
    assert np.concatenate([block.rows for block in blocks]).tolist() == [0, 1, 2, 3, 4]


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    path = write_criteo(tmp_path / "a.txt.gz", LINES)
    seen: list[Progress] = []
    list(CriteoSource([path, path], [None] * 26).blocks(Problems(), seen.append, "test"))
    assert seen[-1] == Progress(
        stage="test", done=2 * path.stat().st_size, total=2 * path.stat().st_size, unit="bytes"
    )


def test_damaged_and_empty_files(tmp_path: Path) -> None:
    path = write_criteo(tmp_path / "a.txt.gz", LINES)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.txt\.gz is not whole gzip data"):
        read(path)
    path.write_bytes(b"no gzip")
    with pytest.raises(DataError, match="is not whole gzip data"):
        read(path)
    with pytest.raises(DataError, match=r"e\.txt\.gz is empty"):
        read(write_criteo(tmp_path / "e.txt.gz", [], last=""))
    binary = tmp_path / "b.bin"
    binary.write_bytes(bytes(3 << 20))
    with pytest.raises(DataError, match="longer than"):
        read(binary)


def test_find_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt"):
        write_criteo(tmp_path / name, LINES[:1])
    assert [
        path.name for path in find_files([str(tmp_path / "*.txt"), str(tmp_path / "b.txt")])
    ] == ["a.txt", "b.txt", "b.txt"]
    (tmp_path / "none.txt").touch()
    with pytest.raises(DataError, match=r"none\.txt is empty"):
        find_files([str(tmp_path / "none.txt")])
    for missing in ("*.tsv", "c.txt"):
        with pytest.raises(DataError, match="no file at"):
            find_files([str(tmp_path / missing)])
