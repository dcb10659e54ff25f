"""Cuts of a store: compared with dicts over random interleavings, under threads, on a full disk."""

from __future__ import annotations

import resource
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import strategies
from tests.soon import SOON_S, TIMEOUT_S
from tests.store_contract import (
    SEED,
    StoreContract,
    StoreFactory,
    fetch,
    initial,
    make_group,
    records_of,
    rows_of,
    touched_rows,
)

from bagpipe.errors import CheckpointError, StoreError
from bagpipe.store import FileStore, MemoryStore, cuts
from bagpipe.store.array import ArrayStore
from bagpipe.store.cuts import CutStore
from bagpipe.store.record_files import RecordFile, next_files, read_records
from bagpipe.topology import shards_of
from bagpipe.types import Float32Array, Int64Array

NUM_ROWS = 150
WIDTH = 7


class TestCutStoreInMemory(StoreContract):
    @pytest.fixture
    def make(self) -> StoreFactory:
        return lambda group, seed: CutStore(MemoryStore(group, seed))


class TestCutStoreInAFile(StoreContract):
    @pytest.fixture
    def make(self, tmp_path: Path) -> StoreFactory:
        def make(group: Any, seed: int) -> CutStore:
            return CutStore(FileStore(group, seed, tempfile.mkdtemp(dir=tmp_path)))

        return make


class TestWhileACutIsWritten(StoreContract):
    """Every write is one beside a cut that never ends."""

    @pytest.fixture
    def make(self) -> StoreFactory:
        def make(group: Any, seed: int) -> CutStore:
            store = CutStore(MemoryStore(group, seed))
            store.begin_cut()
            return store

        return make


def make_store(num_rows: int = NUM_ROWS, **shard: int) -> CutStore:
    return CutStore(MemoryStore(make_group(num_rows), SEED, **shard))


def read(path: Path) -> dict[int, tuple[float, ...]]:
    """The records of a file; fails where a row is there twice."""
    found: dict[int, tuple[float, ...]] = {}
    for rows, records in read_records(path, WIDTH):
        for row, record in zip(rows.tolist(), records.tolist(), strict=True):
            assert row not in found
            found[row] = tuple(record)
    return found


def content(store: CutStore) -> dict[int, tuple[float, ...]]:
    return {
        row: tuple(record)
        for rows, records in store.snapshot()
        for row, record in zip(rows.tolist(), records.tolist(), strict=True)
    }


def cut(store: CutStore, folder: Path, name: str) -> RecordFile:
    file = store.begin_cut()(folder / name)
    store.committed()
    return file


class Beside(MemoryStore):
    """Does something else before and after each fetch, as another thread might."""

    def __init__(self) -> None:
        super().__init__(make_group(NUM_ROWS), SEED)
        self.deeds: Iterator[Callable[[], None]] = iter(())
        self._is_within = False

    def fetch(self, rows: Int64Array, out: Float32Array) -> None:
        self._do_one()
        super().fetch(rows, out)
        self._do_one()

    def _do_one(self) -> None:
        if not self._is_within:
            self._is_within = True
            next(self.deeds, lambda: None)()
            self._is_within = False


