"""A stream that the server has ended says which server it was, whenever something is asked."""

from __future__ import annotations

import sys
import threading

import numpy as np
import pytest
from tests.soon import SOON_S, wait_until

from bagpipe.errors import StoreError
from bagpipe.server.parts import Part, Pending
from bagpipe.server.streams import Stream
from bagpipe.server.wire import Header
from bagpipe.types import UInt8Array


class EndedChannel:
    """Its server is gone; that is noticed once `is_told`."""

    def __init__(self) -> None:
        self.is_told = threading.Event()

    def write(self, part: Part, header: Header) -> None:
        assert not self.is_told.is_set(), "nothing may be written to an ended stream"

    def read(self) -> tuple[Header, UInt8Array | None]:
        assert self.is_told.wait(SOON_S)
        raise StopIteration

    def finish(self) -> None: ...

    def cancel(self) -> None: ...

    def close(self) -> None: ...


class Ended:
    """A stream whose server ends it, and why it was told to have failed."""

    def __init__(self) -> None:
        self.failures: list[Exception] = []
        self.channel = EndedChannel()
        self.stream = Stream(self.channel, (), self.fail, of_fetches=True)
        self.receiving = self.stream._threads[0]

    def fail(self, error: Exception) -> StoreError:
        self.failures.append(error)
        return StoreError(f"shard server 3 of 5: {error}")


def part_of(pending: Pending) -> Part:
    return Part(pending=pending, header=Header.__new__(Header), rows=np.array([1]))


@pytest.mark.parametrize("later", [False, True])
def test_who_asks_a_stream_that_has_ended_is_told_which(later: bool) -> None:
    ended = Ended()
    ended.channel.is_told.set()
    ended.receiving.join(SOON_S)
    assert ended.failures == []  # it is no fault that it ends
    for _ in range(2):
        with pytest.raises(StoreError, match="shard server 3 of 5: it has ended"):
            (ended.stream.send_later if later else ended.stream.send)(part_of(Pending(1)))
    assert len(ended.failures) == 1
    ended.stream.close()


def test_who_asks_a_stream_at_the_moment_at_which_it_ends_is_told_which() -> None:
    ended, pending = Ended(), Pending(1)
    with ended.stream._lock:
        ended.channel.is_told.set()
        wait_until(lambda: is_in(ended.receiving, "_receive"))  # it waits for the lock
        ended.stream._note(part_of(pending))
    with pytest.raises(StoreError, match="shard server 3 of 5: it has ended"):
        pending.wait()
    assert len(ended.failures) == 1
    ended.stream.close()


def is_in(thread: threading.Thread, function: str) -> bool:
    """Whether that is what a thread runs now, and nothing inside it."""
    frame = sys._current_frames().get(thread.ident or 0)
    return frame is not None and frame.f_code.co_name == function
