"""Stores with cuts for tests, and dicts that a store is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from tests.store_contract import SEED, fetch, initial, make_group, records_of

from bagpipe.errors import StoreError
from bagpipe.store import MemoryStore
from bagpipe.store.cuts import CutStore
from bagpipe.store.record_files import RecordFile, next_files, read_records
from bagpipe.types import Float32Array, Int64Array

NUM_ROWS = 150
WIDTH = 7


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
