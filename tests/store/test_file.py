"""The file store: the contract, the folder that it opens, and disks that fail."""

from __future__ import annotations

import errno
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.disks import files_of_at_most
from tests.soon import SOON_S
from tests.store_contract import (
    StoreContract,
    StoreFactory,
    fetch,
    initial,
    make_group,
    records_of,
    rows_of,
    touched_rows,
)

from bagpipe.errors import StoreError
from bagpipe.optimizers import Adam, RowWiseAdagrad
from bagpipe.store import FileStore
from bagpipe.store.sparse_file import SparseFile
from bagpipe.topology import shards_of
from bagpipe.types import Group, Int64Array


class TestFileStore(StoreContract):
    @pytest.fixture
    def make(self, tmp_path: Path) -> StoreFactory:
        numbers = itertools.count()
        return lambda group, seed: FileStore(group, seed, tmp_path / str(next(numbers)))


def test_a_store_starts_empty_over_its_own_old_files_where_asked(tmp_path: Path) -> None:
    rows = rows_of(3, 900)
    old = FileStore(make_group(), 5, tmp_path)
    old.write(rows, records_of(rows))
    new = FileStore(make_group(), 5, tmp_path, existing="overwrite")
    assert touched_rows(new) == []
    np.testing.assert_array_equal(fetch(new, rows), initial(new.group, rows))
    new.write(rows, records_of(rows, salt=0.5))
    np.testing.assert_array_equal(fetch(old, rows), records_of(rows))  # each has files of its own


@pytest.mark.parametrize(("shard", "num_shards"), [(0, 1), (1, 3)])
def test_a_closed_store_is_opened_again_or_refused(
    tmp_path: Path, shard: int, num_shards: int
) -> None:
    def make(existing: Any) -> FileStore:
        options = {"shard": shard, "num_shards": num_shards}
        return FileStore(make_group(100_000), 5, tmp_path, existing=existing, **options)

    rows = np.arange(100_000)[shards_of(np.arange(100_000), num_shards) == shard][::997]
    for existing in ("refuse", "reopen"):  # an empty one is as good as none
        make(existing).close()
    store = make("reopen")
    store.write(rows, records_of(rows))
    with pytest.raises(StoreError, match=r"holds rows of these tables.*'reopen'.*'overwrite'"):
        make("refuse")
    store.close()
    store.close()
    with pytest.raises(StoreError, match="existing is 'again', must be"):
        make("again")

    again = make("reopen")
    assert touched_rows(again) == rows.tolist()
    np.testing.assert_array_equal(fetch(again, rows), records_of(rows))
    again.write(rows[:3], records_of(rows[:3], salt=0.5))
    again.close()
    third = make("reopen")
    np.testing.assert_array_equal(fetch(third, rows[3:]), records_of(rows[3:]))
    np.testing.assert_array_equal(fetch(third, rows[:3]), records_of(rows[:3], salt=0.5))
    del third  # as a process that is killed
    with pytest.raises(StoreError, match=r"was not closed.*restore a checkpoint into it, with"):
        make("reopen")
    make("overwrite").close()


def test_a_store_that_is_open_or_damaged_is_not_opened_again(tmp_path: Path) -> None:
    rows = rows_of(3, 900)
    store = FileStore(make_group(), 5, tmp_path)
    store.write(rows, records_of(rows))
    touched = tmp_path / "touched.bits"
    store.close()
    first = FileStore(make_group(), 5, tmp_path, existing="reopen")
    with pytest.raises(StoreError, match="it is open, or its store was not closed"):
        FileStore(make_group(), 5, tmp_path, existing="reopen")
    first.close()
    content = touched.read_bytes()
    held = SparseFile(tmp_path / "records.f32", 1_300, first.group.record_bytes, is_there=True)
    with pytest.raises(StoreError, match="is open in another store, of this process or another"):
        FileStore(make_group(), 5, tmp_path, existing="reopen")
    held.close()
    assert touched.read_bytes() == content
    touched.write_bytes(content[:-1])
    with pytest.raises(StoreError, match=r"touched\.bits is damaged: restore a checkpoint"):
        FileStore(make_group(), 5, tmp_path, existing="reopen")
    touched.write_bytes(content)
    (tmp_path / "records.f32").write_bytes((tmp_path / "records.f32").read_bytes()[:-4])
    with pytest.raises(StoreError, match="has 36,396 bytes, not 36,400"):
        FileStore(make_group(), 5, tmp_path, existing="reopen")


def test_a_store_that_cannot_be_kept_says_so_and_is_closed(tmp_path: Path) -> None:
    rows = rows_of(3, 900)
    store = FileStore(make_group(), 5, tmp_path)
    store.write(rows, records_of(rows))
    with files_of_at_most(100), pytest.raises(StoreError, match=r"can't be kept: .*touched"):
        store.close()
    with pytest.raises(StoreError, match="is closed"):
        fetch(store, rows)
    with pytest.raises(StoreError, match="was not closed"):
        FileStore(make_group(), 5, tmp_path, existing="reopen")


