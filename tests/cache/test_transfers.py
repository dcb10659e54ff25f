"""What moves records between a store and a cache, on its own.

An interrupt loses nothing, and write-backs do not wait for marks.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.soon import SOON_S, TIMEOUT_S, wait_until
from torch import Tensor

from bagpipe.cache import transfers
from bagpipe.cache.marks import Marks
from bagpipe.cache.transfers import RecordMover
from bagpipe.store.base import NO_STEPS, Steps
from bagpipe.types import Float32Array, Int64Array


class Cache:
    """Four slots of one number each."""

    num_slots, device = 4, torch.device("cpu")
    group = SimpleNamespace(record_width=1, record_bytes=4)

    def __init__(self) -> None:
        self.memory = torch.zeros(4, 1)

    def read(self, slots: Tensor, out: Tensor | None = None) -> Tensor:
        records = self.memory[slots.long()]
        return records if out is None else out.copy_(records)

    def fill(self, slots: Tensor, records: Tensor) -> None:
        self.memory[slots.long()] = records


class Store:
    """A hundred rows, row i being i at first. Row 20 is not read before `may_read`."""

    def __init__(self) -> None:
        self.records = np.arange(100, dtype=np.float32)[:, None]
        self.may_read = threading.Event()

    def fetch(self, rows: Int64Array, out: Float32Array) -> None:
        if 20 in rows:
            assert self.may_read.wait(TIMEOUT_S)
        out[:] = self.records[rows]

    def ask(self, rows: Int64Array, out: Float32Array, fence: Steps) -> Callable[[], None]:
        return partial(self.fetch, rows, out)

    def write(self, rows: Int64Array, records: Float32Array) -> None:
        self.records[rows] = records


def moves(evict: dict[int, int], fetch: dict[int, int]) -> tuple[Any, Callable[[], Any]]:
    """A group's transfers by row and slot, and what moves them to the device."""
    slots = {
        "evict_slots": np.array([*evict.values()], np.int32),
        "fetch_slots": np.array([*fetch.values()], np.int32),
    }
    rows = {"evict_rows": np.array([*evict], np.int64), "fetch_rows": np.array([*fetch], np.int64)}
    on_device = SimpleNamespace(**{name: torch.from_numpy(array) for name, array in slots.items()})
    return SimpleNamespace(**slots, **rows, fence_tick=-1), lambda: (on_device,)


PLAN: Any = SimpleNamespace(step=1, issue_tick=0)


def test_an_interrupt_while_a_step_is_issued_loses_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another step's gather does not note what an interrupt kept from being done.

    It runs as on CUDA, with streams that are made up here.
    """
    streams = made_up_streams(monkeypatch)
    cache, store = Cache(), Store()
    mover = RecordMover([cache], [store], streams, None)  # type: ignore[list-item]
    first, to_device = moves({}, {10: 0, 11: 1})
    mover.fill(mover.issue(PLAN, [first], 0, to_device))
    cache.memory[:2] += 1000  # they are trained
    second, to_device = moves({}, {20: 2})
    under_way = mover.issue(PLAN, [second], 1, to_device)

    def interrupted() -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mover.issue(PLAN, [moves({10: 0}, {30: 0})[0]], 1, interrupted)
    store.may_read.set()
    mover.fill(under_way)
    mover.finish_writes()
    mover.write_all()
    mover.close()
    assert store.records[[10, 11, 20, 30], 0].tolist() == [1010, 1011, 20, 30]


def made_up_streams(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As those of a CUDA device."""
    event = SimpleNamespace(record=lambda *_: None, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: event)
    stream = SimpleNamespace(
        wait_event=lambda _: None, record_event=lambda: event, synchronize=lambda: None
    )
    return SimpleNamespace(
        out=stream,
        into=stream,
        on=lambda _: contextlib.nullcontext(),
        current=lambda: stream,
        let_out_follow=lambda: None,
    )


def test_write_backs_run_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "_NUM_THREADS", 2)
    meeting = threading.Barrier(2)

    class MeetingStore(Store):
        def write(self, rows: Int64Array, records: Float32Array) -> None:
            meeting.wait(SOON_S)  # for another one

    mover = RecordMover([Cache()], [MeetingStore()], None, None)  # type: ignore[list-item]
    for step, row in enumerate((10, 11)):
        evicted, to_device = moves({row: 0}, {})
        mover.issue(PLAN, [evicted], step, to_device).gathered.result()
    mover.finish_writes()  # raises where one has waited in vain
    mover.close()
    assert not meeting.broken


