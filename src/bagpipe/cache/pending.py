"""A step from the time that its plan is known up to the time that nothing reads it any more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bagpipe.cache.device_plan import DeviceGroup
from bagpipe.cache.issued import IssuedTransfers
from bagpipe.cache.moved import MovedArray
from bagpipe.plan import HostStepPlan


@dataclass(kw_only=True)
class Pending:
    """A submitted step, up to the time that nothing reads its plan any more."""

    plan: HostStepPlan
    release: Callable[[], None] | None
    along: Sequence[MovedArray]
    on_device: tuple[DeviceGroup, ...] = ()  # by group
    overlapped: IssuedTransfers | None = None
    urgent: IssuedTransfers | None = None
    is_over: bool = False  # everything that reads its plan is done, or on CUDA issued
    computed: torch.cuda.Event | None = None  # on CUDA after that