class Model:
    """A store with cuts as dicts, and the store itself, always asked the same."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.inner = Beside()
        self.store = CutStore(self.inner)
        self.values: dict[int, tuple[float, ...]] = {}
        self.since_base: set[int] = set()
        self.since_cut: set[int] = set()
        self.of_cut: dict[int, tuple[float, ...]] | None = None
        self.written: RecordFile | None = None
        self.num_writes = self.num_files = 0
        self.checkpoints: list[tuple[tuple[RecordFile, ...], dict[int, tuple[float, ...]]]] = [
            ((), {})
        ]
        self.base = self.checkpoints[0]

    def write(self, rows: Sequence[int]) -> None:
        self.num_writes += 1
        records = records_of(np.array(rows, np.int64), salt=self.num_writes)
        self.store.write(np.array(rows, np.int64), records)
        self.values.update(zip(rows, map(tuple, records.tolist()), strict=True))
        (self.since_base if self.of_cut is None else self.since_cut).update(rows)

    def begin(self) -> None:
        if self.of_cut is not None:
            with pytest.raises(StoreError, match="while another one is in hand"):
                self.store.begin_cut()
            return
        self.write_file = self.store.begin_cut()
        self.of_cut, self.as_of = dict(self.values), set(self.since_base)

    def write_cut(self, beside: Sequence[Sequence[int]]) -> None:
        if self.of_cut is None or self.written is not None:
            return
        self.inner.deeds = iter([lambda rows=rows: self.write(rows) for rows in beside])
        self.num_files += 1
        self.written = self.write_file(self.folder / f"{self.num_files}.arrow")
        self.inner.deeds = iter(())
        found = read(self.folder / self.written.name)
        assert self.written.num_records == len(found)
        expected = set(self.of_cut) if self.written.is_whole else self.as_of
        assert found == {row: self.of_cut[row] for row in expected}

    def commit(self) -> None:
        if self.of_cut is None or self.written is None:
            with pytest.raises(StoreError, match=r"no cut of .* can be committed"):
                self.store.committed()
            return
        self.base = (next_files(self.base[0], [self.written]), self.of_cut)
        self.checkpoints.append(self.base)
        self.store.committed()
        self.since_base = self.since_cut
        self._end_cut()

    def abandon(self) -> None:
        self.store.abandon()
        self.since_base |= self.since_cut
        self._end_cut()

    def put_back(self, number: int, was_told: bool) -> None:
        """To any checkpoint; also to the cut's own, which is in place though nobody said so."""
        if self.written is not None and not was_told:
            assert self.of_cut is not None
            self.base = (next_files(self.base[0], [self.written]), self.of_cut)
            self.checkpoints.append(self.base)
            number, self.since_base = -1, set()
        chosen = self.checkpoints[number % len(self.checkpoints)] if number != -1 else self.base
        num_written = self.store.put_back(self.folder, chosen[0])
        if chosen[0] == self.base[0]:  # the base: only what was written since
            assert num_written == len((self.since_base | self.since_cut) & set(chosen[1]))
        else:
            assert num_written == len(chosen[1])
        self.base, self.values, self.since_base = chosen, dict(chosen[1]), set()
        self._end_cut()

    def _end_cut(self) -> None:
        self.since_cut, self.of_cut, self.written = set(), None, None

    def check(self) -> None:
        assert content(self.store) == self.values
        num_since = len(self.since_base | self.since_cut)
        assert self.store.count() == (len(self.values), num_since)
        assert self.store.base == self.base[0]
        everything = np.arange(NUM_ROWS)
        untouched = np.array([row for row in range(NUM_ROWS) if row not in self.values], np.int64)
        np.testing.assert_array_equal(
            fetch(self.store, everything)[untouched], initial(self.store.group, untouched)
        )


ROWS = st.lists(st.integers(0, NUM_ROWS - 1), unique=True, max_size=20)
DEEDS = st.one_of(
    st.tuples(st.just("write"), ROWS),
    st.tuples(st.just("begin")),
    st.tuples(st.just("write_cut"), st.lists(ROWS, max_size=12)),
    st.tuples(st.just("commit")),
    st.tuples(st.just("abandon")),
    st.tuples(st.just("put_back"), st.integers(-1, 5), st.booleans()),
)


@settings(max_examples=strategies.examples(100), deadline=None)
@given(deeds=st.lists(DEEDS, max_size=30), block_rows=st.integers(1, 9), is_full=st.booleans())
def test_equals_dicts_whatever_happens_beside_a_cut(
    deeds: list[tuple[Any, ...]], block_rows: int, is_full: bool
) -> None:
    """A full store has been cut, so that the next files have some of its rows only."""
    if is_full:
        deeds = [("write", range(NUM_ROWS)), ("begin",), ("write_cut", []), ("commit",), *deeds]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuts, "_BLOCK_BYTES", block_rows * WIDTH * 4)
        patch.setattr(cuts, "MAX_INCREMENTS", 2)
        model = Model(Path(folder))
        for name, *arguments in deeds:
            getattr(model, name)(*arguments)
            model.check()


