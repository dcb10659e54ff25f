"""The optimizers of embedding tables: what each does to one row, and the numbers that it needs.

They are values of numpy's side, as those of `bagpipe.types`. Kernels compute what the classes say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeAlias

from bagpipe.errors import ConfigError
from bagpipe.limits import MAX_RATE, check_number, is_number


class UpdateConstants(NamedTuple):
    """The numbers of one update, in the order in which every kernel takes them.

    A number that an optimizer does not use is 0. Kernels round each one to float32.
    """

    rate: float
    """The learning rate, with Adam's bias corrections in it."""
    eps: float = 0.0
    first_rate: float = 0.0
    """How far a first moment moves towards the gradient: 1 - beta1."""
    second_rate: float = 0.0
    """How far a second moment moves towards the squared gradient: 1 - beta2."""


class _Update:
    """What every optimizer says about its update; each kernel computes the formula of its class.

    A formula works on one row: ``w`` its weights, ``g`` its gradient, summed over the batch, and
    the state, float32, in the layout that the class names. Every operation rounds to float32 as
    written, and no multiply-add is fused.
    """

    kind: ClassVar[int]
    """The number by which compiled kernels know the optimizer."""

    lr: float

    def update_rate(self, number: int) -> float:
        """The rate of the ``number``th update, from 1."""
        return self.lr


@dataclass(frozen=True, kw_only=True)
class SGD(_Update):
    """``w -= g * lr``, without state; equals ``torch.optim.SGD``.

    Momentum is refused: it would move rows that no batch touches.
    """

    kind: ClassVar[int] = 0

    lr: float
    momentum: float = 0.0

    def __post_init__(self) -> None:
        check_number(self, "lr")
        check_number(self, "momentum", least=-MAX_RATE)
        if self.momentum != 0.0:
            raise ConfigError(
                f"SGD(momentum={self.momentum}): momentum moves every row at every step, touched "
                "or not, so it can't be exact for rows outside the cache: use momentum=0, Adagrad, "
                "RowWiseAdagrad or Adam"
            )

    def state_width(self, embedding_dim: int) -> int:
        """Floats of optimizer state a row: none."""
        return 0

    def update_constants(self, rate: float) -> UpdateConstants:
        """The numbers of an update at ``rate``."""
        return UpdateConstants(rate)


@dataclass(frozen=True, kw_only=True)
class Adagrad(_Update):
    """``s += g * g; w -= g / (sqrt(s) + eps) * lr``, with one ``s`` for each weight.

    Equals ``torch.optim.Adagrad`` on sparse gradients.
    """

    kind: ClassVar[int] = 1

    lr: float
    eps: float = 1e-10
    initial_accumulator_value: float = 0.0

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "initial_accumulator_value"):
            check_number(self, name)

    def state_width(self, embedding_dim: int) -> int:
        """Floats of optimizer state a row: ``s`` of each weight."""
        return embedding_dim

    def update_constants(self, rate: float) -> UpdateConstants:
        """The numbers of an update at ``rate``."""
        return UpdateConstants(rate, self.eps)


@dataclass(frozen=True, kw_only=True)
class RowWiseAdagrad(_Update):
    """``s += mean(g * g); w -= g / (sqrt(s) + eps) * lr``, with one ``s`` for the row.

    Equals ``torchrec.optim.RowWiseAdagrad``. Each kernel adds the mean up in an order of its own.
    """

    kind: ClassVar[int] = 2

    lr: float
    eps: float = 1e-8
    initial_accumulator_value: float = 0.0

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "initial_accumulator_value"):
            check_number(self, name)

    def state_width(self, embedding_dim: int) -> int:
        """Floats of optimizer state a row: its one ``s``."""
        return 1

    def update_constants(self, rate: float) -> UpdateConstants:
        """The numbers of an update at ``rate``."""
        return UpdateConstants(rate, self.eps)


@dataclass(frozen=True, kw_only=True)
class Adam(_Update):
    """``m += (g - m) * (1 - beta1); v += (g * g - v) * (1 - beta2); w -= m / (sqrt(v) + eps) * r``.

    ``m`` and ``v`` are a row's moments, and ``r`` is ``update_rate``: the learning rate with both
    bias corrections in it, by the number of updates. Each group of tables counts its own updates; a
    batch without backward is none. This Adam is lazy: a row's moments move only when a batch
    touches the row. Equals ``torch.optim.SparseAdam``.
    """

    kind: ClassVar[int] = 3

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        check_number(self, "lr")
        check_number(self, "eps")
        betas = self.betas
        if (
            not isinstance(betas, Sequence)
            or len(betas) != 2
            or not all(is_number(beta) and 0.0 <= beta < 1.0 for beta in betas)
        ):
            raise ConfigError(f"Adam: betas is {betas!r}, must be two numbers, each in [0, 1)")
        object.__setattr__(self, "betas", tuple(betas))

    def state_width(self, embedding_dim: int) -> int:
        """Floats of optimizer state a row: ``m`` of each weight, then ``v`` of each."""
        return 2 * embedding_dim

    def update_constants(self, rate: float) -> UpdateConstants:
        """The numbers of an update at ``rate``."""
        beta1, beta2 = self.betas
        return UpdateConstants(rate, self.eps, 1.0 - beta1, 1.0 - beta2)

    def update_rate(self, number: int) -> float:
        """``lr`` with both bias corrections of the ``number``th update, from 1."""
        beta1, beta2 = self.betas
        return self.lr * math.sqrt(1.0 - beta2**number) / (1.0 - beta1**number)


Optimizer: TypeAlias = SGD | Adagrad | RowWiseAdagrad | Adam