class MarkedStore(Store):
    """Notes what is sent and marked; what is sent is written late, the first one last."""

    group = None

    def __init__(self) -> None:
        super().__init__()
        self.sent, self.is_second_written = list[str](), threading.Event()

    def send(self, rows: Int64Array, records: Float32Array) -> Callable[[], None]:
        self.sent.append(f"row {rows[0]}")
        if len(self.sent) == 1:
            return lambda: require(self.is_second_written.wait(TIMEOUT_S))
        return self.is_second_written.set

    def mark(self, steps: Steps) -> None:
        self.sent.append(f"{steps.overlapped - MARKED} {steps.urgent - MARKED}")

    def snapshot(self) -> None:
        raise NotImplementedError

    clear = close = snapshot


MARKED = 1 << 40  # where the steps of the first stream begin


def require(is_so: bool) -> None:
    assert is_so


@pytest.mark.parametrize("on_device", [False, True])
def test_a_mark_is_sent_behind_what_was_sent_before_it_and_waits_for_no_write(
    on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers, "_NUM_THREADS", 2)
    streams = made_up_streams(monkeypatch)
    store = MarkedStore()
    marks = Marks(store, 1)  # type: ignore[arg-type]
    mover = RecordMover([Cache()], [store], streams if on_device else None, marks)  # type: ignore[list-item]
    for step, row in enumerate((10, 11)):
        evicted, to_device = moves({row: 0}, {})
        mover.issue(PLAN, [evicted], step, to_device)
        mover.mark("overlapped", step)
    assert mover._order_thread is not None
    mover._order_thread.submit(lambda: None).result()
    none = -1 - MARKED
    assert store.sent == ["row 10", f"0 {none}", "row 11", f"1 {none}"]
    mover.finish_writes()
    mover.close()


def test_an_emptied_slot_is_not_flushed() -> None:
    cache, store = Cache(), Store()
    mover = RecordMover([cache], [store], None, None)  # type: ignore[list-item]
    for step, (evict, fetch) in enumerate([({}, {10: 3}), ({10: 3}, {}), ({}, {10: 0})]):
        moved, to_device = moves(evict, fetch)
        moved.fence_tick = step - 1
        mover.issue(PLAN, [moved], step, to_device).gathered.result()
    cache.memory[0] += 1000  # trained in its new slot, while the old one holds what it was
    mover.finish_writes()
    mover.write_all()
    mover.close()
    assert store.records[10, 0] == 1010


class FarStore(Store):
    """Whose answers come a while after they are asked for, on `may_read`; notes what happens."""

    def __init__(self, name: str, happened: list[str]) -> None:
        super().__init__()
        self.name, self.happened = name, happened

    def ask(self, rows: Int64Array, out: Float32Array, fence: Steps) -> Callable[[], None]:
        self.happened.append(f"{self.name} asked for {rows.tolist()} behind {fence}")

        def wait() -> None:
            assert self.may_read.wait(TIMEOUT_S)
            self.happened.append(f"{self.name} answered {rows.tolist()}")
            self.fetch(rows, out)

        return wait


def test_all_groups_are_asked_before_the_first_is_waited_for() -> None:
    happened: list[str] = []
    caches, stores = [Cache(), Cache()], [FarStore("a", happened), FarStore("b", happened)]
    for store in stores:
        store.may_read.set()
    mover = RecordMover(caches, stores, None, None)  # type: ignore[arg-type]
    both = [moves({}, {row: 0}) for row in (10, 11)]
    both[1][0].fence_tick = 2
    plan: Any = SimpleNamespace(step=5, issue_tick=4)
    issued = mover.issue(
        plan, [moved for moved, _ in both], 4, lambda: (*both[0][1](), *both[1][1]())
    )
    mover.fill(issued)
    mover.close()
    fence = Steps(overlapped=3, urgent=2)
    asked = [f"a asked for [10] behind {fence}", f"b asked for [11] behind {fence}"]
    assert happened[:2] == asked
    assert sorted(happened[2:]) == ["a answered [10]", "b answered [11]"]
    assert [cache.memory[0].item() for cache in caches] == [10, 11]


