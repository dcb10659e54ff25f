"""One group's cache on the trainer's device: weights and optimizer state of the rows in its slots."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from bagpipe.cache import kernels_cpu
from bagpipe.cache.device_plan import DevicePlan, to_device
from bagpipe.cache.weights import empty_weights, rounding_seed, words_of
from bagpipe.errors import ConfigError
from bagpipe.types import GradientSchedule, Group

_SCHEDULE = ("unique_slots", "bags", "piece_offsets", "long_uniques", "long_offsets")


@dataclass(kw_only=True)
class DeviceCache:
    """`num_slots` records on `device`, weights and state apart so that a lookup reads weights only.

    A slot's content is undefined until `fill` writes it. Slots are int32 tensors on the device.
    """

    group: Group
    num_slots: int
    device: torch.device
    lr: float
    seed: int = 0
    """Of the model; decides how weights of 16 bits are rounded."""
    num_replica_slots: int = 0
    """Slots behind the others that hold weights alone: copies of rows that other trainers own."""
    weights: Tensor = field(
        init=False
    )  # (num_slots + num_replica_slots, D) of the group's data type, one column more where that is 16 bits and D odd
    state: Tensor = field(init=False)  # (num_slots, S) float32

    def __post_init__(self) -> None:
        self.weights = empty_weights(self.group, self.num_slots + self.num_replica_slots, self.device)
        self.state = torch.empty(self.num_slots, self.group.state_width, device=self.device)
        self._rounding_seed = rounding_seed(self.seed, self.group)
        self._kernels = _kernels_of(self.device)

    def lookup(self, plan: DevicePlan, *, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
        """Pooled embeddings, sample-major: (B, F, D) in `dtype`, float32 or bfloat16; or in `out`, contiguous, and its type."""
        shape = (plan.batch_size, plan.num_features, self.group.embedding_dim)
        pooled = torch.empty(shape, dtype=dtype, device=self.device) if out is None else out
        assert pooled.shape == shape
        assert pooled.dtype in (torch.float32, torch.bfloat16)
        self._kernels.lookup(self.weights, plan, pooled.view(plan.num_bags, self.group.embedding_dim))
        return pooled

    def update(self, plan: DevicePlan, grads: Tensor) -> None:
        """Applies one optimizer step; `grads` (B, F, D), float32 or bfloat16, is the gradient of `lookup`'s result."""
        assert grads.dtype in (torch.float32, torch.bfloat16)
        flat = grads.reshape(plan.num_bags, self.group.embedding_dim).contiguous()
        self._kernels.update(self.weights, self.state, plan, flat, self.group.optimizer, self.lr, self._rounding_seed)

    @property
    def words(self) -> Tensor:
        """The weights as float32 words, the same memory: (num_slots + num_replica_slots, weight_words)."""
        return words_of(self.weights)

    def sum_by_row(self, plan: DevicePlan, grads: Tensor, out: Tensor) -> None:
        """Fills `out` (U, D) with the sums of `grads` (B, F, D) by distinct row, in the order of the plan's gradient schedule."""
        flat = grads.reshape(plan.num_bags, self.group.embedding_dim).float()
        if plan.bag_scales is not None:
            flat = flat * plan.bag_scales[:, None]
        pieces = self._sum_segments(flat.contiguous(), plan.bags, plan.piece_offsets, plan.bag_weights)
        num_uniques = len(plan.unique_slots)
        out.copy_(pieces[:num_uniques])
        further = torch.arange(num_uniques, len(pieces), dtype=torch.int32, device=self.device)
        rest = self._sum_segments(pieces, further, plan.long_offsets, None)
        out.index_add_(0, plan.long_uniques, rest)  # each of these rows once

    def apply(self, schedule: GradientSchedule, sums: Tensor, step: int) -> None:
        """Applies one optimizer step to the rows of `schedule`, whose bags are places in `sums` (n, D)."""
        plan = DevicePlan(
            step=step,
            batch_size=len(sums),
            num_features=1,
            lookup_slots=torch.empty(0, dtype=torch.int32, device=self.device),
            bag_offsets=None,
            bag_scales=None,
            **{name: to_device(getattr(schedule, name), self.device) for name in _SCHEDULE},
        )
        self.update(plan, sums)

    def _sum_segments(self, source: Tensor, indices: Tensor, offsets: Tensor, factors: Tensor | None) -> Tensor:
        """Sums of rows `source[indices]`, times `factors`, from each offset to the next: a lookup in `source` (n, D)."""
        nothing = torch.empty(0, dtype=torch.int32, device=self.device)
        sums = torch.empty(len(offsets) - 1, source.shape[1], device=self.device)
        plan = DevicePlan(
            step=0,
            batch_size=len(sums),
            num_features=1,
            lookup_slots=indices,
            bag_offsets=offsets,
            bag_scales=None,
            lookup_weights=factors,
            **dict.fromkeys(_SCHEDULE, nothing),
        )
        self._kernels.lookup(source, plan, sums)
        return sums

    def fill(self, slots: Tensor, records: Tensor) -> None:
        """Puts `records` (n, record_width) into `slots` (n,)."""
        self._kernels.fill(self.weights, self.state, slots, records)

    def read(self, slots: Tensor) -> Tensor:
        """The records in `slots` (n,): (n, record_width)."""
        records: Tensor = self._kernels.read(self.weights, self.state, slots)
        return records


def _kernels_of(device: torch.device) -> ModuleType:
    if device.type == "cpu":
        return kernels_cpu
    try:
        from bagpipe.cache import kernels_triton
    except ImportError as error:
        raise ConfigError(f"embeddings on {device} need Triton, which torch for CUDA brings along: pip install triton") from error
    return kernels_triton
