"""Training by several trainers, threads here, through one oracle process: the result of one trainer
to the bit, and every end.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from tests.soon import SOON_S, ends_soon
from tests.train.ranks import forget_frames, run_ranks
from tests.train.test_trainers import (
    Loop,
    assert_equal,
    break_and_go_on,
    flush_in_steps,
    linear_loss,
    make_batches,
    make_tables,
    train,
)

import bagpipe
from bagpipe.distributed.communicator import Communicator
from bagpipe.embeddings.batches import Lookahead
from bagpipe.embeddings.collection import EmbeddingBagCollection
from bagpipe.errors import BackgroundError, ConfigError, LostError
from bagpipe.feed.source import ProcessSource
from bagpipe.optimizers import SGD, Adam
from bagpipe.types import Jagged


@pytest.mark.parametrize(("num_trainers", "check"), [(2, False), (3, False), (3, True)])
def test_trainers_equal_one_to_the_bit(num_trainers: int, check: bool) -> None:
    batches = make_batches(14)
    expected = train(make_tables(), Adam(lr=0.05), batches, [(1, 14)], lookahead=3)
    options: dict[str, Any] = {"lookahead": 3, "oracle": "process", "check": check}
    assert_equal(
        train(make_tables(), Adam(lr=0.05), batches, [(num_trainers, 14)], **options), expected
    )


def test_training_goes_on_with_another_number_of_trainers() -> None:
    batches = make_batches(12)
    expected = train(make_tables(), SGD(lr=0.5), batches, [(1, 12)])
    assert_equal(
        train(make_tables(), SGD(lr=0.5), batches, [(3, 4), (2, 9), (1, 12)], oracle="process"),
        expected,
    )


@pytest.mark.parametrize("loop", [break_and_go_on, flush_in_steps])
@pytest.mark.parametrize("depth", [0, 2])
def test_loops_that_break_or_flush(loop: Loop, depth: int) -> None:
    options: dict[str, Any] = {
        "loop": loop,
        "cache": [300, 50],
        "lookahead": 3,
        "prefetch_depth": depth,
    }
    expected = train(make_tables(), SGD(lr=0.5), make_batches(14), [(1, 14)], **options)
    assert_equal(
        train(make_tables(), SGD(lr=0.5), make_batches(14), [(2, 14)], oracle="process", **options),
        expected,
    )


@dataclasses.dataclass
class Failing:
    """Batches of which the last can't be read."""

    batches: Sequence[Jagged]

    def __iter__(self) -> Iterator[Jagged]:
        yield from self.batches
        raise OSError("the disk is gone")


@dataclasses.dataclass
class Hanging:
    """Batches behind which the reader waits, as for a file system that is gone."""

    batches: Sequence[Jagged]

    def __iter__(self) -> Iterator[Jagged]:
        yield from self.batches
        time.sleep(600)


def failures_of(
    num_trainers: int,
    batches: Any,
    in_step: Callable[[Communicator, Lookahead[Any], int], None],
    **options: Any,
) -> Any:
    """By rank how many steps it trained and what ended it; all of them soon."""
    outcomes: dict[int, tuple[int, BaseException]] = {}

    def work(communicator: Communicator) -> None:
        embeddings = EmbeddingBagCollection(
            make_tables(), optimizer=SGD(lr=0.5), communicator=communicator
        )
        number = 0
        try:
            with bagpipe.lookahead(
                batches,
                embeddings,
                **{"cache": [300, 50], "replicas": [400, 50], "oracle": "process"} | options,
            ) as stream:
                for number, batch in enumerate(stream, 1):
                    linear_loss(embeddings(batch).groups).backward()
                    in_step(communicator, stream, number)
        except Exception as error:
            outcomes[communicator.rank] = number, error
            forget_frames(error)

    with ends_soon():
        run_ranks(num_trainers, work)
    assert sorted(outcomes) == list(range(num_trainers))
    return [outcomes[rank] for rank in range(num_trainers)]


def do_nothing(communicator: Communicator, stream: Lookahead[Any], number: int) -> None:
    pass


def test_what_the_reader_raises_ends_all_ranks_behind_the_batches_before() -> None:
    for num_steps, error in failures_of(3, Failing(make_batches(10)), do_nothing):
        assert num_steps == 10
        assert isinstance(error, BackgroundError)
        assert "the disk is gone" in str(error)


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_on_one_rank_is_raised_while_the_reader_hangs(
    failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When all that is planned is sent, so that the process waits for the reader alone."""
    monkeypatch.setattr("bagpipe.feed.process._STOP_TIMEOUT_S", 0.0)  # then it is killed
    last, raised = 4, [0.0]

    def fail(communicator: Communicator, stream: Lookahead[Any], number: int) -> None:
        if communicator.rank == failing and number == last:
            time.sleep(1.0)
            raised[0] = time.monotonic()
            raise ValueError("the loss is negative")

    outcomes = failures_of(2, Hanging(make_batches(12)), fail, lookahead=3)
    assert time.monotonic() - raised[0] < SOON_S
    assert isinstance(outcomes[failing][1], ValueError)
    other = outcomes[1 - failing][1]
    assert isinstance(other, BackgroundError)
    assert f"rank {failing} " in str(other)


def test_too_many_replicas_are_refused_on_all_ranks() -> None:
    for num_steps, error in failures_of(2, make_batches(10), do_nothing, replicas=1):
        assert num_steps == 0
        assert isinstance(error, ConfigError)
        assert "has room for 1 replicas" in str(error)


def test_what_cannot_be_sent_to_a_process_is_refused_on_all_ranks() -> None:
    for _, error in failures_of(2, iter([lambda: None]), do_nothing):
        assert isinstance(error, ConfigError)
        assert "can't be sent to another process" in str(error)


def test_the_death_of_the_process_ends_all_ranks() -> None:
    def kill(communicator: Communicator, stream: Lookahead[Any], number: int) -> None:
        if communicator.rank == 0 and number == 5:
            assert isinstance(stream._source, ProcessSource)
            assert stream._source.process._process is not None
            os.kill(stream._source.process._process.pid or 0, signal.SIGKILL)

    for _, error in failures_of(2, make_batches(1000), kill):
        assert isinstance(error, LostError)
        assert "ended by itself" in str(error)


def test_ranks_that_have_come_to_different_steps_do_not_wait_for_each_other() -> None:
    def hang_up(communicator: Communicator, stream: Lookahead[Any], number: int) -> None:
        if communicator.rank == 1 and number == 5:
            assert isinstance(stream._source, ProcessSource)
            end = stream._source.process._connection.fileno()
            with socket.socket(fileno=os.dup(end)) as connection:
                connection.shutdown(socket.SHUT_RDWR)

    (_, first), (_, second) = failures_of(2, make_batches(1000), hang_up)
    assert isinstance(second, LostError)
    assert isinstance(first, BackgroundError)
    assert "rank 1's connection" in str(first) or "rank 0: exchanging" in str(first)
