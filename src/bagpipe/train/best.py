"""The best model of a run, by evaluations on the way: which it was, and whether to go on.

All trainers keep it alike. Its state is part of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bagpipe.config.metrics import compared, is_better_high, score_name
from bagpipe.config.run import BestConfig


class Best:
    """Which evaluation was the best so far; nothing where a configuration does not ask."""

    def __init__(self, config: BestConfig | None, label_names: Sequence[str] = ("label",)) -> None:
        """Nothing yet, of a run that learns these labels."""
        self._config = config
        self._name = (
            None if config is None else score_name(config.metric, config.label, label_names)
        )
        self.score: float | None = None
        self.step: int | None = None
        """The step of the checkpoint that holds the best model, once one does."""
        self.test: dict[str, Any] | None = None
        """The scores of that model on the test split."""
        self.num_worse = 0
        """Evaluations in a row that were no better than the best one."""

    @property
    def is_kept(self) -> bool:
        """Whether the best model is looked for at all."""
        return self._config is not None

    @property
    def is_over(self) -> bool:
        """Whether evaluations have been no better for as long as the run may wait for it."""
        config = self._config
        return (
            config is not None and config.patience is not None and self.num_worse >= config.patience
        )

    def note(self, scores: Mapping[str, Any] | None) -> bool:
        """Takes the scores of an evaluation; returns whether it is the best so far."""
        if self._name is None or scores is None:
            return False
        score = scores[self._name]
        if score is not None and self._is_better(score):
            self.score, self.num_worse = score, 0
            return True
        self.num_worse += 1
        return False

    def _is_better(self, score: float) -> bool:
        config = self._config
        assert config is not None
        if self.score is None:
            return True
        metric = config.metric
        now, then = compared(metric, score), compared(metric, self.score)
        gain = now - then if is_better_high(metric) else then - now
        return gain > config.min_gain

    def __str__(self) -> str:
        score = "none" if self.score is None else f"{self.score:.4f}"
        return f"the best {self._name}, {score}, at step {self.step or 0:,}"

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs."""
        names = ("score", "step", "test", "num_worse")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from where `state_dict` was asked for."""
        for name, value in state.items():
            setattr(self, name, value)
