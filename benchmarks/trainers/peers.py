"""The peers of `trainers`: two other ways to train on several trainers, in their strongest form.

    replicated   the way of the BagPipe authors' released code, made correct. Every rank has all
                 rows of the global batch. The gradients of all rows that the batch touches (U, D)
                 are all-reduced, and every rank applies all of them. All rows stay on each rank's
                 device, so nothing is fetched. The schedules are made before the arms start and
                 cost nothing.
    hashed       the way of TorchRec's row-wise sharding: row r stays on rank r % N. In the step
                 ranks de-duplicate their ids, then exchange how many they will ask of whom, the
                 ids, and the rows. After backward each rank sends its gradients, summed by row, to
                 the owners, which apply them. All rows stay on their owners' devices, so nothing is
                 fetched.

Both use the kernels of the cache and average gradients over ranks as Bagpipe does. All that they
send is on the critical path. An all-reduce counts as what a ring sends: each rank sends
2 (N - 1) / N of the buffer (Patarasuk and Yuan, JPDC 69(2), 2009).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from bagpipe.cache.device_cache import DeviceCache, kernels_of
from bagpipe.cache.device_plan import DevicePlan
from bagpipe.distributed.communicator import Communicator
from bagpipe.lookups import group_lookups, group_rows
from bagpipe.oracle.dedup import dedup
from bagpipe.oracle.merge import merge
from bagpipe.types import Float32Array, Group, Int64Array, Jagged
from benchmarks.trainers.arms import Sent, Share
from benchmarks.trainers.uniques import output_rows_of, plan_of, plan_uniques, plan_uniques_on_cpu

T = TypeVar("T")


def ring_bytes(num_bytes: int, num_trainers: int) -> int:
    """What each rank sends when a ring all-reduces `num_bytes`."""
    return 2 * (num_trainers - 1) * num_bytes // num_trainers


@dataclass(frozen=True, kw_only=True)
class ReplicatedBatch:
    """A rank's schedule of one global batch, on the device."""

    own: DevicePlan
    """Of the rank's share; `lookup_slots` are rows."""
    places: Tensor
    """Where each unique row of the share is among those of the global batch: (U_r,) int64."""
    all_rows: DevicePlan
    """`unique_slots` are the global batch's unique rows (U,), the u-th with the u-th gradient."""


def replicated_batch(
    group: Group, shares: Sequence[Jagged], rank: int, device: torch.device, *, step: int
) -> ReplicatedBatch:
    """Makes one rank's schedule of a global batch, which is given as its shares by rank."""
    merged = merge(group, [dedup(group, share) for share in shares])
    own, share = merged.shares[rank], shares[rank]
    rows = own.unique_rows[own.inverse].astype(np.int32)
    plan = plan_of(
        own, rows, step=step, batch_size=share.batch_size, num_features=len(group.features)
    )
    return ReplicatedBatch(
        own=_to(plan, device),
        places=torch.from_numpy(merged.places[rank].astype(np.int64)).to(device),
        all_rows=_one_bag_each(
            torch.from_numpy(merged.unique_rows.astype(np.int32)).to(device), step=step
        ),
    )


class ReplicatedArm:
    """The arm `replicated`; see the module."""

    name = "replicated"

    def __init__(
        self,
        group: Group,
        shares: Sequence[Share],
        batches: Sequence[ReplicatedBatch],
        communicator: Communicator,
        device: torch.device,
    ) -> None:
        self.sent = Sent()
        self.cache = DeviceCache(group=group, num_slots=group.num_rows, device=device)
        self._batches = iter(zip(shares, batches, strict=True))
        self._communicator = communicator
        self._batch: ReplicatedBatch | None = None

    def load(self, rows: Int64Array, records: Float32Array) -> None:
        """See `StepArm.load`."""
        _fill(self.cache, rows, records)

    def start(self) -> None:
        """See `StepArm.start`."""

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """See `StepArm.next_batch`."""
        share, self._batch = next(self._batches)
        return share.dense, share.labels

    def lookup(self, pooled: Tensor) -> None:
        """See `StepArm.lookup`."""
        self.cache.lookup(_given(self._batch).own, out=pooled)

    def update(self, grads: Tensor) -> None:
        """See `StepArm.update`."""
        batch, num_trainers = _given(self._batch), self._communicator.num_trainers
        own = self.cache.sum_by_row(batch.own, grads, scale=1.0 / num_trainers)
        # All ranks need buffers of one shape, so rows that are not in the share add zero.
        sums = own.new_zeros(len(batch.all_rows.unique_slots), own.shape[1])
        sums.index_copy_(0, batch.places, own)
        self._communicator.now.allreduce([sums]).wait()
        self.sent.add(batch.own.step, "urgent", ring_bytes(sums.nbytes, num_trainers))
        self.cache.update(batch.all_rows, sums)

    def close(self) -> None:
        """See `StepArm.close`."""
        del self.cache


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """A share's unique rows by owner, and what all ranks ask of this one."""

    plan: DevicePlan
    """`lookup_slots` are places among the unique rows by owner."""
    order: Tensor | None
    """(U,) from the plan's unique rows to those by owner; None: the plan's are by owner."""
    counts: list[int]
    """How many unique rows each owner has."""
    asked_counts: list[int]
    """How many rows each rank asks of this one."""
    asked_slots: Tensor
    """(num_asked,) int32 own slots, by the rank that asks."""


