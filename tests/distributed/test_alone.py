"""A trainer without others is asked the same as one of several, and answers as rank 0 of 1."""

from __future__ import annotations

import inspect
import signal
from typing import Any

import pytest
import torch
from tests.train.ranks import run_ranks

from bagpipe.distributed.alone import ALONE, Alone, peers_of
from bagpipe.distributed.communicator import Communicator
from bagpipe.distributed.trainers import Trainers
from bagpipe.errors import CheckpointError

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
        values = torch.tensor([1.5, 3.0])
        peers.average(values)
        peers.barrier("waiting")
        return [
            peers.rank,
            peers.num_trainers,
            peers.has_others,
            peers.hosts,
            peers.gather_texts("names", "ä"),
            peers.share_text("a name", "ö"),
            peers.largest(-2.5),
            peers.mean(-2.5),
            peers.ask_for_largest(-2.5)(),
            values.tolist(),
            [part.tolist() for part in peers.gather("parts", iter([values, values]), [[2, 2]])[0]],
            peers.all_stop_before(3),
        ]

    assert run_ranks(1, answers) == [answers(ALONE)]
    assert run_ranks(1, peers_of) == [peers_of(None)] == [ALONE]


def test_a_single_trainer_acts_on_a_signal_at_once_and_several_one_call_later() -> None:
    received = [0, signal.SIGTERM, 0]

    def agreed(peers: Any) -> list[int]:
        trainers = Trainers(peers)
        return [trainers.agree_on(own if peers.rank == 0 else 0) for own in received]

    assert agreed(ALONE) == received
    assert run_ranks(2, agreed) == [[0, 0, signal.SIGTERM]] * 2


def test_a_full_disk_is_the_same_error_for_one_trainer_as_for_several() -> None:
    def fail() -> None:
        raise OSError("no space left")

    def told(peers: Any) -> str:
        with pytest.raises(CheckpointError) as caught:
            Trainers(peers).all_do("a file", fail)
        return str(caught.value)

    assert [told(ALONE)] * 2 == run_ranks(2, told) == ["no space left"] * 2
