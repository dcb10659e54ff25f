"""A run's progress for a person.

On a terminal it is one live line under the sentences that scroll past, and a second one during an
evaluation. Elsewhere, as in a log file, a plain line comes every half minute.

While loops are compiled, which the first run on a machine does, the line says so and how many are.
"""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Self

from rich import progress
from rich.console import Console
from rich.text import Text

from bagpipe.native.jit import count_compiled, is_compiling
from bagpipe.train.report import StepAverages, line_of

_NOTHING_YET = "-/s loss - hit - wait -"
_LOOK_EVERY_S = 0.25
_COMPILING_IS_TOLD_AFTER_S = 1.0


class _Description(progress.ProgressColumn):
    """A task's description, or what is compiled at the moment, on one line."""

    max_refresh = 0.25

    def render(self, task: progress.Task) -> Text:
        return Text(_compiling() or task.description, no_wrap=True, overflow="ellipsis")


class ConsoleReporter:
    """Draws progress lines on a rich console.

    It is a context manager, which leaves the last line standing.

    Args:
        console: where to.
        line_every_s: seconds between two plain lines where the console is no terminal.
    """

    def __init__(self, console: Console, *, line_every_s: float = 30.0) -> None:
        self._console = console
        self._bar = progress.Progress(
            progress.MofNCompleteColumn(),
            _Description(),
            progress.TimeRemainingColumn(compact=True),
            console=console,
        )
        self._line_every_s = line_every_s
        self._training: progress.TaskID | None = None
        self._evaluation: progress.TaskID | None = None
        self._is_over = threading.Event()
        self._teller = threading.Thread(
            target=self._tell_by_itself, name="bagpipe-progress", daemon=True
        )

    def __enter__(self) -> Self:
        self._bar.start()
        self._teller.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_over.set()
        self._teller.join()
        self._bar.stop()

    def start(self, step: int, num_steps: int) -> None:
        """Draws the line at `step` of `num_steps`."""
        self._training = self._bar.add_task(_NOTHING_YET, total=num_steps, completed=step)

    def advance(self, step: int) -> None:
        """Moves the line to `step`."""
        if self._training is not None:
            self._bar.update(self._training, completed=step)

    def show(self, averages: StepAverages) -> None:
        """Puts new numbers on the line."""
        if self._training is not None:
            self._bar.update(self._training, description=line_of(averages))

    def evaluating(self, num_done: int, num_batches: int) -> None:
        """Moves the line of an evaluation, which goes with its last batch."""
        if self._evaluation is None:
            self._evaluation = self._bar.add_task("batches evaluated", total=num_batches)
        self._bar.update(self._evaluation, completed=num_done)
        if num_done == num_batches:
            self._bar.remove_task(self._evaluation)
            self._evaluation = None

    def say(self, text: str) -> None:
        """Prints a sentence above the line."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _tell_by_itself(self) -> None:
        """Runs in a thread of its own: a loop that waits for something tells nobody."""
        compiling_since: float | None = None
        is_told = False
        line_at = time.monotonic() + self._line_every_s
        while not self._is_over.wait(min(_LOOK_EVERY_S, self._line_every_s)):
            now = time.monotonic()
            compiling_since = (compiling_since or now) if is_compiling() else None
            if (
                not is_told
                and compiling_since is not None
                and now - compiling_since >= _COMPILING_IS_TOLD_AFTER_S
            ):
                is_told = True
                self.say("compiling loops, once: further runs on this machine start at once")
            if now >= line_at:
                line_at = now + self._line_every_s
                if not self._console.is_terminal:
                    self._write_line()

    def _write_line(self) -> None:
        for task in self._bar.tasks:
            left = "" if task.time_remaining is None else f" {_duration(task.time_remaining)} left"
            self.say(
                f"{task.completed:.0f}/{task.total:.0f} {_compiling() or task.description}{left}"
            )
        if not self._bar.tasks:
            self.say(_compiling() or "preparing")


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _compiling() -> str:
    """What a line says while loops are compiled; else nothing."""
    if not is_compiling():
        return ""
    done, total = count_compiled()
    return f"compiling loops, once: {done} of at most {total}"
