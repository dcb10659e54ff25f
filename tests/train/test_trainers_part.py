"""Trainers that part: whatever one of them does otherwise than the others, all of them end soon,
with an error that says which rank, at which step, and what.
"""

from __future__ import annotations

import gc
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from tests.soon import ends_soon
from tests.train.ranks import forget_frames, run_ranks
from tests.train.test_trainers import linear_loss, make_batches, make_tables
from torch import Tensor

import bagpipe
from bagpipe.cache.exchange_messages import RowMessages
from bagpipe.distributed.communicator import Communicator, Moment
from bagpipe.embeddings.batches import Lookahead
from bagpipe.embeddings.collection import EmbeddingBagCollection
from bagpipe.errors import BackgroundError, BagpipeError, DataError, UsageError
from bagpipe.jagged import share_of
from bagpipe.optimizers import SGD
from bagpipe.types import Jagged

NUM_BATCHES = 14
BATCHES = make_batches(NUM_BATCHES)
EXTRA = make_batches(2, seed=5)[0]


@dataclass(kw_only=True)
class Rank:
    """One rank's loop."""

    communicator: Communicator
    embeddings: EmbeddingBagCollection
    stream: Lookahead[Jagged]

    @property
    def is_odd_one(self) -> bool:
        return self.communicator.rank == 1

    def loss(self, batch: Jagged) -> Tensor:
        return linear_loss(self.embeddings(batch).groups)


def backward(rank: Rank, batch: Jagged, step: int) -> None:
    rank.loss(batch).backward()


def outcomes(
    loaders: Sequence[Any],
    do_step: Callable[[Rank, Jagged, int], object] = backward,
    *,
    num_hosts: int = 1,
    **options: Any,
) -> list[tuple[int, BaseException | None]]:
    """By rank how many steps it began and what ended it; all of them end soon."""
    ended: dict[int, tuple[int, BaseException | None]] = {}

    def work(communicator: Communicator) -> None:
        embeddings = EmbeddingBagCollection(
            make_tables(), optimizer=SGD(lr=0.5), communicator=communicator
        )
        num_steps, failure = 0, None
        settings = {"cache": [60, 40], "replicas": [400, 50], "lookahead": 3} | options
        try:
            with bagpipe.lookahead(loaders[communicator.rank], embeddings, **settings) as stream:
                rank = Rank(communicator=communicator, embeddings=embeddings, stream=stream)
                for step, batch in enumerate(stream):
                    num_steps = step + 1
                    if do_step(rank, batch, step) == "break":
                        break
        except Exception as error:
            failure = error
            forget_frames(error)
        ended[communicator.rank] = num_steps, failure

    with ends_soon():
        run_ranks(len(loaders), work, num_hosts=num_hosts)
    return [ended[rank] for rank in range(len(loaders))]


def exchanged(batches: Sequence[Jagged]) -> list[Jagged]:
    """Two of them in the other order."""
    return [*batches[:6], batches[7], batches[6], *batches[8:]]


def smaller(batches: Sequence[Jagged]) -> list[Jagged]:
    """One of them with a sample less."""
    return [*batches[:6], share_of(batches[6], 0, 2), *batches[7:]]


def other_value(batches: Sequence[Jagged]) -> list[Jagged]:
    """One id of one of them is another one."""
    values = np.array(batches[6].values)
    values[0] = (values[0] + 1) % 400
    return [*batches[:6], replace(batches[6], values=values), *batches[7:]]


def one_fewer(batches: Sequence[Jagged]) -> list[Jagged]:
    return list(batches[:-1])


def one_more(batches: Sequence[Jagged]) -> list[Jagged]:
    return [*batches, EXTRA]


def far_fewer(batches: Sequence[Jagged]) -> list[Jagged]:
    return list(batches[:1])


@pytest.mark.parametrize(
    ("change", "first_other"),
    [
        (exchanged, 6),
        (smaller, 6),
        (other_value, 6),
        (one_fewer, NUM_BATCHES - 1),
        (one_more, NUM_BATCHES),
        (far_fewer, 1),
    ],
)
@pytest.mark.parametrize(
    ("depth", "num_trainers", "num_hosts"), [(0, 2, 1), (2, 2, 1), (5, 2, 2), (2, 3, 1)]
)
def test_other_batches_on_one_rank_are_an_error_on_all_before_they_are_trained(
    change: Callable[[Sequence[Jagged]], list[Jagged]],
    first_other: int,
    depth: int,
    num_trainers: int,
    num_hosts: int,
) -> None:
    loaders = [BATCHES] * num_trainers
    loaders[1] = change(BATCHES)
    ends = outcomes(loaders, num_hosts=num_hosts, prefetch_depth=depth)
    assert len({str(error) for _, error in ends}) == 1  # the same on all
    for num_steps, error in ends:
        assert isinstance(error, DataError)
        assert re.search(
            r"ranks read other batches: .*step \d+.*rank 0.*rank 1|rank 1.*rank 0", str(error)
        )
        assert "the same order" in str(error)
        assert num_steps <= first_other


@dataclass
class Failing:
    """Batches of which the last can't be read."""

    batches: Sequence[Jagged]

    def __iter__(self) -> Iterator[Jagged]:
        yield from self.batches
        raise OSError("the disk is gone")


