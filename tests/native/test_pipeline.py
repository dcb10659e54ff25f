"""Calls on workers, in order: what comes when, and how many are handed out."""

from __future__ import annotations

import gc
import itertools
import threading
from collections.abc import Iterator

import pytest
from tests.soon import SOON_S

from bagpipe.errors import BackgroundError
from bagpipe.native.pipeline import BackgroundIterator, ordered_map
from bagpipe.native.workers import Workers


@pytest.mark.parametrize("urgent", [False, True])
@pytest.mark.parametrize("ahead", [1, 2, 3, 8])
def test_results_come_in_order_and_what_the_items_raise_behind_them(
    ahead: int, urgent: bool
) -> None:
    def items() -> Iterator[int]:
        yield from range(20)
        raise KeyError("no more")

    with Workers("w", 3) as workers:
        results = ordered_map(lambda item: 2 * item, items(), workers, ahead, urgent=urgent)
        assert [next(results) for _ in range(20)] == list(range(0, 40, 2))
        with pytest.raises(KeyError, match="no more"):
            next(results)


def test_a_slow_consumer_leaves_half_of_the_calls_handed_out() -> None:
    num_taken, may_run, num_over = 0, threading.Event(), threading.Semaphore(0)

    def items() -> Iterator[int]:
        nonlocal num_taken
        for item in range(40):
            num_taken += 1
            if num_taken == 8:
                may_run.set()
            yield item

    def function(item: int) -> int:
        may_run.wait()
        num_over.release()
        return item

    with Workers("w", 2) as workers:
        for result in ordered_map(function, items(), workers, ahead=8):
            if result == 0:
                for _ in range(8):
                    num_over.acquire()
            assert num_taken - result - 1 >= 4 or num_taken == 40


def thread_of(name: str) -> threading.Thread:
    (thread,) = (each for each in threading.enumerate() if each.name == f"bagpipe-{name}")
    return thread


def test_the_thread_of_items_that_nobody_takes_ends_with_them() -> None:
    items = BackgroundIterator(itertools.count(), ahead=2, name="dropped")
    thread = thread_of("dropped")
    del items
    gc.collect()
    thread.join(SOON_S)
    assert not thread.is_alive()


def test_closing_says_when_the_items_do_not_come_back_and_ends_who_waits_for_them() -> None:
    may_go_on = threading.Event()

    def items() -> Iterator[int]:
        may_go_on.wait()
        yield 1

    waiting = BackgroundIterator(items(), ahead=2, name="waiting")
    thread, taken = thread_of("waiting"), list[int]()
    consumer = threading.Thread(target=lambda: taken.extend(waiting), daemon=True)
    consumer.start()
    assert not waiting.close(timeout_s=0.05)
    consumer.join(0.05)  # it closes, too, and waits
    may_go_on.set()
    for each in (thread, consumer):
        each.join(SOON_S)
        assert not each.is_alive()
    assert waiting.close(timeout_s=0.05)
    assert taken == []


def test_items_that_are_none_are_an_error_for_the_consumer() -> None:
    with pytest.raises(BackgroundError, match="the bad thread failed: TypeError"):
        next(BackgroundIterator(7, ahead=2, name="bad"))  # type: ignore[arg-type]