@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize("at_once", [False, True])
def test_what_was_asked_for_is_waited_for_whatever_fails(broken: int, at_once: bool) -> None:
    """A store may write into the arrays until then."""
    happened: list[str] = []
    caches, stores = [Cache(), Cache()], [FarStore("a", happened), FarStore("b", happened)]
    for store in stores:
        store.may_read.set()

    def fail(*_: Any) -> Any:
        raise OSError("gone")

    if at_once:
        stores[broken].ask = fail  # type: ignore[method-assign]
    else:
        stores[broken].fetch = fail  # type: ignore[method-assign]
    mover = RecordMover(caches, stores, None, None)  # type: ignore[arg-type]
    both = [moves({}, {row: 0}) for row in (10, 11)]
    issued = mover.issue(
        PLAN, [moved for moved, _ in both], 0, lambda: (*both[0][1](), *both[1][1]())
    )
    with pytest.raises(OSError, match="gone"):
        mover.fill(issued)
    mover.close()
    asked, answered = (
        {text[0] for text in happened if what in text} for what in ("asked", "answered")
    )
    assert asked == answered
    assert len(asked) == (broken if at_once else 2)


def test_a_step_evicts_and_asks_while_the_records_of_the_step_before_are_on_their_way() -> None:
    happened: list[str] = []
    cache, store = Cache(), FarStore("it", happened)
    mover = RecordMover([cache], [store], None, None)  # type: ignore[list-item]
    cache.memory[1] = 1020
    first, to_device = moves({}, {10: 0})
    under_way = [mover.issue(PLAN, [first], 0, to_device)]
    second, to_device = moves({20: 1}, {30: 1})
    under_way.append(mover.issue(PLAN, [second], 1, to_device))
    wait_until(lambda: store.records[20, 0] == 1020 and len(happened) == 2, lambda: happened)
    assert happened == [f"it asked for [{row}] behind {NO_STEPS}" for row in (10, 30)]
    store.may_read.set()
    for issued in under_way:
        mover.fill(issued)
    mover.close()
    assert cache.memory[:2, 0].tolist() == [10, 30]


class SentStore(Store):
    """An ordered store that notes what is sent and what is waited for."""

    group = snapshot = clear = close = mark = lambda *_: None

    def __init__(self) -> None:
        super().__init__()
        self.happened: list[str] = []

    def send(self, rows: Int64Array, records: Float32Array) -> Callable[[], None]:
        self.happened.append(f"sent {rows.tolist()}")

        def wait() -> None:
            self.happened.append(f"waited for {rows.tolist()}")
            self.write(rows, records)

        return wait


def test_a_flush_of_16_mb_sends_half_of_it_before_the_rest_is_read() -> None:
    """So the cache is read while the network and the server are at work."""
    cache, store = Cache(), SentStore()
    cache.group = SimpleNamespace(record_width=1, record_bytes=4 << 20)  # as if
    mover = RecordMover([cache], [store], None, None)  # type: ignore[list-item]
    fetched, to_device = moves({}, {10: 0, 11: 1, 12: 2, 13: 3})
    mover.fill(mover.issue(PLAN, [fetched], 0, to_device))
    mover.write_all()
    mover.close()
    assert store.happened[:2] == ["sent [10, 11]", "sent [12, 13]"]


def test_a_flush_sends_a_block_while_two_before_are_on_their_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transfers, "_FLUSH_BLOCK_BYTES", 4)  # a row each
    cache, store = Cache(), SentStore()
    mover = RecordMover([cache], [store], None, None)  # type: ignore[list-item]
    fetched, to_device = moves({}, {10: 0, 11: 1, 12: 2, 13: 3})
    mover.fill(mover.issue(PLAN, [fetched], 0, to_device))
    cache.memory += 1000
    mover.write_all()
    mover.close()
    rows = 10, 11, 12, 13
    sent, waited = ([f"{what} [{row}]" for row in rows] for what in ("sent", "waited for"))
    assert store.happened == [*sent[:3], waited[0], sent[3], *waited[1:]]
    assert store.records[10:14, 0].tolist() == [1010, 1011, 1012, 1013]