@pytest.mark.parametrize(
    ("group", "seed", "fact"),
    [
        (make_group(1_301), 5, "num_rows is 1300 there and 1301 here"),
        (make_group(dim=9), 5, "record_width is 7 there and 10 here"),
        (make_group(), 6, "seed is 5 there and 6 here"),
        (
            Group(index=2, tables=make_group().tables, optimizer=Adam(lr=0.1)),
            5,
            "record_width is 7 there and 18 here",
        ),
        (
            Group(index=2, tables=make_group().tables[::-1], optimizer=RowWiseAdagrad(lr=0.1)),
            5,
            "tables is",
        ),
    ],
)
def test_a_folder_of_other_tables_is_refused_and_left_alone(
    tmp_path: Path, group: Group, seed: int, fact: str
) -> None:
    FileStore(make_group(), 5, tmp_path).close()
    before = {path.name: path.stat().st_ino for path in tmp_path.iterdir()}
    with pytest.raises(StoreError, match=fact) as caught:
        FileStore(group, seed, tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "choose another folder or delete this one" in str(caught.value)
    assert {path.name: path.stat().st_ino for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_a_damaged_header_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "header.json").write_text(text)
    with pytest.raises(
        StoreError, match=r"header\.json.* file store's header.*choose another folder or delete"
    ):
        FileStore(make_group(), 5, tmp_path)


def test_files_that_are_not_ours_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "records.f32").write_text("precious")
    with pytest.raises(StoreError, match=r"holds records\.f32 but no header\.json"):
        FileStore(make_group(), 5, tmp_path)
    assert (tmp_path / "records.f32").read_text() == "precious"


def test_a_path_through_a_file_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        StoreError, match=r"can't create the file store of group 2 .*file/store: Not a directory"
    ):
        FileStore(make_group(), 5, tmp_path / "file" / "store")


def test_the_header_says_what_the_files_are(tmp_path: Path) -> None:
    store = FileStore(make_group(), 5, tmp_path)
    assert json.loads((tmp_path / "header.json").read_text())["tables"] == [["a", 433], ["b", 867]]
    assert (tmp_path / "records.f32").stat().st_size == 1_300 * store.group.record_bytes
    assert {path.name for path in tmp_path.iterdir()} == {"header.json", "records.f32"}
    store.close()
    assert (tmp_path / "touched.bits").stat().st_size == 16 + 163


def test_disk_use_follows_the_rows_touched_and_clear_gives_it_back(tmp_path: Path) -> None:
    store = FileStore(make_group(10_000_000, dim=64), 5, tmp_path)

    def disk_bytes() -> int:
        return sum(512 * path.stat().st_blocks for path in tmp_path.iterdir())

    assert disk_bytes() < 1 << 20
    rows = rows_of(0, 5_000_000, 9_999_999)
    store.write(rows, records_of(rows, width=65))
    assert disk_bytes() < 8 << 20
    store.clear()
    assert disk_bytes() < 1 << 20
    store.close()


