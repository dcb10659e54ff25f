"""A step's plan for one group on the trainer's device: torch tensors, moved ahead of their use."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bagpipe.types import GroupPlan


def to_device(array: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """A tensor on `device`: the same memory on a CPU, a copy through pinned memory that the host does not wait for on a GPU."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True, kw_only=True)
class DevicePlan:
    """What the kernels of one step need; the arrays are those of `GroupPlan` and `GradientSchedule`."""

    step: int
    batch_size: int
    num_features: int
    lookup_slots: Tensor  # (L,) int32
    bag_offsets: Tensor | None  # (F * B + 1,) int32
    bag_scales: Tensor | None  # (B * F,) float32
    unique_slots: Tensor  # (U,) int32
    bags: Tensor  # (L,) int32
    piece_offsets: Tensor  # (num_pieces + 1,) int32
    long_uniques: Tensor  # (num_long,) int32
    long_offsets: Tensor  # (num_long + 1,) int32

    @property
    def num_bags(self) -> int:
        return self.batch_size * self.num_features

    @classmethod
    def of(cls, plan: GroupPlan, *, step: int, batch_size: int, num_features: int, device: torch.device) -> DevicePlan:
        """Moves one group's plan to `device` on the current stream."""
        schedule = plan.schedule
        return cls(
            step=step,
            batch_size=batch_size,
            num_features=num_features,
            lookup_slots=to_device(plan.lookup_slots, device),
            bag_offsets=None if plan.bag_offsets is None else to_device(plan.bag_offsets, device),
            bag_scales=None if plan.bag_scales is None else to_device(plan.bag_scales, device),
            unique_slots=to_device(schedule.unique_slots, device),
            bags=to_device(schedule.bags, device),
            piece_offsets=to_device(schedule.piece_offsets, device),
            long_uniques=to_device(schedule.long_uniques, device),
            long_offsets=to_device(schedule.long_offsets, device),
        )

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keeps the memory until `stream` has used it, though another stream allocated it."""
        for value in vars(self).values():
            if isinstance(value, Tensor):
                value.record_stream(stream)
