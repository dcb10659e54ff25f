"""A trainer without others is asked the same as one of several, and answers as rank 0 of 1."""

from __future__ import annotations

import inspect
from typing import Any

from tests.train.ranks import run_ranks

from bagpipe.distributed.alone import Alone
from bagpipe.distributed.communicator import Communicator

QUESTIONS = [name for name in vars(Alone) if not name.startswith("_")]


def test_it_takes_the_same_arguments() -> None:
    methods = [name for name in QUESTIONS if callable(getattr(Alone, name))]
    assert len(methods) > 5
    for name in methods:
        own, other = (
            list(inspect.signature(getattr(kind, name)).parameters.values())
            for kind in (Alone, Communicator)
        )
        assert own == other, name


def test_it_answers_as_a_communicator_of_one_trainer() -> None:
    def answers(peers: Any) -> list[Any]:
        peers.tell("begins step 0", needed_at=1)
        return [
            peers.rank,
            peers.num_trainers,
            peers.num_hosts,
            peers.ranks_of_host,
            peers.is_first_of_host,
            peers.gather_texts("names", "ä"),
            peers.share_text("a name", "ö"),
            peers.largest(-2.5),
            peers.all_stop_before(3),
        ]

    assert run_ranks(1, answers) == [answers(Alone())]
