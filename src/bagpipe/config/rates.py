"""How learning rates go over a run, told apart by their `kind`.

Each is a scheduler of `torch.optim.lr_scheduler` after a linear warm-up; `bagpipe.train.rates`
makes it. MLPerf's DLRM has `kind = "polynomial", power = 2`, with a warm-up and a start of the
decay.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from bagpipe.config.base import Section, Steps
from bagpipe.config.data import Name
from bagpipe.config.metrics import Metric

Factor: TypeAlias = Annotated[float, Field(gt=0.0, lt=1.0)]


class ConstantRate(Section):
    """The optimizer's own rate, once it is warm."""

    kind: Literal["constant"]
    warmup_steps: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Steps below the full rate. With n such steps the first has 1 / (n + 1) of it, the last
    n / (n + 1)."""


class StepRate(ConstantRate):
    """`StepLR`: the rate is multiplied by `factor` every so many steps after the warm-up."""

    kind: Literal["step"]  # type: ignore[assignment]
    every_steps: Steps
    factor: Factor = 0.1


class _Decay(ConstantRate):
    start_step: Steps | None = None
    """The step from which the rate falls. Left out: after the warm-up."""
    decay_steps: Steps | None = None
    """Steps from there until it is 0, where it stays. Left out: up to the end of the run."""

    def decay(self, num_steps: int) -> tuple[int, int]:
        """The step at which a run of `num_steps` begins to decay, and how many steps it takes.

        Raises:
            ValueError: The decay begins before the warm-up ends, or after the run.
        """
        start = self.warmup_steps if self.start_step is None else self.start_step
        if start < self.warmup_steps:
            raise ValueError(
                f"start_step = {start:,} is before the end of warmup_steps = "
                f"{self.warmup_steps:,}: let the decay start there, or later"
            )
        if self.decay_steps is None and start >= num_steps:
            raise ValueError(
                f"the decay starts at step {start:,} and would end with the run, which has "
                f"{num_steps:,} steps: give decay_steps, an earlier start, or more steps"
            )
        return start, self.decay_steps or num_steps - start


class PolynomialRate(_Decay):
    """`PolynomialLR`: the rate falls with the `power` of the steps that are left."""

    kind: Literal["polynomial"]  # type: ignore[assignment]
    power: Annotated[float, Field(gt=0.0, le=100.0)] = 1.0


class CosineRate(_Decay):
    """`CosineAnnealingLR`: the rate falls along half a wave."""

    kind: Literal["cosine"]  # type: ignore[assignment]


class PlateauRate(ConstantRate):
    """`ReduceLROnPlateau`: the rate is multiplied by `factor` when evaluations get no better.

    It needs a validation split and `train.eval_every_steps`. Evaluations within the warm-up do not
    count.
    """

    kind: Literal["plateau"]  # type: ignore[assignment]
    metric: Metric = "log_loss"
    label: Name | None = None
    """The label whose metric counts, where there are several; the first when left out."""
    factor: Factor = 0.1
    patience: Annotated[int, Field(ge=0, le=10**6)] = 1
    """How many evaluations may be no better than the best one before the rate falls."""
    cooldown: Annotated[int, Field(ge=0, le=10**6)] = 0
    """How many evaluations after a fall do not count."""


RateConfig: TypeAlias = Annotated[
    ConstantRate | StepRate | PolynomialRate | CosineRate | PlateauRate,
    Field(discriminator="kind"),
]
