"""What a run asks of the other trainers; all of it is trivial where there are none."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from bagpipe.distributed.communicator import Communicator
from bagpipe.errors import BackgroundError, BagpipeError, CheckpointError


class Trainers:
    """The trainers of a run, as one of them sees them.

    All ranks must call what asks all ranks, in the same order.
    """

    def __init__(self, communicator: Communicator | None) -> None:
        self._communicator = communicator
        self.are_alone = communicator is None
        """Whether there is only this one."""
        self.is_first = communicator is None or communicator.rank == 0
        """Whether this one saves, scores and logs."""
        self.is_first_of_host = communicator is None or communicator.is_first_of_host
        """Whether this one saves and loads the records of its host."""
        self.num_trainers = 1 if communicator is None else communicator.num_trainers
        self.num_hosts = 1 if communicator is None else communicator.num_hosts
        self.host = 0 if communicator is None else communicator.host
        self._asked: Callable[[], float] = lambda: 0.0

    def wait(self, what: str) -> None:
        """Waits for all ranks."""
        if self._communicator is not None:
            self._communicator.barrier(f"waiting for {what}")

    @contextmanager
    def averaging(self, step: int) -> Iterator[None]:
        """Around a backward that averages over trainers: explains gloo's error.

        Raises:
            BackgroundError: averaging failed; says that a trainer may be gone, as gloo does not.
        """
        try:
            yield
        except RuntimeError as error:
            if (
                self._communicator is None
                or isinstance(error, BackgroundError)
                or "gloo" not in str(error)
            ):
                raise
            raise BackgroundError(
                f"rank {self._communicator.rank}: averaging the dense part's gradients of step "
                f"{step} failed; another of the "
                f"{self._communicator.num_trainers} trainers may be gone: {error}"
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
        if self._communicator is None:
            return [work()]
        result, failure = None, None
        try:
            result = work()
        except (BagpipeError, OSError) as error:
            failure = error if isinstance(error, BagpipeError) else failure_is(str(error))
        told = json.dumps({"result": result, "failure": None if failure is None else str(failure)})
        answers = [json.loads(text) for text in self._communicator.gather_texts(what, told)]
        if failure is not None:
            raise failure
        for rank, answer in enumerate(answers):
            if answer["failure"] is not None:
                raise failure_is(f"on rank {rank}: {answer['failure']}")
        return [answer["result"] for answer in answers]

    def weight(self, num_samples: int, batch_size: int) -> float:
        """The factor of a rank's mean loss, with which the mean over ranks is the batch's.

        A rank has `num_samples` of the `batch_size` samples of the global batch.
        """
        if self._communicator is None:
            return 1.0
        return num_samples * self._communicator.num_trainers / batch_size

    def agree_on(self, received: signal.Signals | None) -> signal.Signals | None:
        """The signal that any rank had received at the call before.

        All ranks thus end after the same step, and none waits for others. A single trainer's is the
        one that it has received by now.
        """
        if self._communicator is None:
            return received
        number = int(self._asked())
        self._asked = self._communicator.ask_for_largest(0 if received is None else received)
        return signal.Signals(number) if number else None

    def mean(self, value: float) -> float:
        """The mean of all ranks' values, the same on each."""
        return value if self._communicator is None else self._communicator.mean(value)
