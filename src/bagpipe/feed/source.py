"""What hands plans to a trainer: threads of its own process, or its end of an oracle process."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from typing import Any, Protocol, TypeVar

from bagpipe.feed.process import SharedOracle
from bagpipe.feed.seals import OpenBatches
from bagpipe.feed.stream import BatchAdapter, Deferred, Planned, StreamOptions, plan_stream
from bagpipe.native.pipeline import BackgroundIterator

BatchT = TypeVar("BatchT")

PLANS_AHEAD = 3
"""Finished plans that wait for the trainer beyond those that it has taken."""
_STEPS_NOT_COMPUTED = 4
"""So many steps may have been issued to a device that has not computed them, which holds their
plans. With fewer the trainer would wait for the device before it gets the next plan."""


def num_places(prefetch_depth: int, *, has_others: bool) -> int:
    """How many plans of an oracle process there may be at a time.

    They are those of the steps that are known ahead, of the current one, of those that the device
    has not computed, and those on their way. With several trainers a step's plan is held until the
    next one's gradients are under way.
    """
    return prefetch_depth + 1 + _STEPS_NOT_COMPUTED + PLANS_AHEAD + 1 + int(has_others)


class PlanSource(Protocol[BatchT]):
    """Batches with their plans, in the order of steps, and what ends them.

    A trainer asks for them in one thread.
    """

    @property
    def loader_end(self) -> bytes:
        """At the end: where a loader with a state is that another process has read."""

    def __next__(self) -> Planned[BatchT]:
        """Waits for the next batch; raises what ended the batches, or StopIteration."""

    def next_or_none(self) -> Planned[BatchT] | None:
        """Waits for the next batch; None at the end or before an error, which `next` then tells."""

    def next_if_ready(self) -> Planned[BatchT] | None:
        """The next batch if there is one without waiting, else None."""

    def check(self, planned: Planned[BatchT]) -> None:
        """Raises DataError if the loader has changed this batch, or one whose step is not over."""

    def end_step(self, step: int) -> None:
        """Says that the loader may use the memory of the batches up to this step again.

        Raises DataError if it has done so already.
        """

    def stop(self, *, timeout_s: float) -> bool:
        """Ends all that reads and plans; plans that were taken stay good. Allowed twice.

        Returns:
            False if a thread has not come back from the user's reader within `timeout_s`. It ends
            when it does, or with the program.
        """


class ThreadSource(BackgroundIterator[Planned[BatchT]]):
    """Reads and plans in threads of this process."""

    def __init__(
        self,
        batches: Iterable[BatchT | Deferred[BatchT]],
        options: StreamOptions,
        adapter: BatchAdapter,
        plan: Callable[..., Generator[tuple[Planned[BatchT], ...]]] = plan_stream,
    ) -> None:
        """Starts the threads; `plan` is called as `plan_stream` is."""
        self._open_batches = OpenBatches()
        steps = plan(batches, options, adapter, self._open_batches)
        super().__init__(_of_first_rank(steps), ahead=PLANS_AHEAD, name="oracle")

    @property
    def loader_end(self) -> bytes:
        return b""  # it was read here

    def check(self, planned: Planned[BatchT]) -> None:
        if planned.seal is not None:
            planned.seal.check()
        self._open_batches.check(planned.plan.step)

    def end_step(self, step: int) -> None:
        self._open_batches.end(step)

    def stop(self, *, timeout_s: float) -> bool:
        return self.close(timeout_s=timeout_s)


class ProcessSource(BackgroundIterator[Planned[BatchT]]):
    """Receives, in a thread, what an oracle process reads and plans.

    The process checks the loader's batches itself, before it sends their copies.
    """

    def __init__(self, process: SharedOracle[Any], *, copy_batches: bool) -> None:
        """Stops `process` at the end; who made it closes it, once no plan is in use."""
        self.process = process
        super().__init__(process.items(copy_batches=copy_batches), ahead=PLANS_AHEAD, name="oracle")

    @property
    def loader_end(self) -> bytes:
        return self.process.loader_end

    def check(self, planned: Planned[BatchT]) -> None:
        pass

    def end_step(self, step: int) -> None:
        pass

    def stop(self, *, timeout_s: float) -> bool:
        self.process.stop()  # first, or the thread would wait for its next message
        return self.close(timeout_s=timeout_s)


def _of_first_rank(
    steps: Generator[tuple[Planned[BatchT], ...]],
) -> Iterator[Planned[BatchT]]:
    """What the first of the ranks planned for gets; ends the stream when it is closed."""
    with closing(steps):
        for planned, *_ in steps:
            yield planned
