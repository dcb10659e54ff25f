"""What is known of a step while its rows and gradients travel between trainers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from bagpipe.cache.device_cache import UpdateRate
from bagpipe.cache.device_plan import DeviceGroup
from bagpipe.plan import HostStepPlan


@dataclass(frozen=True, kw_only=True)
class RowSums:
    """Where one group's sums by row are, and behind them those that are received."""

    values: Tensor  # (n, D) float32
    first: int


@dataclass(kw_only=True)
class ExchangeStep:
    """A step, from asking for its replicas to applying its last gradient."""

    plan: HostStepPlan
    # by group, once its overlapped rows are in their slots
    on_device: Sequence[DeviceGroup] = ()
    finish_replicas: Callable[[], object] | None = None
    has_urgent_replicas: bool = False
    """Whether they have been asked for, all groups'."""
    finish_deferred: Callable[[], object] | None = None
    sums: dict[int, RowSums] = field(default_factory=dict)  # by group
    # by group: the rate of the update when its gradients came
    rates: dict[int, UpdateRate] = field(default_factory=dict)