class HashedArm:
    """The arm `hashed`; see the module. Row r is slot r // N of rank r % N."""

    name = "hashed"

    def __init__(
        self,
        group: Group,
        shares: Sequence[Share],
        communicator: Communicator,
        device: torch.device,
    ) -> None:
        self._shares = iter(shares)
        self._communicator, self._num_trainers = communicator, communicator.num_trainers
        num_slots = -(-group.num_rows // self._num_trainers)
        self.sent = Sent()
        self.cache = DeviceCache(group=group, num_slots=num_slots, device=device)
        self._finder: _OnCpu | _OnDevice
        if device.type == "cpu":
            self._finder = _OnCpu(group, shares, self._num_trainers, num_slots)
        else:
            self._finder = _OnDevice(group, shares, self._num_trainers, num_slots, device)
        self._kernels = kernels_of(device)
        self._step = -1
        self._asked: _Asked | None = None

    def load(self, rows: Int64Array, records: Float32Array) -> None:
        """See `StepArm.load`. Keeps the rank's own rows."""
        is_own = rows % self._num_trainers == self._communicator.rank
        _fill(self.cache, rows[is_own] // self._num_trainers, records[is_own])

    def start(self) -> None:
        """See `StepArm.start`."""

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """See `StepArm.next_batch`."""
        share = next(self._shares)
        self._step += 1
        return share.dense, share.labels

    def lookup(self, pooled: Tensor) -> None:
        """See `StepArm.lookup`."""
        plan, order, slots, counts = self._finder.find(self._step)
        asked_counts = self._exchange(counts, None, None)
        # On CUDA the host waits for the device here: it must know sizes to receive ids and rows.
        sent, received = torch.stack([counts, asked_counts]).tolist()
        asked_slots = self._exchange(slots, received, sent)
        self._asked = _Asked(
            plan=plan, order=order, counts=sent, asked_counts=received, asked_slots=asked_slots
        )
        asked_rows = self.cache.weights.index_select(0, asked_slots)
        rows = self._exchange(asked_rows, sent, received)  # (U, D) by owner
        self._kernels.lookup(rows, plan, pooled.view(plan.num_bags, -1))

    def update(self, grads: Tensor) -> None:
        """See `StepArm.update`."""
        asked = _given(self._asked)
        sums = self.cache.sum_by_row(asked.plan, grads, scale=1.0 / self._num_trainers)
        by_owner = sums if asked.order is None else sums.index_select(0, asked.order)
        # They come in the order of ranks, and each row's gradients are added in this order.
        received = self._exchange(by_owner, asked.asked_counts, asked.counts)
        self.cache.update(self._finder.plan_slots(asked.asked_slots, self._step), received)

    def close(self) -> None:
        """See `StepArm.close`."""
        del self.cache

    def _exchange(
        self, sent: Tensor, receive_counts: list[int] | None, send_counts: list[int] | None
    ) -> Tensor:
        """What the ranks send this one, by rank; without counts each sends one item to each."""
        ones = [1] * self._num_trainers
        receive_counts, send_counts = receive_counts or ones, send_counts or ones
        received = sent.new_empty((sum(receive_counts), *sent.shape[1:]))
        self._communicator.now.alltoall_base(received, sent, receive_counts, send_counts).wait()
        num_sent = sum(send_counts) - send_counts[self._communicator.rank]
        self.sent.add(self._step, "urgent", num_sent * sent[:1].nbytes)
        return received


_Found = tuple[DevicePlan, Tensor | None, Tensor, Tensor]
"""`plan` and `order` of `_Asked`, the slots (U,) int32 by owner, and their counts (N,) int64."""


class _OnCpu:
    """Finds unique rows with the oracle's loops."""

    def __init__(
        self, group: Group, shares: Sequence[Share], num_trainers: int, num_slots: int
    ) -> None:
        self._group, self._shares = group, shares
        self._num_trainers, self._num_slots = num_trainers, num_slots

    def find(self, step: int) -> _Found:
        """Finds those of a step's share."""
        sparse = self._shares[step].sparse
        deduped = dedup(self._group, sparse)
        owners = (deduped.unique_rows % self._num_trainers).astype(np.uint8)
        order = np.argsort(owners, kind="stable")  # a radix sort, for bytes
        places = np.empty(len(order), np.int32)
        places[order] = np.arange(len(order), dtype=np.int32)
        sizes = {"batch_size": sparse.batch_size, "num_features": len(self._group.features)}
        plan = plan_of(deduped, places[deduped.inverse], step=step, **sizes)
        slots = (deduped.unique_rows[order] // self._num_trainers).astype(np.int32)
        counts = np.bincount(owners, minlength=self._num_trainers)
        return plan, torch.from_numpy(order), torch.from_numpy(slots), torch.from_numpy(counts)

    def plan_slots(self, slots: Tensor, step: int) -> DevicePlan:
        """Plans the update of the slots that all ranks ask."""
        return plan_uniques_on_cpu(slots, self._num_slots, step=step)


class _OnDevice:
    """Finds unique rows with torch operations.

    Row r has the number r % N * num_slots + r // N here, so that a sort is by owner.
    """

    def __init__(
        self,
        group: Group,
        shares: Sequence[Share],
        num_trainers: int,
        num_slots: int,
        device: torch.device,
    ) -> None:
        self._num_trainers, self._num_slots = num_trainers, num_slots
        self._num_features = len(group.features)
        self._batches = [self._to_device(group, share.sparse, device) for share in shares]
        self._bounds = torch.arange(num_trainers + 1, dtype=torch.int32, device=device) * num_slots

    def find(self, step: int) -> _Found:
        """Finds those of a step's share."""
        rows, output_rows, bag_offsets, batch_size = self._batches[step]
        plan = plan_uniques(
            rows,
            output_rows,
            step=step,
            batch_size=batch_size,
            num_features=self._num_features,
            bag_offsets=bag_offsets,
        )
        counts = torch.searchsorted(plan.unique_slots, self._bounds).diff()
        return plan, None, plan.unique_slots % self._num_slots, counts

    def plan_slots(self, slots: Tensor, step: int) -> DevicePlan:
        """Plans the update of the slots that all ranks ask."""
        places = torch.arange(len(slots), dtype=torch.int32, device=slots.device)
        return plan_uniques(slots, places, step=step, batch_size=len(slots), num_features=1)

    def _to_device(
        self, group: Group, sparse: Jagged, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor | None, int]:
        lookups = group_lookups(group, sparse)
        rows = group_rows(group, sparse, lookups)
        numbers = rows % self._num_trainers * self._num_slots + rows // self._num_trainers
        offsets = None
        if lookups.bag_offsets is not None:
            offsets = torch.from_numpy(lookups.bag_offsets).to(device)
        output_rows = output_rows_of(sparse.batch_size, self._num_features, lookups.bag_offsets)
        return (
            torch.from_numpy(numbers.astype(np.int32)).to(device),
            torch.from_numpy(output_rows).to(device),
            offsets,
            sparse.batch_size,
        )


def _one_bag_each(rows: Tensor, *, step: int) -> DevicePlan:
    """A plan that updates each of `rows` (U,) int32 with the gradient at its own place."""
    bounds = torch.arange(len(rows) + 1, dtype=torch.int32, device=rows.device)
    nothing = bounds[:0]
    return DevicePlan(
        step=step,
        batch_size=len(rows),
        num_features=1,
        lookup_slots=nothing,
        bag_offsets=None,
        bag_scales=None,
        unique_slots=rows,
        bags=bounds[:-1],
        piece_offsets=bounds,
        long_uniques=nothing,
        long_offsets=bounds[:1],
    )


def _to(plan: DevicePlan, device: torch.device) -> DevicePlan:
    moved: dict[str, Any] = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in vars(plan).items()
    }
    return DevicePlan(**moved)


def _fill(cache: DeviceCache, slots: Int64Array, records: Float32Array) -> None:
    """Puts `records` (n, record_width) into `slots` (n,)."""
    device = cache.device
    cache.fill(
        torch.from_numpy(slots.astype(np.int32)).to(device),
        torch.from_numpy(np.ascontiguousarray(records)).to(device),
    )


def _given(value: T | None) -> T:
    assert value is not None
    return value
