"""A run's progress on a terminal: one live line under the sentences that scroll past."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from rich import progress
from rich.console import Console

from bagpipe.train.report import Progress

_NUMBERS = (
    "{task.fields[speed]}/s loss {task.fields[loss]} hit {task.fields[hit_rate]} "
    "wait plan {task.fields[plan]} rows {task.fields[rows]} slots {task.fields[slots]} ms"
)
_NOTHING_YET: dict[str, Any] = dict.fromkeys(("loss", "speed", "hit_rate", "plan", "rows", "slots"), "-")


class ConsoleReporter:
    """Draws a progress line on a rich console; a context manager, which leaves the last line standing."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = progress.Progress(
            progress.MofNCompleteColumn(),
            progress.TextColumn(_NUMBERS),
            progress.TimeRemainingColumn(compact=True),
            console=console,
        )
        self._task: progress.TaskID | None = None

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._bar.stop()

    def start(self, step: int, num_steps: int) -> None:
        """Draws the line at `step` of `num_steps`."""
        self._task = self._bar.add_task("train", total=num_steps, completed=step, **_NOTHING_YET)

    def advance(self, step: int) -> None:
        """Moves the line to `step`."""
        if self._task is not None:
            self._bar.update(self._task, completed=step)

    def show(self, progress: Progress) -> None:
        """Puts new numbers on the line."""
        if self._task is not None:
            self._bar.update(
                self._task,
                loss=f"{progress.loss:.4f}",
                speed=f"{progress.examples_per_s:,.0f}",
                hit_rate=f"{progress.hit_rate:.1%}",
                plan=f"{progress.wait_plan_ms:.1f}",
                rows=f"{progress.wait_rows_ms:.1f}",
                slots=f"{progress.wait_slots_ms:.1f}",
            )

    def say(self, text: str) -> None:
        """Prints a sentence above the line."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
