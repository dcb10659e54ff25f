"""One group's cache on the trainer's device: the records of the rows in its slots."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import ModuleType

import torch
from torch import Tensor

from bagpipe.cache import kernels_cpu
from bagpipe.cache.device_plan import DevicePlan
from bagpipe.cache.weights import empty_weights, rounding_seed, words_of
from bagpipe.errors import ConfigError
from bagpipe.optimizers import Optimizer
from bagpipe.types import Group


@dataclass(frozen=True, kw_only=True)
class UpdateRate:
    """At which rate an update is made, which may be applied when the tables have another one."""

    optimizer: Optimizer
    """With its learning rate of that time, by which weights may decay."""
    rate: float


@dataclass(kw_only=True)
class DeviceCache:
    """`num_slots` records on `device`.

    Weights and state lie apart, so that a lookup reads weights only. A slot's content is undefined
    until `fill` writes it. Slots are given as int32 tensors on the device.
    """

    group: Group
    num_slots: int
    device: torch.device
    seed: int = 0
    """The model's; it decides how weights of 16 bits are rounded."""
    num_replica_slots: int = 0
    """Slots behind the others that hold weights alone: copies of rows that other trainers own."""
    weights: Tensor = field(init=False)
    """(num_slots + num_replica_slots, D) of the group's data type.

    There is one column more if weights have 16 bits and D is odd.
    """
    state: Tensor = field(init=False)  # (num_slots, S) float32

    def __post_init__(self) -> None:
        self.weights = empty_weights(
            self.group, self.num_slots + self.num_replica_slots, self.device
        )
        self.state = torch.empty(self.num_slots, self.group.state_width, device=self.device)
        self._rounding_seed = rounding_seed(self.seed, self.group)
        self._kernels = kernels_of(self.device)
        self._places = torch.arange(0, dtype=torch.int32, device=self.device)

    def lookup(
        self, plan: DevicePlan, *, dtype: torch.dtype = torch.float32, out: Tensor | None = None
    ) -> Tensor:
        """The pooled embeddings of a batch, sample-major.

        Args:
            plan: Which slots each bag sums.
            dtype: Of the result, float32 or bfloat16, if `out` is not given.
            out: Where to put the result: (B, F, D), contiguous, float32 or bfloat16.

        Returns:
            (B, F, D): `out`, if that is given.
        """
        shape = (plan.batch_size, plan.num_features, self.group.embedding_dim)
        pooled = torch.empty(shape, dtype=dtype, device=self.device) if out is None else out
        assert pooled.shape == shape
        assert pooled.dtype in (torch.float32, torch.bfloat16)
        self._kernels.lookup(
            self.weights, plan, pooled.view(plan.num_bags, self.group.embedding_dim)
        )
        return pooled

    def update(self, plan: DevicePlan, grads: Tensor, *, number: int | None = None) -> None:
        """Applies one optimizer step.

        Args:
            plan: The plan that the step's `lookup` got.
            grads: The gradient of `lookup`'s result, (B, F, D) float32 or bfloat16.
            number: The number of this update of these tables, from 1. By default every step before
                this one made an update, too.
        """
        number = plan.step + 1 if number is None else number
        self.apply(plan, self._by_bag(plan, grads), rate=self.rate_of(number))

    def rate_of(self, number: int) -> UpdateRate:
        """The rate that `apply` needs for the tables' `number`th update, if that came now."""
        optimizer = self.group.optimizer
        return UpdateRate(optimizer=optimizer, rate=optimizer.update_rate(number))

    def apply(self, plan: DevicePlan, grads: Tensor, *, rate: UpdateRate) -> None:
        """`update` with gradients by bag (num_bags, D)."""
        self._kernels.update(
            self.weights, self.state, plan, grads, rate.optimizer, rate.rate, self._rounding_seed
        )

    def sum_by_row(self, plan: DevicePlan, grads: Tensor, *, scale: float) -> Tensor:
        """Sums gradients by unique row, in the order in which `update` adds them up.

        Args:
            plan: The step's plan.
            grads: (B, F, D) float32 or bfloat16.
            scale: What each sum is multiplied by.

        Returns:
            (U, D) float32.
        """
        num_uniques = len(plan.unique_slots)
        sums = self.no_sums(num_uniques)
        self.sum_into(sums, replace(plan, unique_slots=self.places(0, num_uniques)), grads, scale)
        return sums

    def sum_into(self, sums: Tensor, plan: DevicePlan, grads: Tensor, scale: float) -> None:
        """`sum_by_row` into the rows `plan.unique_slots` of `sums` (n, D)."""
        self._kernels.sum_by_row(sums, plan, self._by_bag(plan, grads), scale)

    def no_sums(self, num_rows: int) -> Tensor:
        """Room for sums: (num_rows, D) float32."""
        return torch.empty(num_rows, self.group.embedding_dim, device=self.device)

    def places(self, begin: int, end: int) -> Tensor:
        """The numbers from `begin` to before `end`, as slots."""
        if len(self._places) < end:
            self._places = torch.arange(2 * end, dtype=torch.int32, device=self.device)
        return self._places[begin:end]

    @property
    def reads_rings(self) -> bool:
        """Whether `lookup` and `update` take plans with a `Ring`."""
        return self._kernels is not kernels_cpu

    @property
    def words(self) -> Tensor:
        """The weights' memory as float32: (num_slots + num_replica_slots, weight_words)."""
        return words_of(self.weights)

    def fill(self, slots: Tensor, records: Tensor) -> None:
        """Puts `records` (n, record_width) into `slots` (n,)."""
        self._kernels.fill(self.weights, self.state, slots, records)

    def read(self, slots: Tensor, out: Tensor | None = None) -> Tensor:
        """The records in `slots` (n,): (n, record_width), in `out` on this device, if given."""
        records: Tensor = self._kernels.read(self.weights, self.state, slots, out)
        return records

    def _by_bag(self, plan: DevicePlan, grads: Tensor) -> Tensor:
        assert grads.dtype in (torch.float32, torch.bfloat16)
        # Torch is not called if there is nothing to do: each call gives up Python's lock.
        return (grads if grads.is_contiguous() else grads.contiguous()).view(
            plan.num_bags, self.group.embedding_dim
        )


def kernels_of(device: torch.device) -> ModuleType:
    """The module of kernels for a device.

    Raises:
        ConfigError: The device is a GPU, and Triton is not installed.
    """
    if device.type == "cpu":
        return kernels_cpu
    try:
        from bagpipe.cache import kernels_triton
    except ImportError as error:
        raise ConfigError(
            f"embeddings on {device} need Triton, which torch for CUDA brings along: pip install "
            "triton"
        ) from error
    return kernels_triton