def test_a_row_overwritten_before_during_and_after_its_block_is_in_the_cut_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuts, "_BLOCK_BYTES", 10 * WIDTH * 4)
    model = Model(tmp_path)
    model.write(range(100))
    model.begin()
    model.write([5, 95, 120])
    # before the first block is read, after it, and so on; twice, and rows of all sides
    model.write_cut([[0, 11, 50], [1, 12, 50], [2, 22, 99], [23, 24, 3], [0, 1], [100, 101]])
    assert model.written is not None
    assert model.written.num_records == 100
    model.commit()
    assert model.since_base == {0, 1, 2, 3, 5, 11, 12, 22, 23, 24, 50, 95, 99, 100, 101, 120}
    model.begin()
    model.write_cut([])
    assert model.written.num_records == 16
    assert not model.written.is_whole


def test_of_a_row_in_several_files_the_last_record_counts(tmp_path: Path) -> None:
    model = Model(tmp_path)
    for rows in (range(100), range(9), range(6), range(3)):
        model.write(rows)
        model.begin()
        model.write_cut([])
        model.commit()
    assert len(model.base[0]) == 4
    model.write(range(0, 120, 2))
    model.put_back(-1, True)  # those only
    model.check()
    store = make_store()
    assert store.put_back(tmp_path, model.base[0]) == 100  # all
    assert content(store) == model.values


def test_all_rows_are_written_again_once_further_files_would_hold_as_many(tmp_path: Path) -> None:
    store = make_store()
    store.write(np.arange(100), records_of(np.arange(100)))
    files: tuple[RecordFile, ...] = ()
    found = []
    for number in range(12):
        rows = np.arange(30) + number
        store.write(rows, records_of(rows, salt=number))
        file = cut(store, tmp_path, f"{number}.arrow")
        files = next_files(files, [file])
        found.append((file.is_whole, file.num_records, len(files)))
        assert sum(each.num_records or 0 for each in files) < 2 * 100
    whole, further = (True, 100), (False, 30)
    assert [each[:2] for each in found] == ([whole] + 3 * [further]) * 3
    assert [each[2] for each in found] == [1, 2, 3, 4] * 3


def test_there_are_never_more_than_so_many_further_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuts, "MAX_INCREMENTS", 3)
    store = make_store()
    store.write(np.arange(100), records_of(np.arange(100)))
    found = []
    for number in range(9):
        found.append(cut(store, tmp_path, f"{number}.arrow").is_whole)
        store.write(rows_of(number), records_of(rows_of(number), salt=1))
    assert found == [True, False, False, False] * 2 + [True]


@pytest.mark.parametrize("num_shards", [1, 2, 3, 5])
def test_any_shards_read_the_files_of_any_others_and_only_their_own_rows(
    tmp_path: Path, num_shards: int
) -> None:
    rows = np.arange(0, NUM_ROWS, 2)
    expected: dict[int, tuple[float, ...]] = {}
    files: tuple[RecordFile, ...] = ()
    for salt in range(3):  # by three shards, whose last cut has some of the rows
        written = []
        for shard in range(3):
            store = make_store(shard=shard, num_shards=3)
            store.put_back(tmp_path, files)
            own = rows[shards_of(rows, 3) == shard][salt % 2 :]
            store.write(own, records_of(own, salt))
            expected.update(
                zip(own.tolist(), map(tuple, records_of(own, salt).tolist()), strict=True)
            )
            written.append(cut(store, tmp_path, f"{shard}-{salt}.arrow"))
        files = next_files(files, written)
    found: dict[int, tuple[float, ...]] = {}
    stores = [make_store(shard=shard, num_shards=num_shards) for shard in range(num_shards)]
    written = []
    for store in stores:
        store.put_back(tmp_path, files)
        own_rows = touched_rows(store)
        assert (shards_of(np.array(own_rows), num_shards) == store.shard).all()
        found |= content(store)
        written.append(cut(store, tmp_path, f"new-{store.shard}.arrow"))
    assert found == expected
    # files of other shards do not stay
    if num_shards != 3:
        assert all(file.is_whole for file in written)
        assert next_files(files, written) == tuple(written)


