"""Tables in memory that a GPU reads itself: where they are used, and where not."""

from __future__ import annotations

import os
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.store_contract import make_group

from bagpipe.cache import managed
from bagpipe.cache.device_cache import DeviceCache
from bagpipe.cache.managed import ManagedStore, memory_store_on
from bagpipe.cache.movers import mover_for
from bagpipe.cache.transfers import RecordMover
from bagpipe.errors import UsageError
from bagpipe.store import MemoryStore

CUDA = torch.device("cuda", 0)
plain_memory = partial(np.zeros, dtype=np.uint8)


def test_on_a_cpu_a_store_has_memory_of_its_own_kind() -> None:
    assert memory_store_on(torch.device("cpu"), [make_group()]) is MemoryStore


def test_tables_too_large_to_take_at_once_are_moved_by_the_host(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    group = make_group()
    needed = group.num_rows * group.record_bytes
    monkeypatch.setattr(managed, "_available_bytes", lambda: 2 * needed - 1)
    with caplog.at_level("INFO", "bagpipe.lookahead"):
        store = memory_store_on(CUDA, [group])(group, 0)
    assert type(store) is MemoryStore
    assert "more than 50% of the" in caplog.text


def test_groups_that_are_too_large_together_take_nothing_at_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    group = make_group()
    monkeypatch.setattr(
        managed, "_available_bytes", lambda: 3 * group.num_rows * group.record_bytes
    )
    with caplog.at_level("INFO", "bagpipe.lookahead"):
        make = memory_store_on(CUDA, [group, group])
        assert {type(make(group, 0)), type(make(group, 0))} == {MemoryStore}
    assert "threads of the host move rows of all tables" in caplog.text


def test_where_the_driver_has_no_such_memory_the_host_moves_rows(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(device: torch.device, num_bytes: int) -> np.ndarray:
        raise OSError(f"CUDA's driver has error 2 for managed memory on {device}")

    monkeypatch.setattr(managed, "_refusal", lambda num_bytes, device: None)
    monkeypatch.setattr(managed, "_allocate", refuse)
    group = make_group()
    assert type(memory_store_on(CUDA, [group])(group, 0)) is MemoryStore
    assert "has error 2 for managed memory on cuda:0" in caplog.text


def test_a_machine_without_the_driver_moves_rows_by_the_host(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(managed, "_DRIVER", "libno-such-driver.so.1")
    with caplog.at_level("INFO", "bagpipe.lookahead"):
        assert type(memory_store_on(CUDA, [make_group()])(make_group(), 0)) is MemoryStore
    assert "the CUDA driver can't be loaded" in caplog.text


def test_free_memory_is_known() -> None:
    assert 0 < managed._available_bytes() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")


def test_a_container_has_no_more_than_its_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limit, none = tmp_path / "memory.max", tmp_path / "no limit"
    none.write_text("max\n")
    monkeypatch.setattr(managed, "_CONTAINER_LIMITS", (none, limit, tmp_path / "missing"))
    assert managed._available_bytes() > 4096
    limit.write_text("4096\n")
    assert managed._available_bytes() == 4096


def test_a_system_that_does_not_tell_of_its_memory_has_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(managed, "_MEMORY_INFO", tmp_path / "missing")
    assert managed._available_bytes() == 0


def test_touching_leaves_zeros_and_no_page_out() -> None:
    memory = np.ones(3 * 4096 + 5, np.uint8)
    managed._touch(memory)
    assert np.flatnonzero(memory == 0).tolist() == [0, 4096, 2 * 4096, 3 * 4096]


def test_a_forked_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    store = ManagedStore(make_group(), 0, plain_memory)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(UsageError, match="memory that a GPU reads"):
        store.fetch(np.arange(1), np.empty((1, store.group.record_width), np.float32))


def test_one_store_that_a_device_does_not_reach_leaves_all_moves_to_the_host() -> None:
    stores = [ManagedStore(make_group(), 0, plain_memory), MemoryStore(make_group(), 0)]
    cpu = torch.device("cpu")
    caches = [DeviceCache(group=store.group, num_slots=2, device=cpu) for store in stores]
    mover = mover_for(caches, stores, None, None)
    try:
        assert isinstance(mover, RecordMover)
    finally:
        mover.close()


def test_a_stream_that_is_closed_keeps_no_table() -> None:
    direct = pytest.importorskip("bagpipe.cache.direct")
    group, memories = make_group(), list[weakref.ref[np.ndarray]]()

    def allocate(num_bytes: int) -> np.ndarray:
        memory = np.zeros(num_bytes, np.uint8)
        memories.append(weakref.ref(memory))
        return memory

    store = ManagedStore(group, 0, allocate)
    cache = DeviceCache(group=group, num_slots=2, device=torch.device("cpu"))
    waited = list[str]()
    streams: Any = SimpleNamespace(
        out=SimpleNamespace(wait_event=waited.append), record_compute=lambda: "tables are made"
    )
    mover = direct.DirectMover([cache], [store], streams)
    assert waited == ["tables are made"]  # whatever stream the steps are on
    mover.close()
    mover.give_memory_back()
    with pytest.raises(AssertionError):  # not as if all were written
        mover.write_all()
    store.clear()
    assert [memory() is None for memory in memories] == [True, False]
    store.close()
    assert memories[1]() is None
