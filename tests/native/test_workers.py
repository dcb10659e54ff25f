"""Background threads: order, outcomes, ending."""

from __future__ import annotations

import gc
import threading
import time

import pytest
from tests.soon import SOON_S, wait_until

from bagpipe.native.workers import Workers


def test_calls_run_in_order_and_their_outcome_can_be_had_again_and_again() -> None:
    workers, seen = Workers("w"), list[int]()
    calls = [
        workers.submit(lambda number: seen.append(number) or number, number)
        for number in range(100)
    ]  # type: ignore[func-returns-value]
    assert [call.result() for call in calls] == list(range(100)) == seen
    assert calls[3].result() == 3
    assert calls[3].has_succeeded
    workers.close()
    workers.close()
    with pytest.raises(RuntimeError, match="w is closed"):
        workers.submit(print)


def test_what_a_call_raises_reaches_who_asks_and_the_next_call_runs() -> None:
    workers = Workers("w")
    bad, good = workers.submit(lambda: 1 // 0), workers.submit(lambda: 7)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            bad.result()
    assert good.result() == 7
    assert (bad.is_over, bad.has_failed, bad.has_succeeded) == (True, True, False)
    workers.close()


def test_several_threads_wait_for_one_call() -> None:
    workers, go, results = Workers("w"), threading.Event(), list[bool]()
    call = workers.submit(go.wait)
    waiting = [threading.Thread(target=lambda: results.append(call.result())) for _ in range(4)]
    for thread in waiting:
        thread.start()
    assert not call.is_over
    assert not call.has_failed
    go.set()
    for thread in waiting:
        thread.join()
    assert results == [True] * 4
    workers.close()


def test_several_threads_work_side_by_side() -> None:
    meeting = threading.Barrier(3)
    with Workers("w", 3) as workers:
        calls = [workers.submit(meeting.wait, SOON_S) for _ in range(3)]
        assert sorted(call.result() for call in calls) == [0, 1, 2]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("w_")]


def test_urgent_calls_go_before_others() -> None:
    may_run, seen = threading.Event(), list[int]()
    with Workers("w") as workers:
        calls = [workers.submit(may_run.wait)]
        calls += [
            (workers.submit_urgent if number % 2 else workers.submit)(seen.append, number)
            for number in range(6)
        ]
        may_run.set()
        for call in calls:
            call.result()
    assert seen == [1, 3, 5, 0, 2, 4]


def test_close_waits_for_the_call_in_hand_and_drops_the_others() -> None:
    workers, started = Workers("w"), threading.Event()

    def slow() -> str:
        started.set()
        wait_until(lambda: workers._closed.is_set)
        return "done"

    first, *others = (
        workers.submit(slow),
        workers.submit(lambda: "never"),
        workers.submit(lambda: "never"),
    )
    started.wait()
    workers.close()
    assert first.result() == "done"
    for other in others:
        with pytest.raises(RuntimeError, match="dropped"):
            other.result()


def test_close_ends_a_call_that_waits_for_one_before_it() -> None:
    for _ in range(50):
        workers = Workers("w", 2)
        calls = [workers.submit(time.sleep, 0.0005)]
        for _ in range(3):
            calls.append(workers.submit(calls[-1].result))
        workers.close()
        assert all(call.is_over for call in calls)


def test_the_threads_end_with_their_owner() -> None:
    workers = Workers("bagpipe-dropped")
    assert workers.submit(lambda: 1).result() == 1
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "bagpipe-dropped_0")
    del workers
    gc.collect()
    thread.join(SOON_S)
    assert not thread.is_alive()


def test_threads_that_could_start_end_where_others_could_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start, num_started = threading.Thread.start, 0

    def start_two(thread: threading.Thread) -> None:
        nonlocal num_started
        if num_started == 2:
            raise RuntimeError("can't start new thread")
        num_started += 1
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_two)
    with pytest.raises(RuntimeError, match="can't start new thread") as caught:
        Workers("bagpipe-some", 4)
    for thread in threading.enumerate():
        if thread.name.startswith("bagpipe-some"):
            thread.join(SOON_S)
            assert not thread.is_alive()
    assert caught.tb is not None  # which holds the object: ending must not wait for its end


def test_a_call_whose_submission_was_interrupted_holds_up_neither_others_nor_the_end() -> None:
    class Interrupted:
        """A queue of tokens in which the signal comes before the token is put."""

        def put(self, token: bool) -> None:
            raise KeyboardInterrupt

    workers, seen = Workers("w", 2), list[int]()
    tokens, workers._tokens = workers._tokens, Interrupted()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        workers.submit(seen.append, 1)
    workers._tokens = tokens
    workers.submit(seen.append, 2).result()
    assert seen == [1, 2]
    workers._tokens = Interrupted()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        workers.submit(seen.append, 3)
    workers._tokens = tokens
    closing = threading.Thread(target=workers.close, daemon=True)
    closing.start()
    closing.join(SOON_S)
    assert not closing.is_alive()
    assert seen == [1, 2]