def test_bytes_written_follow_the_rows_written_since_the_last_cut(tmp_path: Path) -> None:
    group = make_group(60_000, dim=48)
    store = CutStore(MemoryStore(group, SEED))
    everything = np.arange(60_000)
    store.write(everything, records_of(everything, width=49))
    cut(store, tmp_path, "all.arrow")
    for num_rows in (1_000, 5_000, 20_000):
        rows = np.random.default_rng(num_rows).choice(everything, num_rows, replace=False)
        for part in np.array_split(rows, 10):
            store.write(part, records_of(part, width=49))
            store.write(part, records_of(part, 1, width=49))  # twice is once
        file = cut(store, tmp_path, f"{num_rows}.arrow")
        assert num_rows * (8 + group.record_bytes) <= file.size_bytes
        assert file.size_bytes <= 1.05 * num_rows * (8 + group.record_bytes)


def test_files_of_other_shards_stay_until_all_shards_have_written_all_rows() -> None:
    def file(name: str, shard: int, num_shards: int, is_whole: bool) -> RecordFile:
        return RecordFile(
            name=name,
            size_bytes=1,
            xxh3_128="",
            shard=shard,
            num_shards=num_shards,
            num_records=1,
            is_whole=is_whole,
        )

    a, b, c = (file(name, shard, 2, True) for name, shard in [("a", 0), ("b", 1), ("c", 1)])
    d, e = file("d", 0, 2, False), file("e", 0, 3, True)
    assert next_files((), [a, b]) == (a, b)
    assert next_files((a, b), [d, c]) == (a, d, c)
    assert next_files((a, b), [e]) == (a, b, e)
    assert next_files((e,), [a]) == (e, a)
    assert next_files((e,), [a, b]) == (a, b)


@pytest.mark.parametrize("is_whole", [False, True])
def test_under_threads_each_write_is_in_a_cut_as_a_whole_or_not_at_all(
    tmp_path: Path, is_whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuts, "_BLOCK_BYTES", 50 * WIDTH * 4)
    num_writers, num_rows = 3, 3_000
    store = make_store(num_rows)
    is_over = threading.Event()
    failures: list[BaseException] = []

    def write(writer: int) -> None:
        rows = np.arange(writer, num_rows, num_writers)
        number = 0
        try:
            while not is_over.is_set():
                number += 1
                store.write(rows, np.full((len(rows), WIDTH), number, np.float32))
                out = fetch(store, rows)
                assert (out == number).all()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=[writer]) for writer in range(num_writers)]
    for thread in threads:
        thread.start()
    try:
        before = [0] * num_writers
        for number in range(12):
            if is_whole:
                store.base = ()
            file = cut(store, tmp_path, f"{number}.arrow")
            found = read(tmp_path / file.name)
            for writer in range(num_writers):
                values = {
                    found[row] for row in range(writer, num_rows, num_writers) if row in found
                }
                assert len(values) <= 1  # of one write
                if values:
                    value = int(values.pop()[0])
                    # a file of all rows has those of a writer that had no turn since the last one
                    assert value > before[writer] or file.is_whole
                    before[writer] = value
                    assert all(row in found for row in range(writer, num_rows, num_writers))
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
    assert not failures


def test_a_block_waits_for_a_write_that_is_under_way(tmp_path: Path) -> None:
    is_reached, go_on = threading.Event(), threading.Event()

    class Held(MemoryStore):
        def write(self, rows: Int64Array, records: Float32Array) -> None:
            if records[0, 0] < 0:
                is_reached.set()
                assert go_on.wait(TIMEOUT_S)
            super().write(rows, records)

    store = CutStore(Held(make_group(NUM_ROWS), SEED))
    rows = np.arange(50)
    store.write(rows, records_of(rows))
    write_cut = store.begin_cut()
    with ThreadPoolExecutor(2) as pool:
        writing = pool.submit(store.write, rows[:9], np.full((9, WIDTH), -1, np.float32))
        assert is_reached.wait(SOON_S)
        cutting = pool.submit(write_cut, tmp_path / "a.arrow")
        time.sleep(0.1)
        assert not cutting.done()
        go_on.set()
        writing.result(SOON_S)
        file = cutting.result(SOON_S)
    expected = zip(rows.tolist(), map(tuple, records_of(rows).tolist()), strict=True)
    assert read(tmp_path / file.name) == dict(expected)


