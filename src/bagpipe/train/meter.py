"""Measures the steps between two looks: loss, speed, hit rate, waits."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bagpipe.embeddings.lookahead import Lookahead
from bagpipe.train.metrics import LossWindow
from bagpipe.train.report import Progress


@dataclass(frozen=True, kw_only=True)
class _Totals:
    """What a stream has added up at one moment."""

    num_uniques: int
    num_fetched: int
    plan_s: float
    rows_s: float
    slots_s: float

    @classmethod
    def of(cls, stream: Lookahead[Any]) -> _Totals:
        report, waits = stream.report, stream.waits
        return cls(
            num_uniques=report.num_uniques,
            num_fetched=report.num_fetched,
            plan_s=waits.plan_s,
            rows_s=waits.rows_s,
            slots_s=waits.slots_s,
        )


class Meter:
    """Adds up steps until someone looks. `restart` begins a window, `take` ends one and begins the
    next.
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
        """Adds a step and its loss, a scalar, which stays on its device."""
        self._losses.add(step, loss)
        self._num_steps += 1
        self._num_examples += num_examples

    def take(self, stream: Lookahead[Any]) -> Progress | None:
        """The window's numbers, None when it has no step. LossError: a loss in it is not finite."""
        loss = self._losses.take()  # waits for the device, so the time is taken after it
        elapsed_s = time.perf_counter() - self._started
        before, num_steps, num_examples = self._before, self._num_steps, self._num_examples
        self.restart(stream)
        now = self._before
        if loss is None or before is None or now is None:
            return None
        num_uniques = now.num_uniques - before.num_uniques
        num_fetched = now.num_fetched - before.num_fetched
        return Progress(
            loss=loss,
            examples_per_s=num_examples / elapsed_s,
            hit_rate=1.0 - num_fetched / num_uniques if num_uniques else 1.0,
            wait_plan_ms=1e3 * (now.plan_s - before.plan_s) / num_steps,
            wait_rows_ms=1e3 * (now.rows_s - before.rows_s) / num_steps,
            wait_slots_ms=1e3 * (now.slots_s - before.slots_s) / num_steps,
        )
