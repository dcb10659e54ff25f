"""Cuts beside threads that write, on a full disk, given up, and damaged."""

from __future__ import annotations

import resource
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from tests.soon import SOON_S, TIMEOUT_S
from tests.store.cut_stores import NUM_ROWS, WIDTH, Model, cut, make_store, read
from tests.store_contract import SEED, fetch, make_group, records_of

from bagpipe.errors import CheckpointError, StoreError
from bagpipe.store import FileStore, MemoryStore, cuts
from bagpipe.store.array import ArrayStore
from bagpipe.store.cuts import CutStore
from bagpipe.store.record_files import RecordFile
from bagpipe.types import Float32Array, Int64Array


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
