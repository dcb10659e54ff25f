"""Work in which no interrupt may come."""

from __future__ import annotations

from typing import Self

from bagpipe.errors import UsageError


class Undivided:
    """A context for such work, the same object for each step.

    Ctrl-C may come between any two lines of the trainer's thread. If one comes here, nobody knows
    which rows have changed or moved, so from then on no step begins and nothing is written back.
    """

    def __init__(self) -> None:
        self._step = 0
        self._torn_step: int | None = None

    def of(self, step: int) -> Self:
        """The context, for work of a step, which errors name."""
        self._step = step
        return self

    def __enter__(self) -> None:
        self._torn_step = self._step

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, Exception):  # which has its own way to be told
            self._torn_step = None

    def check(self) -> None:
        """Raises UsageError if an interrupt came into it."""
        if self._torn_step is not None:
            raise UsageError(
                f"step {self._torn_step}: an interrupt came while rows were being updated or "
                "moved, so some are and some are not: resume from a checkpoint; a handler of "
                "signals that only sets a flag, which the loop reads between batches, loses nothing"
            )
