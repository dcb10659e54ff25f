"""Which files names and patterns stand for."""

from __future__ import annotations

from pathlib import Path

import pytest

from bagpipe.data.raw import find_files
from bagpipe.errors import DataError


def fill(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")


def found(folder: Path, *patterns: str) -> list[str]:
    files = find_files([str(folder / pattern) for pattern in patterns])
    return [str(path.relative_to(folder)) for path in files]


@pytest.mark.parametrize("name", ["day[1].parquet", "what?.txt", "all*.txt", "[", "a[[]b"])
def test_a_file_is_named_outright_whatever_is_in_its_name(tmp_path: Path, name: str) -> None:
    fill(tmp_path, name, "day1.parquet", "whats.txt", "all-of-it.txt")
    assert found(tmp_path, name) == [name]


def test_a_folder_is_named_outright_before_a_pattern(tmp_path: Path) -> None:
    fill(tmp_path, "in[1]/b", "in[1]/a", "in1/c", "in[1]/deep/d")
    assert found(tmp_path, "in[1]/*") == ["in[1]/a", "in[1]/b"]
    assert found(tmp_path, "in[1]/**/[ad]") == ["in[1]/a", "in[1]/deep/d"]


def test_patterns_are_sorted_each_and_kept_in_order(tmp_path: Path) -> None:
    fill(tmp_path, "b", "a", "day1", "day2", "c/day3")
    assert found(tmp_path, "day?", "b", "*/day[0-9]") == ["day1", "day2", "b", "c/day3"]
    assert found(tmp_path, "**/day*") == ["c/day3", "day1", "day2"]


def test_relative_to_where_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, "a[1]", "b/c")
    monkeypatch.chdir(tmp_path)
    assert find_files(["a[1]", "b/*"]) == (Path("a[1]"), Path("b/c"))


def test_names_of_nothing_and_of_an_empty_file(tmp_path: Path) -> None:
    fill(tmp_path, "a", "b")
    (tmp_path / "empty").touch()
    for name in ("nope", "nope[1]", "n*", "no/*"):
        with pytest.raises(DataError, match=r"no file at .*n.*seen from") as raised:
            found(tmp_path, name)
        assert name in str(raised.value)
    with pytest.raises(DataError, match="empty is empty"):
        found(tmp_path, "empty")
