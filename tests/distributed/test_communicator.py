"""What ranks tell each other of their write-backs."""

from __future__ import annotations

import time
from typing import Any

import pytest
from tests.soon import ends_soon
from tests.train.ranks import run_ranks

from bagpipe.distributed.communicator import Communicator
from bagpipe.distributed.write_marks import WriteMarks
from bagpipe.errors import BackgroundError


class Counted:
    """A key-value store that counts what it is asked for."""

    def __init__(self, store: Any) -> None:
        self.store, self.num_calls = store, 0

    def __getattr__(self, name: str) -> Any:
        self.num_calls += 1
        return getattr(self.store, name)


@pytest.mark.parametrize("num_trainers", [2, 4])
def test_what_is_known_to_be_written_is_not_asked_again(num_trainers: int) -> None:
    def work(communicator: Communicator) -> list[int]:
        waiter = communicator.waiter
        counted = waiter.connection = Counted(waiter.connection)
        calls = []
        for _ in range(2):
            communicator.begin_stream()
            marks = WriteMarks(communicator)
            for step in range(6):
                marks.mark("overlapped", step)
            communicator.barrier("waiting for all marks")
            for step in (2, 0, 5):
                counted.num_calls = 0
                marks.wait("overlapped", step)
                calls.append(counted.num_calls)
            communicator.barrier("waiting for all to have asked")
            communicator.end_stream()
        return calls

    others = num_trainers - 1
    assert run_ranks(num_trainers, work) == [[2 * others, 0, 0] * 2] * num_trainers


def test_a_mark_to_come_is_waited_for() -> None:
    happened = []

    def work(communicator: Communicator) -> None:
        communicator.begin_stream()
        marks = WriteMarks(communicator)
        if communicator.rank == 0:
            marks.mark("urgent", 1)
        communicator.barrier("waiting for the first mark")
        if communicator.rank == 1:
            marks.wait("urgent", 1)
            communicator.barrier("waiting for rank 1 to have asked")
            marks.wait("urgent", 4)
            happened.append("waited for")
        else:
            communicator.barrier("waiting for rank 1 to have asked")
            time.sleep(0.2)  # in which a rank that does not wait would go on
            happened.append("written")
            marks.mark("urgent", 4)

    run_ranks(2, work)
    assert happened == ["written", "waited for"]


def test_a_rank_that_has_gone_is_missed_where_texts_are_gathered() -> None:
    """Not after the timeout: on another host nobody can watch its process."""

    def work(communicator: Communicator) -> None:
        assert communicator.gather_texts("names", f"ä{communicator.rank}" * communicator.rank) == [
            "",
            "ä1",
        ]
        if communicator.rank == 0:
            with pytest.raises(
                BackgroundError,
                match="waiting for settings of all ranks failed; another of the 2 trainers may be",
            ):
                communicator.gather_texts("settings", "mine")

    with ends_soon():
        run_ranks(2, work)