@pytest.mark.parametrize("rows_before", [[], [0]], ids=["neither yet", "the first before"])
def test_a_record_across_two_stretches_has_both_reserved(
    tmp_path: Path, rows_before: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    reserved: list[tuple[int, int]] = []
    monkeypatch.setattr(
        os, "posix_fallocate", lambda file, begin, size: reserved.append((begin, size))
    )
    store = FileStore(make_group(100_000, dim=64), 5, tmp_path)
    straddling = (1 << 20) // 260
    for row in rows_before:
        store.write(rows_of(row), records_of(rows_of(row), width=65))
    store.write(rows_of(straddling), records_of(rows_of(straddling), width=65))
    assert reserved == [(0, 1 << 20), (1 << 20, 1 << 20)]
    store.write(
        rows_of(straddling, 0, 99_999), records_of(rows_of(straddling, 0, 99_999), width=65)
    )
    # each stretch once, the last one up to the end of the file
    assert reserved[2:] == [(24 << 20, 26_000_000 - (24 << 20))]


def test_an_item_longer_than_a_stretch_is_reserved_whole(tmp_path: Path) -> None:
    path, item_bytes = tmp_path / "items", 2_800_000
    file = SparseFile(path, 6, item_bytes)
    file.reserve(rows_of(3))
    reserved = np.flatnonzero(file._reserved) * file._stretch_bytes
    assert reserved.min() <= 3 * item_bytes
    assert reserved.max() + file._stretch_bytes >= 4 * item_bytes
    assert 512 * path.stat().st_blocks >= item_bytes
    file.close()


def test_a_write_that_needs_room_when_the_store_closes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file's number may be another file's by then, which must not grow."""
    store = FileStore(make_group(), 5, tmp_path)
    make_room = store._make_room

    def close_first(rows: Int64Array) -> None:
        store.close()
        make_room(rows)

    monkeypatch.setattr(store, "_make_room", close_first)
    with pytest.raises(
        StoreError, match=r"can't write 1 rows to .*closed meanwhile; nothing was written"
    ):
        store.write(rows_of(1), records_of(rows_of(1)))


def test_a_store_that_cannot_be_cleared_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file is too short then, and reading past its end would kill the process."""
    store = FileStore(make_group(), 5, tmp_path)
    rows = rows_of(1, 1_000)
    store.write(rows, records_of(rows))
    truncate = os.ftruncate

    def only_shorten(file: int, size: int) -> None:
        if size:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        truncate(file, size)

    monkeypatch.setattr(os, "ftruncate", only_shorten)
    with pytest.raises(
        StoreError, match=r"can't clear .*records\.f32: Input/output error; the store is closed"
    ):
        store.clear()
    with pytest.raises(StoreError, match="is closed"):
        fetch(store, rows)


def test_only_a_snapshot_reads_ahead(tmp_path: Path) -> None:
    """A left-over hint would have every later fetch read the pages around its rows."""
    store = FileStore(make_group(), 5, tmp_path)
    rows = np.arange(50)
    store.write(rows, records_of(rows))

    def reads_ahead() -> bool:
        text = Path("/proc/self/smaps").read_text()
        of_file = text[text.index(str(tmp_path / "records.f32")) :]
        flags = next(line for line in of_file.splitlines() if line.startswith("VmFlags:")).split()
        assert ("sr" in flags) != ("rr" in flags)
        return "sr" in flags

    assert not reads_ahead()
    blocks = store.snapshot(10)
    next(blocks)
    assert reads_ahead()
    del blocks  # left half-way
    assert not reads_ahead()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fails_is_a_store_error_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    store = FileStore(make_group(), 5, tmp_path)
    rows = rows_of(1, 1_000)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", refuse)
        with pytest.raises(
            StoreError,
            match=r"can't write 2 rows to .*records\.f32: .*nothing was written: free space",
        ) as caught:
            store.write(rows, records_of(rows))
        assert os.strerror(code) in str(caught.value)
        assert touched_rows(store) == []
        np.testing.assert_array_equal(fetch(store, rows), initial(store.group, rows))
    store.write(rows, records_of(rows))  # once there is space again
    np.testing.assert_array_equal(fetch(store, rows), records_of(rows))


def test_a_limit_on_file_size_is_a_store_error(tmp_path: Path) -> None:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, old[1]))
    try:
        with pytest.raises(
            StoreError, match=r"can't create .* File too large; .* allows files of 26,000,000 bytes"
        ):
            FileStore(make_group(100_000, dim=64), 5, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


FULL_DISK = """
import sys
import numpy as np
from bagpipe.errors import StoreError
from bagpipe.store import FileStore
from tests.store_contract import fetch, make_group, records_of, touched_rows

store = FileStore(make_group(10_000_000, dim=64), 5, sys.argv[1] + "/store")


def write_until_full(parts):
    written = []
    try:
        for rows in parts:
            store.write(rows, records_of(rows, width=65))
            written.append(rows)
    except StoreError as error:
        assert "No space left on device" in str(error), error
    else:
        raise AssertionError("the disk never got full")
    for rows in written:
        np.testing.assert_array_equal(fetch(store, rows), records_of(rows, width=65))
    fetch(store, np.arange(0, 10_000_000, 4_096))  # needs no space, either
    assert len(touched_rows(store)) == sum(map(len, written))
    return len(written)


parts = np.array_split(np.arange(1_000_000), 500)
assert write_until_full(parts) > 5
store.clear()
assert write_until_full(parts[::-1]) > 5
try:
    store.write(parts[0], records_of(parts[0], width=65))  # reserved before `clear`, no longer now
except StoreError:
    pass
else:
    raise AssertionError("the disk is full")
"""


def test_a_disk_that_is_really_full_does_not_kill_the_process(tmp_path: Path) -> None:
    """The disk is a tmpfs of 6 MB in a mount namespace of the child's own.

    This needs no rights and leaves nothing behind.
    """
    unshare = shutil.which("unshare")
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(tmp_path)]
    if (
        unshare is None
        or subprocess.run(
            [unshare, "-rm", *mount], capture_output=True, timeout=SOON_S, check=False
        ).returncode
    ):
        pytest.skip("user and mount namespaces are not allowed here")
    command = f'{" ".join(mount)} && exec "$@"'
    child = subprocess.run(
        [unshare, "-rm", "sh", "-c", command, "sh", sys.executable, "-c", FULL_DISK, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=SOON_S,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert child.returncode == 0, f"exit {child.returncode}: {child.stderr}"
