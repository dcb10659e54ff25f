"""Calls on workers, in order: what comes when, and how many are handed out."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from bagpipe._workers import Workers
from bagpipe.oracle.pipeline import ordered_map


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
