"""The memory store: the contract, and what is its own."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
from tests.store_contract import (
    StoreContract,
    StoreFactory,
    fetch,
    make_group,
    records_of,
    touched_rows,
)

from bagpipe.errors import StoreError
from bagpipe.store import MemoryStore, array
from bagpipe.store import memory as memory_module


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def make(self) -> StoreFactory:
        return MemoryStore


def test_memory_that_cannot_be_mapped_is_a_store_error() -> None:
    group = make_group(2**40, dim=64)  # beyond the 2**47 bytes that a process can address
    with pytest.raises(StoreError, match=r"can't map .* bytes .* group 2 .*use the file store"):
        MemoryStore(group, 0)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_small_and_huge_pages_give_the_same_records(
    monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    monkeypatch.setattr(memory_module, "_HUGE_PAGES_MAX_SHARE", share)
    store = MemoryStore(make_group(), 0)
    rows = np.arange(0, 1_300, 3)
    store.write(rows, records_of(rows))
    np.testing.assert_array_equal(fetch(store, rows), records_of(rows))


def test_a_write_that_is_under_way_when_the_store_closes_ends_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The loops check no bounds: flags that shrank under them would be written past their end."""
    store = MemoryStore(make_group(1_000_000), 0)
    rows = np.arange(0, 1_000_000, 100)
    monkeypatch.setattr(store, "_make_room", lambda rows: store.close())
    store.write(rows, records_of(rows))
    with pytest.raises(StoreError, match="is closed"):
        fetch(store, rows)


def test_no_memory_for_flags_is_a_store_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(np, "zeros", refuse)
    with pytest.raises(
        StoreError, match=r"can't get 1,300 bytes of memory, one for each row of group 2"
    ):
        MemoryStore(make_group(), 0)


def test_a_kernel_without_huge_pages_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", -1)  # refused by any kernel
    assert touched_rows(MemoryStore(make_group(), 0)) == []


def test_threads_share_a_call_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    group = make_group(5000, dim=5)
    found = []
    for shared_bytes in (1 << 30, 0):
        monkeypatch.setattr(array, "_SHARED_BYTES", shared_bytes)
        store = MemoryStore(group, 3)
        rng = np.random.default_rng(0)
        for _ in range(3):
            rows = rng.permutation(5000)[:2500]
            records = np.empty((2500, group.record_width), np.float32)
            store.fetch(rows, records)
            store.write(rows, records + 1)
        whole = np.empty((5000, group.record_width), np.float32)
        store.fetch(np.arange(5000), whole)
        found.append((whole, touched_rows(store)))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_materialized_rows_are_written_and_keep_what_was_written() -> None:
    store, untouched = MemoryStore(make_group(), 0), MemoryStore(make_group(), 0)
    written, rows = np.array([3, 8]), np.array([8, 1, 3, 1_299])
    store.write(written, records_of(written))
    store.materialize(rows)
    store.materialize(rows)
    assert list(touched_rows(store)) == [1, 3, 8, 1_299]
    np.testing.assert_array_equal(fetch(store, written), records_of(written))
    np.testing.assert_array_equal(
        fetch(store, np.array([1, 1_299])), fetch(untouched, np.array([1, 1_299]))
    )
    with pytest.raises(StoreError, match="row 1,300 lies outside"):
        store.materialize(np.array([0, 1_300]))
