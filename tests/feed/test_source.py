"""Plan sources: a thread's and a process's give the same, end alike, and can be stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from tests.feed.test_process import Batches, options, start
from tests.soon import TIMEOUT_S, ends_soon

from bagpipe.errors import BackgroundError
from bagpipe.feed.source import PlanSource, ProcessSource, ThreadSource
from bagpipe.feed.stream import DEFAULT_ADAPTER

NUM_BATCHES = 9


@contextmanager
def thread(batches: Batches) -> Iterator[PlanSource[Any]]:
    source = ThreadSource(batches, options(), DEFAULT_ADAPTER)
    try:
        yield source
    finally:
        source.stop(timeout_s=TIMEOUT_S)


@contextmanager
def process(batches: Batches) -> Iterator[PlanSource[Any]]:
    end = start(batches)
    source = ProcessSource(end, copy_batches=True)
    try:
        yield source
    finally:
        source.stop(timeout_s=TIMEOUT_S)
        end.close()


SOURCES = pytest.mark.parametrize("make", [thread, process])
Make = Callable[[Batches], Any]


def take(source: PlanSource[Any]) -> list[int]:
    """The numbers of all batches up to the end or an error, each checked and its step closed."""
    numbers = []
    while (planned := source.next_or_none()) is not None:
        source.check(planned)
        source.end_step(planned.plan.step)
        if planned.release is not None:
            planned.release()
        numbers.append(planned.batch["number"])
    return numbers


@SOURCES
def test_a_source_gives_all_batches_and_its_end(make: Make) -> None:
    with make(Batches(NUM_BATCHES)) as source:
        assert take(source) == list(range(NUM_BATCHES))
        assert source.next_if_ready() is None
        with pytest.raises(StopIteration):
            next(source)


@SOURCES
def test_an_error_is_told_by_next_alone(make: Make) -> None:
    with make(Batches(NUM_BATCHES, "fail")) as source:
        assert take(source) == list(range(NUM_BATCHES))
        assert source.next_or_none() is None
        with pytest.raises(BackgroundError, match="the disk is gone"):
            next(source)


@SOURCES
def test_stopping_ends_what_reads_and_plans(make: Make) -> None:
    with make(Batches(10**6)) as source:
        next(source)
        with ends_soon():
            assert source.stop(timeout_s=TIMEOUT_S)
            assert source.stop(timeout_s=TIMEOUT_S)
        assert source.next_or_none() is None
