"""A run's progress on a terminal: one live line under the sentences that scroll past, and a second
one during an evaluation.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich import progress
from rich.console import Console

from bagpipe.train.report import Progress

_NUMBERS = "{speed}/s loss {loss} hit {hit_rate} wait plan {plan} rows {rows} slots {slots} ms"
_NOTHING_YET = _NUMBERS.format(
    **dict.fromkeys(("loss", "speed", "hit_rate", "plan", "rows", "slots"), "-")
)


class ConsoleReporter:
    """Draws progress lines on a rich console; a context manager, which leaves the last line
    standing.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = progress.Progress(
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.description}"),
            progress.TimeRemainingColumn(compact=True),
            console=console,
        )
        self._training: progress.TaskID | None = None
        self._evaluation: progress.TaskID | None = None

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def start(self, step: int, num_steps: int) -> None:
        """Draws the line at `step` of `num_steps`."""
        self._training = self._bar.add_task(_NOTHING_YET, total=num_steps, completed=step)

    def advance(self, step: int) -> None:
        """Moves the line to `step`."""
        if self._training is not None:
            self._bar.update(self._training, completed=step)

    def show(self, progress: Progress) -> None:
        """Puts new numbers on the line."""
        if self._training is not None:
            numbers = _NUMBERS.format(
                loss=f"{progress.loss:.4f}",
                speed=f"{progress.examples_per_s:,.0f}",
                hit_rate=f"{progress.hit_rate:.1%}",
                plan=f"{progress.wait_plan_ms:.1f}",
                rows=f"{progress.wait_rows_ms:.1f}",
                slots=f"{progress.wait_slots_ms:.1f}",
            )
            self._bar.update(self._training, description=numbers)

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
