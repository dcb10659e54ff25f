"""Who comes to an oracle process that several trainers share: all of them, one who never does, and
strangers.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

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
from bagpipe.feed.process import OracleProcess, SharedOracle
from bagpipe.feed.stream import BatchAdapter


@contextmanager
def strangers(address: str) -> Iterator[None]:
    """Who keep connecting and say nothing."""
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
                time.sleep(0.001)  # or a trainer that is slow to greet is the oldest of too many
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
    with strangers(first.address):
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


def test_a_rank_that_never_comes_is_named_after_the_timeout() -> None:
    first = OracleProcess(
        Batches(9), options(3), BatchAdapter(share=share), num_places=NUM_PLACES, join_timeout_s=1.0
    )
    second = SharedOracle.join(first.address, 1)
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
