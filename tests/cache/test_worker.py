"""The background thread of the executor: order, outcomes, ending."""

from __future__ import annotations

import gc
import threading
import time

import pytest

from bagpipe.cache.worker import Worker


def test_calls_run_in_order_and_their_outcome_can_be_had_again_and_again() -> None:
    worker, seen = Worker("w"), list[int]()
    calls = [worker.submit(lambda number: seen.append(number) or number, number) for number in range(100)]  # type: ignore[func-returns-value]
    assert [call.result() for call in calls] == list(range(100)) == seen
    assert calls[3].result() == 3
    assert calls[3].has_succeeded
    worker.close()
    worker.close()
    with pytest.raises(RuntimeError, match="w is closed"):
        worker.submit(print)


def test_what_a_call_raises_reaches_who_asks_and_the_next_call_runs() -> None:
    worker = Worker("w")
    bad, good = worker.submit(lambda: 1 // 0), worker.submit(lambda: 7)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            bad.result()
    assert good.result() == 7
    assert (bad.is_over, bad.has_failed, bad.has_succeeded) == (True, True, False)
    worker.close()


def test_several_threads_wait_for_one_call() -> None:
    worker, go, results = Worker("w"), threading.Event(), list[bool]()
    call = worker.submit(go.wait)
    waiting = [threading.Thread(target=lambda: results.append(call.result())) for _ in range(4)]
    for thread in waiting:
        thread.start()
    assert not call.is_over
    assert not call.has_failed
    go.set()
    for thread in waiting:
        thread.join()
    assert results == [True] * 4
    worker.close()


def test_close_waits_for_the_call_in_hand_and_drops_the_others() -> None:
    worker, started = Worker("w"), threading.Event()

    def slow() -> str:
        started.set()
        time.sleep(0.05)
        return "done"

    first, second = worker.submit(slow), worker.submit(lambda: "never")
    started.wait()
    worker.close()
    assert first.result() == "done"
    assert not second.is_over


def test_the_thread_ends_with_its_worker() -> None:
    worker = Worker("bagpipe-dropped")
    assert worker.submit(lambda: 1).result() == 1
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "bagpipe-dropped")
    del worker
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()
