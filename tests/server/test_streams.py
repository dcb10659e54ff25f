"""A stream that the server has ended while nothing was owed says so to who asks it next."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from tests.soon import SOON_S

from bagpipe.errors import StoreError
from bagpipe.server.parts import Part, Pending
from bagpipe.server.streams import Stream
from bagpipe.server.wire import Header
from bagpipe.types import UInt8Array


class EndedChannel:
    """Its server is gone."""

    def write(self, part: Part, header: Header) -> None:
        raise AssertionError("nothing may be written to an ended stream")

    def read(self) -> tuple[Header, UInt8Array | None]:
        raise StopIteration

    def finish(self) -> None: ...

    def cancel(self) -> None: ...

    def close(self) -> None: ...


@pytest.mark.parametrize("later", [False, True])
def test_who_asks_a_stream_that_has_ended_is_told_which(later: bool) -> None:
    before = set(threading.enumerate())
    failures: list[Exception] = []

    def fail(error: Exception) -> StoreError:
        failures.append(error)
        return StoreError(f"shard server 3 of 5: {error}")

    stream = Stream(EndedChannel(), (), fail, of_fetches=True)
    for thread in set(threading.enumerate()) - before:
        if thread.name == "receive":
            thread.join(SOON_S)
    assert failures == []  # it is no fault that it ends
    part = Part(pending=Pending(1), header=Header.__new__(Header), rows=np.array([1]))
    for _ in range(2):
        with pytest.raises(StoreError, match="shard server 3 of 5: it has ended"):
            (stream.send_later if later else stream.send)(part)
    assert len(failures) == 1
    stream.close()