@pytest.mark.parametrize("num_hosts", [1, 2])
def test_a_loader_that_fails_on_one_rank_is_told_on_all(num_hosts: int) -> None:
    for _, error in outcomes([BATCHES, Failing(BATCHES[:8])], num_hosts=num_hosts):
        assert isinstance(error, DataError)
        assert "so those of rank 1 end sooner" in str(error)
        assert "the disk is gone" in str(error)


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("step", [3, 4])
def test_messages_that_come_late_fit_or_are_not_sent_and_hold_up_nobody_behind(
    step: int, late: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rank that waits for them sees the error, and sends no more: gloo ends a process that is
    sent more than it waits for. Messages under way end with the connections of both ranks.
    """
    original = RowMessages.send_replicas

    def send_late(messages: RowMessages, of: Any, moment: Moment) -> None:
        if moment == "overlapped" and of.plan.step == step and messages._communicator.rank == late:
            time.sleep(0.8)
        original(messages, of, moment)

    monkeypatch.setattr(RowMessages, "send_replicas", send_late)
    for _, error in outcomes([BATCHES, Failing(BATCHES[:8])]):
        assert isinstance(error, DataError)
        assert "the disk is gone" in str(error)
    with ends_soon():
        for thread in threading.enumerate():
            if thread.name.startswith("bagpipe-exchange"):
                thread.join()
        gc.collect()


def test_a_loader_that_fails_alike_on_all_ranks_fails_behind_the_batches_before() -> None:
    for num_steps, error in outcomes([Failing(BATCHES[:8])] * 2):
        assert num_steps == 8
        assert isinstance(error, BackgroundError)
        assert "the disk is gone" in str(error)


def skip_backward(rank: Rank, batch: Jagged, step: int) -> None:
    if not (rank.is_odd_one and step == 5):
        backward(rank, batch, step)


def skip_one_table(rank: Rank, batch: Jagged, step: int) -> None:
    """As a loss does that leaves a part of the model out."""
    groups = rank.embeddings(batch).groups
    linear_loss(groups[:1] if rank.is_odd_one and step == 5 else groups).backward()


def evaluate_alone(rank: Rank, batch: Jagged, step: int) -> None:
    backward(rank, batch, step)
    if rank.is_odd_one and step == 5:
        rank.embeddings.eval()
        rank.embeddings(EXTRA)
        rank.embeddings.train()


def flush_alone(rank: Rank, batch: Jagged, step: int) -> None:
    backward(rank, batch, step)
    if rank.is_odd_one and step == 5:
        rank.stream.flush()


def flush_before_backward_alone(rank: Rank, batch: Jagged, step: int) -> None:
    if rank.is_odd_one and step == 5:
        rank.embeddings.flush()
    backward(rank, batch, step)


def leave_overlapped(rank: Rank, batch: Jagged, step: int) -> str:
    backward(rank, batch, step)
    return "break" if rank.is_odd_one and step == 5 else ""


def other_rate(rank: Rank, batch: Jagged, step: int) -> None:
    if rank.is_odd_one and step == 5:
        rank.embeddings.set_learning_rate(0.25)
    backward(rank, batch, step)


def other_rate_at_the_end(rank: Rank, batch: Jagged, step: int) -> None:
    if rank.is_odd_one and step == NUM_BATCHES - 1:
        rank.embeddings.set_learning_rate(0.25)
    backward(rank, batch, step)


def ask_alone(rank: Rank, batch: Jagged, step: int) -> None:
    backward(rank, batch, step)
    if rank.is_odd_one and step == 5:
        rank.communicator.mean(1.0)


def tell_alone(rank: Rank, batch: Jagged, step: int) -> None:
    if rank.is_odd_one and step == 5:
        rank.communicator.gather_texts("the colours", "red")
    backward(rank, batch, step)


ODD_ACTS = [
    (skip_backward, r"rank 1 ends step 5 with gradients of nothing alone"),
    (skip_one_table, r"rank 1 ends step 5 with gradients of group \d.* alone"),
    (evaluate_alone, r"rank 1 writes its rows back at step 5 \(for an evaluation"),
    (flush_alone, r"rank 1 writes its rows back at step 5"),
    (flush_before_backward_alone, r"rank 1 writes its rows back at step 5"),
    (leave_overlapped, r"rank 1 writes its rows back at step 5 .*since its batches are over"),
    (other_rate, r"in step 5 at the learning rate 0\.5, .*in step 5 at the learning rate 0\.25"),
    (other_rate_at_the_end, r"rank 1 updates its rows in step 13 at the learning rate 0\.25"),
    (ask_alone, r"rank 1 compares a number"),
    (tell_alone, r"rank 1 tells the colours"),
]


@pytest.mark.parametrize(
    ("do_step", "message", "oracle"),
    [(*each, "thread") for each in ODD_ACTS] + [(*each, "process") for each in ODD_ACTS[::3]],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_one_rank_does_otherwise_is_an_error_on_all(
    do_step: Callable[[Rank, Jagged, int], object], message: str, oracle: str
) -> None:
    ends = outcomes([BATCHES, BATCHES], do_step, oracle=oracle)
    assert any(isinstance(error, UsageError) for _, error in ends)
    for _, error in ends:
        assert isinstance(error, BagpipeError)
        assert "trainers part: rank 0 " in str(error)
        assert re.search(message, str(error))


@pytest.mark.parametrize("do_step", [evaluate_alone, flush_alone, leave_overlapped])
def test_on_two_hosts_too(do_step: Callable[[Rank, Jagged, int], object]) -> None:
    for _, error in outcomes([BATCHES, BATCHES], do_step, num_hosts=2):
        assert isinstance(error, UsageError)
        assert "rank 1 writes its rows back at step 5" in str(error)


def test_a_rank_that_fails_and_lives_on_is_named_at_once() -> None:
    def fail(rank: Rank, batch: Jagged, step: int) -> None:
        if rank.is_odd_one and step == 5:
            raise ValueError("the loss is negative")
        backward(rank, batch, step)

    (_, first), (_, second) = outcomes([BATCHES, BATCHES], fail)
    assert isinstance(second, ValueError)
    assert isinstance(first, BackgroundError)
    assert "rank 1 has failed: ValueError: the loss is negative" in str(first)
