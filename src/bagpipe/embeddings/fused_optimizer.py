"""The tables' learning rates as a torch optimizer, so that torch's schedulers can hold them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from bagpipe.embeddings.quick_start import without_compiler
from bagpipe.types import Group


@without_compiler
class FusedOptimizer(torch.optim.Optimizer):
    """The optimizer of the tables as torch's schedulers see it: ``param_groups``, no parameters.

    There is one entry for each group of tables. Its ``"lr"`` is the group's learning rate, and what
    is set there counts from the next backward on. Backward updates the rows, so `step` and
    `zero_grad` do nothing. The state dict has the rates alone.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        """An optimizer of the tables of `groups`."""
        super().__init__([_Rate(group) for group in groups], {})
        # A scheduler warns where no step came before its own; here backward is the step.
        self._opt_called = True

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Does nothing but call `closure`, if there is one."""
        if closure is not None:
            closure()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Sets the rates that `state_dict` has saved."""
        for rate, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for name, value in saved.items():
                if name != "params":
                    rate[name] = value


class _Rate(dict[str, Any]):
    """One entry of ``param_groups``, which sets its group's rate along with its own."""

    def __init__(self, group: Group) -> None:
        super().__init__(params=[], lr=group.optimizer.lr)
        self._group = group

    def __setitem__(self, key: str, value: Any) -> None:
        if key == "lr":
            self._group.set_learning_rate(value)
            value = self._group.optimizer.lr
        super().__setitem__(key, value)
