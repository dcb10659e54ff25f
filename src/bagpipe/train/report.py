"""What a run measures and tells while it runs: the seam between the loop and whoever watches it."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from bagpipe.embeddings.batches import Lookahead
from bagpipe.errors import LossError

_SHOWN_WAIT_MS = 0.05  # less is shown as 0.0
_logger = logging.getLogger("bagpipe.train")


@dataclass(frozen=True, kw_only=True)
class StepAverages:
    """The steps since the last look; waits are what a step waited on average."""

    loss: float
    examples_per_s: float
    hit_rate: float  # share of the unique rows of each planned step that were in the cache already
    wait_plan_ms: float
    wait_rows_ms: float
    wait_slots_ms: float
    wait_replicas_ms: float  # for rows that other trainers own
    label_losses: tuple[float, ...] = ()  # of several labels each one's, before its weight


class Reporter(Protocol):
    """Whoever watches a run."""

    def start(self, step: int, num_steps: int) -> None:
        """The loop begins after `step` of `num_steps`."""

    def advance(self, step: int) -> None:
        """`step` is done."""

    def show(self, averages: StepAverages) -> None:
        """New numbers."""

    def evaluating(self, num_done: int, num_batches: int) -> None:
        """So many batches of an evaluation are done; the last call tells that all are."""

    def say(self, text: str) -> None:
        """One sentence for a person."""


class SilentReporter:
    """Tells nobody."""

    def start(self, step: int, num_steps: int) -> None:
        """Does nothing."""

    def advance(self, step: int) -> None:
        """Does nothing."""

    def show(self, averages: StepAverages) -> None:
        """Does nothing."""

    def evaluating(self, num_done: int, num_batches: int) -> None:
        """Does nothing."""

    def say(self, text: str) -> None:
        """Does nothing."""


class LoggedReporter:
    """Passes all on to another reporter, and tells the logger "bagpipe.train" at level INFO.

    What is told are the sentences and the numbers of every `log.every_steps` steps.
    """

    def __init__(self, reporter: Reporter) -> None:
        self._reporter, self._step = reporter, 0

    def start(self, step: int, num_steps: int) -> None:
        """Passes it on."""
        self._step = step
        self._reporter.start(step, num_steps)

    def advance(self, step: int) -> None:
        """Passes it on."""
        self._step = step
        self._reporter.advance(step)

    def show(self, averages: StepAverages) -> None:
        """Logs the numbers and passes them on."""
        _logger.info("step %d: %s", self._step, line_of(averages))
        self._reporter.show(averages)

    def evaluating(self, num_done: int, num_batches: int) -> None:
        """Passes it on."""
        self._reporter.evaluating(num_done, num_batches)

    def say(self, text: str) -> None:
        """Logs the sentence and passes it on."""
        _logger.info("%s", text)
        self._reporter.say(text)


def line_of(averages: StepAverages) -> str:
    """A step's averages in 57 columns at most, so that a terminal of 80 has room for the steps.

    It has the sum of the waits, and says which is the longest.
    """
    waits = {
        "plan": averages.wait_plan_ms,
        "rows": averages.wait_rows_ms,
        "slots": averages.wait_slots_ms,
        "replicas": averages.wait_replicas_ms,
    }
    wait_ms = sum(waits.values())
    longest = max(waits, key=lambda kind: waits[kind])
    speed = averages.examples_per_s
    return (
        f"{f'{speed:,.0f}' if speed < 1e6 else f'{speed / 1e3:,.0f}k'}/s "
        f"loss {averages.loss:.4f} hit {averages.hit_rate:.1%} wait {wait_ms:.1f} ms"
        + (f" ({longest})" if wait_ms >= _SHOWN_WAIT_MS else "")
    )


@dataclass(frozen=True, kw_only=True)
class _Totals:
    """What a stream has added up at one moment."""

    num_uniques: int
    num_fetched: int
    plan_s: float
    rows_s: float
    slots_s: float
    replicas_s: float

    @classmethod
    def of(cls, stream: Lookahead[Any]) -> _Totals:
        report, waits = stream.report, stream.waits
        return cls(
            num_uniques=report.num_uniques,
            num_fetched=report.num_fetched,
            plan_s=waits.plan_s,
            rows_s=waits.rows_s,
            slots_s=waits.slots_s,
            replicas_s=waits.replicas_s,
        )


class Meter:
    """Adds up steps until someone looks.

    `restart` begins a window, `take` ends one and begins the next.
    """

    def __init__(self) -> None:
        self._losses = LossWindow()
        self._num_steps = 0
        self._num_examples = 0
        self._started = 0.0
        self._before: _Totals | None = None

    def restart(self, stream: Lookahead[Any]) -> None:
        """Begins a window now."""
        self._num_steps = self._num_examples = 0
        self._before = _Totals.of(stream)
        self._started = time.perf_counter()

    def add(self, step: int, loss: Tensor, num_examples: int) -> None:
        """Adds a step and its loss, as `Objective.loss` gives it, which stays on its device."""
        self._losses.add(step, loss)
        self._num_steps += 1
        self._num_examples += num_examples

    def take(self, stream: Lookahead[Any]) -> StepAverages | None:
        """The window's numbers, None when it has no step. LossError: a loss in it is not finite."""
        losses = self._losses.take()  # waits for the device, so the time is taken after it
        elapsed_s = time.perf_counter() - self._started
        before, num_steps, num_examples = self._before, self._num_steps, self._num_examples
        self.restart(stream)
        now = self._before
        if losses is None or before is None or now is None:
            return None
        num_uniques = now.num_uniques - before.num_uniques
        num_fetched = now.num_fetched - before.num_fetched
        return StepAverages(
            loss=losses[0],
            label_losses=losses[1:],
            examples_per_s=num_examples / elapsed_s,
            hit_rate=1.0 - num_fetched / num_uniques if num_uniques else 1.0,
            wait_plan_ms=1e3 * (now.plan_s - before.plan_s) / num_steps,
            wait_rows_ms=1e3 * (now.rows_s - before.rows_s) / num_steps,
            wait_slots_ms=1e3 * (now.slots_s - before.slots_s) / num_steps,
            wait_replicas_ms=1e3 * (now.replicas_s - before.replicas_s) / num_steps,
        )


class LossWindow:
    """The losses of the steps since the last look.

    They stay on their device, so that no step waits for its loss.
    """

    def __init__(self) -> None:
        self._first_step = 0
        self._losses: list[Tensor] = []

    def add(self, step: int, loss: Tensor) -> None:
        """Adds the loss of `step`; steps come one after the other."""
        if not self._losses:
            self._first_step = step
        self._losses.append(loss.detach())

    def take(self) -> tuple[float, ...] | None:
        """The mean of the losses since the last call, None when there are none.

        Where several labels have losses, theirs follow.

        Raises:
            LossError: one of them is not finite.
        """
        if not self._losses:
            return None
        parts = torch.stack(self._losses).double().cpu().view(len(self._losses), -1).T
        self._losses = []
        losses = parts[0]
        finite = torch.isfinite(losses)
        if not bool(finite.all()):
            first = int(torch.nonzero(~finite)[0])
            raise LossError(
                f"step {self._first_step + first}: the loss is {losses[first].item()}: training "
                "has diverged, and nothing was saved since. Start again with smaller learning "
                "rates (train.optimizer.lr, embeddings.optimizer.lr)"
            )
        return tuple(float(part.contiguous().mean()) for part in parts)