@pytest.mark.parametrize("in_a_file", [False, True])
def test_a_full_disk_leaves_the_rows_to_the_next_cut(tmp_path: Path, in_a_file: bool) -> None:
    group = make_group(20_000)
    inner: ArrayStore = (
        FileStore(group, SEED, tmp_path / "store") if in_a_file else MemoryStore(group, SEED)
    )
    store = CutStore(inner)
    rows = np.arange(10_000)
    store.write(rows, records_of(rows))
    write_cut = store.begin_cut()
    store.write(rows[:5], records_of(rows[:5], salt=1))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    try:
        with pytest.raises(CheckpointError) as caught:
            write_cut(tmp_path / "a.arrow")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    for fact in (
        f"{tmp_path}/a.arrow: the records of group 2 (dim 6), shard 0 of 1, can't be written: "
        "File too large",
        "the next checkpoint has these rows. Make room",
    ):
        assert fact in str(caught.value)
    assert not (tmp_path / "a.arrow").exists()
    with pytest.raises(StoreError, match="can be committed: none is in hand whose file is on"):
        store.committed()
    store.abandon()
    found = read(tmp_path / cut(store, tmp_path, "a.arrow").name)
    assert set(found) == set(range(10_000))
    assert found[3] == tuple(records_of(rows[3:4], salt=1)[0].tolist())


def test_a_cut_that_is_given_up_while_it_is_written_ends(tmp_path: Path) -> None:
    model = Model(tmp_path)
    model.write(range(50))
    model.begin()
    model.inner.deeds = iter([model.store.abandon])
    given_up = model.write_file
    with pytest.raises(StoreError, match=r"cut of group 2 .* was given up before it was on disk"):
        given_up(tmp_path / "a.arrow")
    model.of_cut = None
    model.begin()  # at once, while a thread may not have seen that the first was given up
    with pytest.raises(StoreError, match=r"cut of group 2 .* was given up before it was on disk"):
        given_up(tmp_path / "b.arrow")
    assert list(tmp_path.iterdir()) == []
    model.write_cut([])
    assert model.written is not None
    assert model.written.num_records == 50


def test_a_store_that_was_not_put_back_whole_says_so_and_is_loaded_next_time(
    tmp_path: Path,
) -> None:
    store = make_store()
    rows = np.arange(40)
    store.write(rows, records_of(rows))
    file = cut(store, tmp_path, "a.arrow")
    store.write(rows[:7], records_of(rows[:7], salt=1))
    whole = (tmp_path / file.name).read_bytes()
    (tmp_path / file.name).write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=r"a.arrow: can't be read"):
        store.put_back(tmp_path, [file])
    with pytest.raises(StoreError, match="can't be cut, since putting it back has failed"):
        store.begin_cut()
    (tmp_path / file.name).write_bytes(whole)
    with pytest.raises(LookupError):
        store.put_back(tmp_path, [file], Mock(side_effect=LookupError))  # it is given up
    assert store.put_back(tmp_path, [file]) == 40
    np.testing.assert_array_equal(fetch(store, rows), records_of(rows))


def test_a_file_with_fewer_records_than_its_manifest_says_is_refused(tmp_path: Path) -> None:
    store = make_store()
    store.write(np.arange(40), records_of(np.arange(40)))
    file = cut(store, tmp_path, "a.arrow")
    other = RecordFile(**{**vars(file), "num_records": 41})
    with pytest.raises(CheckpointError, match=r"a.arrow: is damaged: has 40 .* manifest says 41"):
        make_store().put_back(tmp_path, [other])


def test_to_abandon_no_cut_is_nothing() -> None:
    store = make_store()
    store.abandon()
    assert store.base == ()
