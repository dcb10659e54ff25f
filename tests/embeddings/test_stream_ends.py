"""How a stream of batches ends where it can't simply stop: a reader that never comes back, threads
that don't start, two threads that iterate.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.embeddings.test_lookahead import Batch, batches, make_embeddings, train
from tests.soon import SOON_S, TIMEOUT_S, ends_soon, wait_until

import bagpipe
from bagpipe.embeddings.batches import Lookahead
from bagpipe.embeddings.collection import EmbeddingBagCollection
from bagpipe.errors import BackgroundError, UsageError
from bagpipe.native import jit


class Blocking:
    """Batches behind which the reader waits, as for a mount that is dead, until `release`."""

    def __init__(self, count: int) -> None:
        self.count, self._is_released = count, threading.Event()
        self.is_waiting = threading.Event()

    def __iter__(self) -> Iterator[Batch]:
        yield from batches(self.count)
        self.is_waiting.set()
        self._is_released.wait(TIMEOUT_S)

    def release(self) -> None:
        """Lets the reader go, and waits for the threads that it held."""
        self._is_released.set()
        for thread in threading.enumerate():
            if thread.name.startswith(("bagpipe-oracle", "bagpipe-reader", "bagpipe-dedup")):
                thread.join(SOON_S)
                assert not thread.is_alive()


@pytest.fixture
def blocking(monkeypatch: pytest.MonkeyPatch) -> Iterator[Blocking]:
    monkeypatch.setattr("bagpipe.embeddings.batches._STOP_TIMEOUT_S", 0.3)
    loader = Blocking(20)
    yield loader
    loader.release()


NUM_STEPS = 13
LEFT_BEHIND = "its reader has not come back within 0 s from the loader"


def loop(blocking: Blocking, stream: Lookahead[Batch], embeddings: EmbeddingBagCollection) -> None:
    """Trains some steps and leaves when the reader waits."""
    for batch in stream:
        embeddings(batch.sparse).values().sum().backward()
        if batch.number == NUM_STEPS - 1:
            assert blocking.is_waiting.wait(SOON_S)
            break


def failing_loop(blocking: Blocking, embeddings: EmbeddingBagCollection) -> None:
    with bagpipe.lookahead(blocking, embeddings, cache=64, lookahead=2) as stream:
        loop(blocking, stream, embeddings)
        raise ZeroDivisionError("of the user")


def check_rows(embeddings: EmbeddingBagCollection) -> None:
    """They are those of so many steps."""
    expected = make_embeddings()
    train(expected, bagpipe.lookahead(batches(NUM_STEPS), expected, cache=64))
    assert embeddings.step == NUM_STEPS
    assert torch.equal(embeddings.tables()["t"][:], expected.tables()["t"][:])


def test_a_loop_is_left_soon_though_the_loader_blocks(blocking: Blocking) -> None:
    embeddings = make_embeddings()
    with ends_soon(), pytest.warns(RuntimeWarning, match=LEFT_BEHIND):
        loop(
            blocking,
            bagpipe.lookahead(blocking, embeddings, cache=64, lookahead=2),
            embeddings,
        )
    check_rows(embeddings)


def test_an_error_in_the_loop_is_shown_though_the_loader_blocks(blocking: Blocking) -> None:
    embeddings = make_embeddings()
    with (
        pytest.warns(RuntimeWarning, match=LEFT_BEHIND),
        pytest.raises(ZeroDivisionError, match="of the user"),
    ):
        failing_loop(blocking, embeddings)
    check_rows(embeddings)


def test_threads_that_compile_are_waited_for(
    blocking: Blocking, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come back, which takes a busy machine's first run long; the reader stands for them."""
    embeddings, waits = make_embeddings(), list[float]()
    stream = bagpipe.lookahead(blocking, embeddings, cache=64, lookahead=2)
    loop(blocking, stream, embeddings)
    stop = stream._source.stop

    def stop_third(*, timeout_s: float) -> bool:
        waits.append(timeout_s)
        if len(waits) == 3:
            blocking.release()
        return stop(timeout_s=timeout_s)

    monkeypatch.setattr(stream._source, "stop", stop_third)
    monkeypatch.setattr(jit._listener, "num_in_hand", 1)
    stream.close()  # without a warning, which would be an error
    assert len(waits) == 3


def test_two_threads_that_iterate_are_refused(blocking: Blocking) -> None:
    embeddings = make_embeddings()
    with bagpipe.lookahead(blocking, embeddings, cache=64, lookahead=2) as stream:
        waiting = threading.Thread(target=lambda: list(stream), daemon=True)
        waiting.start()
        # all are handed out but those whose window needs what the reader waits for
        wait_until(lambda: embeddings.step == 17 and stream._turn.locked())
        with pytest.raises(UsageError, match="another thread asks this stream"):
            next(stream)
        blocking.release()
        waiting.join(SOON_S)
        assert not waiting.is_alive()
    assert embeddings.step == 20


def test_a_stream_that_ended_with_an_error_does_not_look_finished() -> None:
    embeddings = make_embeddings()

    def failing() -> Iterator[Batch]:
        yield from batches(4)
        raise OSError("the disk is gone")

    stream = bagpipe.lookahead(failing(), embeddings, cache=64)
    with pytest.raises(BackgroundError, match="the disk is gone"):
        list(stream)
    with pytest.raises(UsageError, match=r"ended with an error .*the disk is gone"):
        next(stream)


@pytest.mark.parametrize("failing", ["oracle", "write-back_0"])
def test_a_stream_whose_threads_do_not_start_leaves_none(
    failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start: Any = threading.Thread.start

    def start_others(thread: threading.Thread) -> None:
        if thread.name == f"bagpipe-{failing}":
            raise RuntimeError("can't start new thread")
        start(thread)

    embeddings = make_embeddings()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start_others)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            bagpipe.lookahead(batches(4), embeddings, cache=64)
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("bagpipe-") and not thread.name.startswith("bagpipe-kernel"):
            thread.join(SOON_S)
            assert not thread.is_alive()
    assert train(embeddings, bagpipe.lookahead(batches(4), embeddings, cache=64)) == [0, 1, 2, 3]
