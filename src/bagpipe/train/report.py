"""What a run tells while it runs: the seam between the loop and whoever watches it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The steps since the last look. Waits are what a step waited on average, in milliseconds."""

    loss: float
    examples_per_s: float
    hit_rate: float  # share of the unique rows of each planned step that were in the cache already
    wait_plan_ms: float
    wait_rows_ms: float
    wait_slots_ms: float


class Reporter(Protocol):
    """Whoever watches a run."""

    def start(self, step: int, num_steps: int) -> None:
        """The loop begins after `step` of `num_steps`."""

    def advance(self, step: int) -> None:
        """`step` is done."""

    def show(self, progress: Progress) -> None:
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

    def show(self, progress: Progress) -> None:
        """Does nothing."""

    def evaluating(self, num_done: int, num_batches: int) -> None:
        """Does nothing."""

    def say(self, text: str) -> None:
        """Does nothing."""
