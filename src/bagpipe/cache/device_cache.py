"""One group's cache on the trainer's device: weights and optimizer state of the rows in its slots."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from bagpipe.cache import kernels_cpu
from bagpipe.cache.device_plan import DevicePlan
from bagpipe.cache.weights import empty_weights, rounding_seed
from bagpipe.errors import ConfigError
from bagpipe.types import Group


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
    weights: Tensor = field(init=False)  # (num_slots, D) of the group's data type, one column more where that is 16 bits and D odd
    state: Tensor = field(init=False)  # (num_slots, S) float32

    def __post_init__(self) -> None:
        self.weights = empty_weights(self.group, self.num_slots, self.device)
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
