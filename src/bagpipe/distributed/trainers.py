"""What a run asks of the other trainers; all of it is trivial where there are none."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from bagpipe.distributed.alone import ALONE, Peers
from bagpipe.errors import BackgroundError, BagpipeError, CheckpointError, LostError


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """What starts trainers, and starts them again when they have failed."""

    name: str
    is_restart: bool
    """Whether it starts them again."""


class Trainers:
    """The trainers of a run, as one of them sees them.

    All ranks must call what asks all ranks, in the same order.
    """

    def __init__(self, peers: Peers = ALONE) -> None:
        self.peers = peers
        self.is_first = peers.rank == 0
        """Whether this one saves, scores and logs."""
        # Answers that are on their way. A single trainer has none to wait for.
        self._asked: deque[Callable[[], float]] = deque([lambda: 0.0] * peers.has_others)

    def wait(self, what: str) -> None:
        """Waits for all ranks."""
        self.peers.barrier(f"waiting for {what}")

    @contextmanager
    def averaging(self, step: int) -> Iterator[None]:
        """Around a backward that averages over trainers: explains gloo's error.

        Raises:
            LostError: averaging failed; says that a trainer may be gone, as gloo does not.
        """
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, BackgroundError) or "gloo" not in str(error):
                raise
            raise LostError(
                f"rank {self.peers.rank}: averaging the dense part's gradients of step {step} "
                f"failed; another of the {self.peers.num_trainers} trainers may be gone: {error}"
            ) from error

    def all_do(
        self, what: str, work: Callable[[], Any], failure_is: type[BagpipeError] = CheckpointError
    ) -> list[Any]:
        """Does `work` on each rank, and returns what it returned on each, once all have done it.

        Args:
            what: is waited for, as an error names it.
            work: returns JSON values; None where a rank has nothing to do.
            failure_is: what the other ranks raise where one raises a BagpipeError of any kind, and
                all ranks where one raises an OSError.
        """
        result, failure = None, None
        try:
            result = work()
        except (BagpipeError, OSError) as error:
            failure = error if isinstance(error, BagpipeError) else failure_is(str(error))
        told = json.dumps({"result": result, "failure": None if failure is None else str(failure)})
        answers = [json.loads(text) for text in self.peers.gather_texts(what, told)]
        if failure is not None:
            raise failure
        for rank, answer in enumerate(answers):
            if answer["failure"] is not None:
                raise failure_is(f"on rank {rank}: {answer['failure']}")
        return [answer["result"] for answer in answers]

    def all_get(
        self, what: str, work: Callable[[], Any], failure_is: type[BagpipeError] = CheckpointError
    ) -> Any:
        """As `all_do`, where each rank keeps what `work` returns, of any kind, for itself."""
        got: list[Any] = []
        self.all_do(what, lambda: got.append(work()), failure_is)
        return got[0]

    def weight(self, num_samples: int, batch_size: int) -> float:
        """The factor of a rank's mean loss, with which the mean over ranks is the batch's.

        A rank has `num_samples` of the `batch_size` samples of the global batch.
        """
        return num_samples * self.peers.num_trainers / batch_size

    def agree_on(self, wish: int) -> int:
        """The greatest wish that any rank had at the call before; 0 is none.

        All ranks thus do the same after the same step, and none waits for others. A single
        trainer's is the one that it has now.
        """
        self._asked.append(self.peers.ask_for_largest(wish))
        return int(self._asked.popleft()())

    def mean(self, value: float) -> float:
        """The mean of all ranks' values, the same on each."""
        return self.peers.mean(value)
