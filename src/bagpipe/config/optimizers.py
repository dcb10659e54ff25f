"""The sections of tables' optimizers and of their initial weights.

A section's `build` makes the value of `bagpipe.optimizers` or `bagpipe.types` that it describes, so
that nothing but this package knows how a file spells it. Defaults are stated there; a section adds
limits, which tell a mistake by its key.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Generic, Literal, Self, TypeAlias, TypeVar

from pydantic import Field, model_validator

from bagpipe.config.base import Rate, Section, Weight
from bagpipe.optimizers import (
    SGD,
    Adagrad,
    Adam,
    AdamW,
    Optimizer,
    PartialRowWiseAdam,
    RowWiseAdagrad,
)
from bagpipe.types import Initializer, Normal, Uniform

V = TypeVar("V")
Beta: TypeAlias = Annotated[float, Field(ge=0.0, lt=1.0)]


class _Description(Section, Generic[V]):
    describes: ClassVar[type[Any]]

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.build()  # what only the value itself can tell: momentum, bounds that cross
        return self

    def build(self) -> V:
        """Makes the value that this section describes."""
        value: V = self.describes(**self.model_dump(exclude={"kind"}))
        return value


class _Optimizer(_Description[Optimizer]):
    """What all optimizers of tables have; `bagpipe.optimizers` says what it does."""

    lr: Rate
    weight_decay: Rate = 0.0
    max_grad_norm: Annotated[Rate, Field(gt=0.0)] | None = None
    """The norm to which a row's longer gradient is scaled."""


class EmbeddingSGD(_Optimizer):
    """`bagpipe.SGD`. `momentum` is there to be refused with its reason."""

    describes = SGD
    kind: Literal["sgd"]
    momentum: Weight = SGD.momentum


class EmbeddingAdagrad(_Optimizer):
    """`bagpipe.Adagrad`."""

    describes = Adagrad
    kind: Literal["adagrad"]
    eps: Rate = Adagrad.eps
    initial_accumulator_value: Rate = Adagrad.initial_accumulator_value


class EmbeddingRowWiseAdagrad(_Optimizer):
    """`bagpipe.RowWiseAdagrad`."""

    describes = RowWiseAdagrad
    kind: Literal["rowwise_adagrad"]
    eps: Rate = RowWiseAdagrad.eps
    initial_accumulator_value: Rate = RowWiseAdagrad.initial_accumulator_value


class _Adam(_Optimizer):
    betas: tuple[Beta, Beta] = Adam.betas
    eps: Rate = Adam.eps


class EmbeddingAdam(_Adam):
    """`bagpipe.Adam`, which is lazy."""

    describes = Adam
    kind: Literal["adam"]


class EmbeddingAdamW(_Adam):
    """`bagpipe.AdamW`: Adam with decoupled weight decay."""

    describes = AdamW
    kind: Literal["adamw"]
    weight_decay: Rate = AdamW.weight_decay


class EmbeddingPartialRowWiseAdam(_Adam):
    """`bagpipe.PartialRowWiseAdam`: Adam with one second moment for a row."""

    describes = PartialRowWiseAdam
    kind: Literal["partial_rowwise_adam"]


EmbeddingOptimizerConfig: TypeAlias = Annotated[
    EmbeddingSGD
    | EmbeddingAdagrad
    | EmbeddingRowWiseAdagrad
    | EmbeddingAdam
    | EmbeddingAdamW
    | EmbeddingPartialRowWiseAdam,
    Field(discriminator="kind"),
]


class UniformInit(_Description[Initializer]):
    """`bagpipe.Uniform`: initial weights drawn uniformly from [low, high)."""

    describes = Uniform
    kind: Literal["uniform"]
    low: Weight
    high: Weight


class NormalInit(_Description[Initializer]):
    """`bagpipe.Normal`: initial weights drawn from a normal distribution."""

    describes = Normal
    kind: Literal["normal"]
    mean: Weight = Normal.mean
    std: Rate = Normal.std
