"""Learning rates over a run: torch's schedulers, of the dense part's optimizer and the tables'.

They step after each step of the run, so a rate counts from the next backward on. All trainers step
alike. Their state is part of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from bagpipe.config.metrics import compared, is_better_high, score_name
from bagpipe.config.rates import (
    CosineRate,
    PlateauRate,
    PolynomialRate,
    RateConfig,
    StepRate,
)


class Rates:
    """The learning rates of a run."""

    def __init__(
        self,
        schedules: Sequence[tuple[Optimizer, RateConfig | None]],
        num_steps: int,
        label_names: Sequence[str] = ("label",),
    ) -> None:
        """Sets the rates of the first step.

        Args:
            schedules: each optimizer with its schedule; None: its rate stays.
            num_steps: of the whole run.
            label_names: the labels that it learns.
        """
        self._rates = [
            _Rate(optimizer, config, num_steps, label_names)
            for optimizer, config in schedules
            if config is not None
        ]

    @property
    def change(self) -> bool:
        """Whether any rate may change."""
        return bool(self._rates)

    def after_step(self, step: int) -> None:
        """Sets the rates of the step that follows, when `step` steps are done."""
        for rate in self._rates:
            rate.after_step(step)

    def after_evaluation(self, step: int, scores: Mapping[str, float | None]) -> None:
        """Lowers rates whose metric gets no better, after an evaluation at `step`."""
        for rate in self._rates:
            rate.after_evaluation(step, scores)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on from here, to the bit."""
        return {"rates": [rate.state_dict() for rate in self._rates]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from where `state_dict` was asked for."""
        for rate, saved in zip(self._rates, state["rates"], strict=True):
            rate.load_state_dict(saved)


class _Rate:
    """The schedule of one optimizer."""

    def __init__(
        self,
        optimizer: Optimizer,
        config: RateConfig,
        num_steps: int,
        label_names: Sequence[str],
    ) -> None:
        self._optimizer, self._config, self._label_names = optimizer, config, label_names
        self._scheduler, self._end = _by_step(optimizer, config, num_steps)
        self._plateau: ReduceLROnPlateau | None = None
        if isinstance(config, PlateauRate):
            self._plateau = ReduceLROnPlateau(
                optimizer,
                mode="max" if is_better_high(config.metric) else "min",
                factor=config.factor,
                patience=config.patience,
                cooldown=config.cooldown,
                eps=0.0,
            )

    def after_step(self, step: int) -> None:
        if self._end is None or step <= self._end:
            self._scheduler.step()

    def after_evaluation(self, step: int, scores: Mapping[str, float | None]) -> None:
        config = self._config
        if self._plateau is None or not isinstance(config, PlateauRate):
            return
        score = scores[score_name(config.metric, config.label, self._label_names)]
        if score is not None and step > config.warmup_steps:
            self._plateau.step(compared(config.metric, score))

    def state_dict(self) -> dict[str, Any]:
        return {
            "lr": [group["lr"] for group in self._optimizer.param_groups],
            "scheduler": self._scheduler.state_dict(),
            "plateau": None if self._plateau is None else self._plateau.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for group, lr in zip(self._optimizer.param_groups, state["lr"], strict=True):
            group["lr"] = lr
        self._scheduler.load_state_dict(state["scheduler"])
        if self._plateau is not None:
            self._plateau.load_state_dict(state["plateau"])


def _by_step(
    optimizer: Optimizer, config: RateConfig, num_steps: int
) -> tuple[LRScheduler, int | None]:
    """The scheduler of a schedule, and the step after which it changes nothing any more."""
    parts: list[LRScheduler] = []
    milestones: list[int] = []  # where the next part begins
    warmup = config.warmup_steps
    end: int | None = warmup
    if warmup:
        parts.append(LinearLR(optimizer, 1 / (warmup + 1), total_iters=warmup))
        milestones.append(warmup)
    if isinstance(config, PolynomialRate | CosineRate):
        start, length = config.decay(num_steps)
        end = start + length
        if start > warmup:
            parts.append(_constant(optimizer))
            milestones.append(start)
        parts.append(
            PolynomialLR(optimizer, length, power=config.power)
            if isinstance(config, PolynomialRate)
            else CosineAnnealingLR(optimizer, length)
        )
    elif isinstance(config, StepRate):
        end = None
        parts.append(StepLR(optimizer, config.every_steps, gamma=config.factor))
    else:
        parts.append(_constant(optimizer))
    return SequentialLR(optimizer, parts, milestones), end


def _constant(optimizer: Optimizer) -> ConstantLR:
    return ConstantLR(optimizer, factor=1.0, total_iters=0)
