"""The optimizers of embedding tables: what each does to one row, and the numbers that it needs.

They are values of numpy's side, as those of `bagpipe.types`. Kernels compute what the classes say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
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
    max_grad_norm: float = 0.0
    """The norm to which a row's longer gradient is scaled."""
    l2: float = 0.0
    """How much of the weights is added to the gradient."""
    shrinkage: float = 0.0
    """How much of the weights is taken from them before the update."""


@dataclass(frozen=True, kw_only=True)
class _Update:
    """What every optimizer says about its update; each kernel computes the formula of its class.

    A formula works on one row: ``w`` its weights, ``g`` its gradient, summed over the batch, and
    the state, float32, in the layout that the class names. Every operation rounds to float32 as
    written, and no multiply-add is fused. Before the formula of a class comes what is asked for of

        n = sqrt(sum(g * g)); if n > max_grad_norm: g *= max_grad_norm / n
        g += w * weight_decay                  (L2, as torch and FBGEMM's `WeightDecayMode.L2`)
        w -= w * (lr * weight_decay)           (decoupled: AdamW and PartialRowWiseAdam instead)

    Only rows that a batch touches decay. Each kernel adds ``n`` up in an order of its own.
    """

    kind: ClassVar[int]
    """The number by which compiled kernels know the optimizer."""
    decays_apart: ClassVar[bool] = False
    """Whether weight decay is decoupled from the gradient."""

    lr: float
    weight_decay: float = 0.0
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        for each in fields(self):
            if each.name in _NUMBERS:
                check_number(self, each.name)
        if self.max_grad_norm is not None:
            check_number(self, "max_grad_norm")
            if self.max_grad_norm == 0.0:
                raise ConfigError(
                    f"{type(self).__name__}: max_grad_norm is 0, which no row would learn with: "
                    "give a number above 0, or leave it out"
                )

    def update_rate(self, number: int) -> float:
        """The rate of the ``number``th update, from 1."""
        return self.lr

    def update_constants(self, rate: float) -> UpdateConstants:
        """The numbers of an update at ``rate``."""
        decay = self.weight_decay
        return self._own_constants(rate)._replace(
            max_grad_norm=self.max_grad_norm or 0.0,
            l2=0.0 if self.decays_apart else decay,
            shrinkage=self.lr * decay if self.decays_apart else 0.0,
        )

    def _own_constants(self, rate: float) -> UpdateConstants:
        """Those of the class's own formula."""
        return UpdateConstants(rate)


_NUMBERS = ("lr", "weight_decay", "eps", "initial_accumulator_value")


@dataclass(frozen=True, kw_only=True)
class SGD(_Update):
    """``w -= g * lr``, without state; equals ``torch.optim.SGD``.

    Momentum is refused: it would move rows that no batch touches.
    """

    kind: ClassVar[int] = 0

    momentum: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
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


@dataclass(frozen=True, kw_only=True)
class Adagrad(_Update):
    """``s += g * g; w -= g / (sqrt(s) + eps) * lr``, with one ``s`` for each weight.

    Equals ``torch.optim.Adagrad`` on sparse gradients.
    """

    kind: ClassVar[int] = 1

    eps: float = 1e-10
    initial_accumulator_value: float = 0.0

    def state_width(self, embedding_dim: int) -> int:
        """Floats of optimizer state a row: ``s`` of each weight."""
        return embedding_dim

    def _own_constants(self, rate: float) -> UpdateConstants:
        return UpdateConstants(rate, self.eps)


@dataclass(frozen=True, kw_only=True)
class RowWiseAdagrad(_Update):
    """``s += mean(g * g); w -= g / (sqrt(s) + eps) * lr``, with one ``s`` for the row.

    Equals ``torchrec.optim.RowWiseAdagrad``. Each kernel adds the mean up in an order of its own.
    """

    kind: ClassVar[int] = 2

    eps: float = 1e-8
    initial_accumulator_value: float = 0.0

    def state_width(self, embedding_dim: int) -> int:
        """Floats of optimizer state a row: its one ``s``."""
        return 1

    def _own_constants(self, rate: float) -> UpdateConstants:
        return UpdateConstants(rate, self.eps)


@dataclass(frozen=True, kw_only=True)
class Adam(_Update):
    """``m += (g - m) * (1 - beta1); v += (g * g - v) * (1 - beta2); w -= m / (sqrt(v) + eps) * r``.

    ``m`` and ``v`` are a row's moments, and ``r`` is ``update_rate``: the learning rate with both
    bias corrections in it, by the number of updates. Each group of tables counts its own updates; a
    batch without a backward does not count. This Adam is lazy: a row's moments move only when a
    batch touches the row. Equals ``torch.optim.SparseAdam``.
    """

    kind: ClassVar[int] = 3

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        betas = self.betas
        if (
            not isinstance(betas, Sequence)
            or len(betas) != 2
            or not all(is_number(beta) and 0.0 <= beta < 1.0 for beta in betas)
        ):
            raise ConfigError(
                f"{type(self).__name__}: betas is {betas!r}, must be two numbers, each in [0, 1)"
            )
        object.__setattr__(self, "betas", tuple(betas))

    def state_width(self, embedding_dim: int) -> int:
        """Floats of optimizer state a row: ``m`` of each weight, then ``v`` of each."""
        return 2 * embedding_dim

    def _own_constants(self, rate: float) -> UpdateConstants:
        beta1, beta2 = self.betas
        return UpdateConstants(rate, self.eps, 1.0 - beta1, 1.0 - beta2)

    def update_rate(self, number: int) -> float:
        """``lr`` with both bias corrections of the ``number``th update, from 1."""
        beta1, beta2 = self.betas
        return self.lr * math.sqrt(1.0 - beta2**number) / (1.0 - beta1**number)


@dataclass(frozen=True, kw_only=True)
class AdamW(Adam):
    """`Adam` with decoupled weight decay.

    On rows that each batch touches it equals ``torch.optim.AdamW``, except that ``eps`` is added
    before the bias correction. FBGEMM calls it ``EmbOptimType.ADAM``.
    """

    decays_apart: ClassVar[bool] = True

    weight_decay: float = 0.01


@dataclass(frozen=True, kw_only=True)
class PartialRowWiseAdam(Adam):
    """`Adam` with one ``v`` for the row: ``v += (mean(g * g) - v) * (1 - beta2)``.

    Weight decay is decoupled. It is FBGEMM's ``EmbOptimType.PARTIAL_ROWWISE_ADAM``, except
    that ``eps`` is added before the bias correction. Each kernel adds the mean up in an order of
    its own.
    """

    kind: ClassVar[int] = 4
    decays_apart: ClassVar[bool] = True

    def state_width(self, embedding_dim: int) -> int:
        """Floats of optimizer state a row: ``m`` of each weight, then the row's one ``v``."""
        return embedding_dim + 1


Optimizer: TypeAlias = SGD | Adagrad | RowWiseAdagrad | Adam | AdamW | PartialRowWiseAdam
