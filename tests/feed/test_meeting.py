"""Who comes to an oracle process that several trainers share: all of them, one who never does, and
strangers.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from tests.feed.test_shared_process import (
    NUM_PLACES,
    Batches,
    drain,
    hang_up,
    options,
    outcomes,
    share,
)
from tests.soon import ends_soon

from bagpipe.errors import BackgroundError, LostError
from bagpipe.feed.meeting import Door
from bagpipe.feed.process import OracleProcess, SharedOracle
from bagpipe.feed.stream import BatchAdapter

MANY = 200
"""Strangers; when there are 56 more, the oldest who has said nothing is sent away."""


@contextmanager
def strangers(address: str, *, then_every_s: float = 0.001) -> Iterator[None]:
    """Who keep connecting and say nothing: many at once, and then one after another.

    A trainer that is slower to greet than 56 of them come is sent away as one of them.
    """
    name, _ = address.split()
    ended, connections = threading.Event(), list[socket.socket]()

    def connect() -> None:
        while not ended.is_set():
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.settimeout(0.05)
            try:
                connection.connect(f"\0{name}")
            except OSError:  # all is full, or over
                connection.close()
                time.sleep(0.005)
            else:
                connections.append(connection)
                ended.wait(0.001 if len(connections) < MANY else then_every_s)
                if len(connections) > 500:
                    connections.pop(0).close()

    thread = threading.Thread(target=connect)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        for connection in connections:
            connection.close()


def test_strangers_who_say_nothing_hold_up_nobody() -> None:
    first = OracleProcess(Batches(9), options(2), BatchAdapter(share=share), num_places=NUM_PLACES)
    with strangers(first.address, then_every_s=1.0):
        time.sleep(0.3)  # the queue before the door is full
        second = SharedOracle.join(first.address, 1)
        assert outcomes([lambda: drain(first), lambda: drain(second)]) == [9, 9]
    second.close()
    first.close()


def test_strangers_do_not_put_off_the_end_of_the_meeting() -> None:
    first = OracleProcess(
        Batches(9), options(2), BatchAdapter(share=share), num_places=NUM_PLACES, join_timeout_s=1.0
    )
    with ends_soon(), strangers(first.address):
        (error,) = outcomes([lambda: drain(first)])
    assert isinstance(error, LostError)
    assert "rank 1 has not come to the oracle process within 1 s" in str(error)
    first.close()


def test_a_rank_that_never_comes_is_named_after_the_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened, come = Door.open, list[SharedOracle[Any]]()

    def open_to_rank_1(timeout_s: float) -> Door:
        """It is there before the time runs, however slow this process is."""
        door = opened(timeout_s)
        come.append(SharedOracle.join(door.address, 1))
        return door

    monkeypatch.setattr(Door, "open", open_to_rank_1)
    first = OracleProcess(
        Batches(9), options(3), BatchAdapter(share=share), num_places=NUM_PLACES, join_timeout_s=1.0
    )
    (second,) = come
    errors = outcomes([lambda: drain(first), lambda: drain(second)])
    for error in errors:
        assert isinstance(error, LostError)
        assert "rank 2 has not come to the oracle process within 1 s" in str(error)
    with pytest.raises(
        BackgroundError,
        match="rank 2 can't reach the oracle process that its host's first rank has started",
    ):
        SharedOracle.join(first.address, 2)
    second.close()
    first.close()


def test_a_rank_that_dies_before_all_have_come_ends_the_others() -> None:
    first = OracleProcess(Batches(9), options(3), BatchAdapter(share=share), num_places=NUM_PLACES)
    second = SharedOracle.join(first.address, 1)
    hang_up(first)
    with pytest.raises(LostError, match="rank 0's connection"):
        drain(second)
    second.close()
    first.close()


def test_strangers_are_not_admitted() -> None:
    first = OracleProcess(Batches(9), options(2), BatchAdapter(share=share), num_places=NUM_PLACES)
    name, _ = first.address.split()
    stranger = SharedOracle.join(f"{name} 0123", 1)
    second = SharedOracle.join(first.address, 1)
    assert outcomes([lambda: drain(first), lambda: drain(second)]) == [9, 9]
    with pytest.raises(LostError):
        drain(stranger)
    for end in (stranger, second, first):
        end.close()
