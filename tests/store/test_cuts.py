"""Cuts of a store: compared with dicts over random interleavings, and file by file."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import strategies
from tests.store.cut_stores import NUM_ROWS, WIDTH, Model, content, cut, make_store
from tests.store_contract import (
    SEED,
    StoreContract,
    StoreFactory,
    make_group,
    records_of,
    rows_of,
    touched_rows,
)

from bagpipe.store import FileStore, MemoryStore, cuts
from bagpipe.store.cuts import CutStore
from bagpipe.store.record_files import RecordFile, next_files
from bagpipe.topology import shards_of


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
