"""Buffers that pass between threads and a device, and streams that are made up here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bagpipe.cache.background import BackgroundStream
from bagpipe.cache.overlap import Staging, Streams
from bagpipe.server.memory import StagingMemory

CPU = torch.device("cpu")


def test_a_buffer_is_one_memory_for_torch_and_numpy() -> None:
    buffer = Staging(CPU).take(3, 5)
    buffer.array[:] = np.arange(15).reshape(3, 5)
    assert buffer.tensor.is_contiguous()
    assert buffer.tensor.tolist() == buffer.array.tolist()


def test_what_is_given_back_is_taken_again_and_nothing_else() -> None:
    staging = Staging(CPU)
    first, second = staging.take(300, 65), staging.take(300, 65)
    assert first.whole.data_ptr() != second.whole.data_ptr()
    first.give_back()
    third = staging.take(270, 65)  # of the same size, rounded up
    assert third.whole.data_ptr() == first.whole.data_ptr()
    assert third.array.shape == (270, 65)
    assert staging.take(270, 65).whole.data_ptr() not in {
        first.whole.data_ptr(),
        second.whole.data_ptr(),
    }


@pytest.mark.parametrize("num_records", [0, 1, 16_384, 16_385, 100_000])
def test_buffers_hold_what_is_asked_for(num_records: int) -> None:
    buffer = Staging(CPU).take(num_records, 1)
    assert buffer.array.shape == (num_records, 1)
    assert len(buffer.whole) < 2 * max(num_records, 1 << 14)


def test_buffers_of_memory_that_is_shared_lie_in_it_and_go_back_to_it() -> None:
    memory = StagingMemory(1 << 20)
    places = set()
    for _ in range(3):
        staging = Staging(CPU, memory)
        first, second = staging.take(300, 65), staging.take(300, 65)
        first.tensor.fill_(1)
        second.array[:] = 2
        assert (first.array == 1).all()
        places |= {memory.offset_of(first.array), memory.offset_of(second.array)}
        first.give_back()
        second.give_back()
        staging.close()
    assert None not in places
    assert len(places) == 2


def test_a_buffer_that_has_not_come_back_is_nobody_elses_after_the_end() -> None:
    """After a failure the store's process may still read it, or write to it."""
    memory = StagingMemory(1 << 20)
    staging = Staging(CPU, memory)
    back, gone = staging.take(300, 65), staging.take(300, 65)
    back.give_back()
    staging.close()
    places = {memory.offset_of(Staging(CPU, memory).take(300, 65).array) for _ in range(3)}
    assert memory.offset_of(back.array) in places
    assert memory.offset_of(gone.array) not in places


class MadeUp:
    """Two devices whose streams note what follows what."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device, self.log, self.num_asked = 1, list[str](), 0
        self.streams = [self.stream("main")]
        self.current = {0: self.stream("other"), 1: self.streams[0]}
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.device)
        monkeypatch.setattr(torch.cuda, "current_stream", self.ask)
        monkeypatch.setattr(torch.cuda, "Stream", lambda _: self.stream(""))
        monkeypatch.setattr(torch.cuda, "set_stream", self.set)
        monkeypatch.setattr(torch.cuda, "stream", self.torchs_own)
        monkeypatch.setattr(
            torch._C,
            "_cuda_getCurrentRawStream",
            lambda index: id(self.current[index]),
            raising=False,
        )

    def stream(self, name: str) -> Any:
        return SimpleNamespace(
            device=None, wait_event=self.log.append, record_event=lambda: f"event of {name}"
        )

    def ask(self, _: object) -> Any:
        self.num_asked += 1
        return self.current[1]

    def set(self, stream: Any) -> None:
        self.device, self.current[1] = 1, stream

    @contextlib.contextmanager
    def torchs_own(self, stream: Any) -> Iterator[None]:
        device, before = self.device, self.current[1]
        self.set(stream)
        try:
            yield
        finally:
            self.device, self.current[1] = device, before


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> MadeUp:
    return MadeUp(monkeypatch)


@pytest.mark.parametrize("device", [0, 1])
def test_a_stream_is_current_inside_and_another_one_again_behind(
    made_up: MadeUp, device: int
) -> None:
    streams = Streams(torch.device("cuda", 1))
    made_up.device, main = device, made_up.current[1]
    for _ in range(2):
        with contextlib.suppress(KeyError), streams.on(streams.out):
            assert made_up.current[1] is streams.out
            with streams.on(streams.into):
                assert streams.current() is streams.into
            raise KeyError
        assert (made_up.device, made_up.current[1]) == (device, main)
    assert made_up.num_asked == 3  # torch, once for each stream


def test_evictions_follow_each_ticks_compute_once(made_up: MadeUp) -> None:
    streams = Streams(torch.device("cuda", 1))
    for _ in range(2):
        streams.computed = object()  # type: ignore[assignment]
        for _ in range(3):
            streams.let_out_follow()
        assert made_up.log == [streams.computed]
        made_up.log.clear()


def test_each_stream_follows_what_is_behind_compute_once(made_up: MadeUp) -> None:
    streams = Streams(torch.device("cuda", 1))
    background = BackgroundStream(streams)
    main, other = made_up.current[1], made_up.stream("other")
    made_up.streams[0].device = torch.device("cuda", 1)
    finish = background.start(lambda: None)
    made_up.log.clear()
    for stream, expected in ((main, 1), (main, 1), (other, 2), (other, 2)):
        made_up.current[1] = stream
        finish()
        assert len(made_up.log) == expected
