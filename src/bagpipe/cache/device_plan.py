"""A step's plan for one group on the trainer's device: torch tensors, moved ahead of their use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from bagpipe.cache.ring import Ring, RingLayout
from bagpipe.lookups import GroupLookups
from bagpipe.plan import GroupPlan, HostGroupPlan, Transfers
from bagpipe.types import Int32Array, UInt8Array

MovedArray: TypeAlias = npt.NDArray[np.int32] | npt.NDArray[np.int64] | npt.NDArray[np.float32]
"""What moves to the device: 1-D arrays of a plan, arrays of any shape of a batch; C-contiguous."""

_ALIGNMENT = 256
_WORD, _LONGEST_WORD = 4, 8
_MAX_SPREAD = 1.5
"""How many times their own bytes arrays may spread over and still be copied from where they are."""


def to_device(array: MovedArray, device: torch.device) -> Tensor:
    """An array as a tensor on `device`.

    On a CPU it is the same memory. On a GPU it is a copy through pinned memory, which the host does
    not wait for.
    """
    (tensor,) = all_to_device([array], device)
    return tensor


def all_to_device(arrays: Sequence[MovedArray], device: torch.device) -> list[Tensor]:
    """`to_device` of several arrays by one copy.

    A copy costs its thread a dozen calls, which take about 40 us where threads compete. Arrays that
    lie close together in shared memory, as in a plan of the oracle process, are copied from where
    they are. On a GPU all tensors share one piece of memory.
    """
    if device.type == "cpu" or not arrays:
        return [torch.from_numpy(array) for array in arrays]
    places = [pa.py_buffer(array).address for array in arrays]  # numpy takes six times as long
    begin = min(places) // _LONGEST_WORD * _LONGEST_WORD
    end = max(place + array.nbytes for place, array in zip(places, arrays, strict=True))
    shared = _shared_memory(arrays)
    if (
        shared is not None
        and end - begin
        <= _MAX_SPREAD * sum(array.nbytes for array in arrays) + len(arrays) * _ALIGNMENT
    ):
        offset = begin - pa.py_buffer(shared).address
        source = torch.from_numpy(shared[offset : offset + end - begin])
    else:
        source, places = _packed(arrays)
        begin = 0
    words = source.to(device, non_blocking=True).view(torch.int32)
    spans = [(place - begin, array.nbytes) for place, array in zip(places, arrays, strict=True)]
    cut = _cut(words, spans)
    return [_as_array(cut[span], array) for span, array in zip(spans, arrays, strict=True)]


def _cut(words: Tensor, spans: Sequence[tuple[int, int]]) -> dict[tuple[int, int], Tensor]:
    """The words of each span, (offset, length) in bytes.

    One call cuts them all, since a call for each takes longer than the copy.
    """
    # Sorting puts an empty span before another one that begins at the same place.
    ordered, lengths, end = (sorted(set(spans)), list[int](), 0)
    for offset, length in ordered:
        if offset < end:  # views of a batch's array that overlap
            return {span: words[span[0] // _WORD : sum(span) // _WORD] for span in ordered}
        lengths += [(offset - end) // _WORD, length // _WORD]
        end = offset + length
    pieces = words.split_with_sizes([*lengths, len(words) - sum(lengths)])
    return dict(zip(ordered, pieces[1::2], strict=True))


def _as_array(words: Tensor, array: MovedArray) -> Tensor:
    tensor = words if array.dtype == np.int32 else words.view(_TORCH_DTYPES[array.dtype])
    return tensor if array.ndim == 1 else tensor.view(array.shape)


_TORCH_DTYPES: Final = {np.dtype(np.int64): torch.int64, np.dtype(np.float32): torch.float32}


def aligned_begins(arrays: Sequence[MovedArray]) -> tuple[list[int], int]:
    """Where each array begins in memory that holds them all, and its size, in bytes."""
    begins, end = list[int](), 0
    for array in arrays:
        begins.append(end)
        end += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    return begins, end


def _packed(arrays: Sequence[MovedArray]) -> tuple[Tensor, list[int]]:
    """One pinned uint8 tensor that holds all arrays, and where each begins in it."""
    begins, end = aligned_begins(arrays)
    pinned = torch.empty(end, dtype=torch.uint8, pin_memory=True)
    for begin, array in zip(begins, arrays, strict=True):
        pinned.numpy()[begin : begin + array.nbytes] = array.reshape(-1).view(np.uint8)
    return pinned, begins


def _shared_memory(arrays: Sequence[MovedArray]) -> UInt8Array | None:
    """The memory map, or pinned tensor, that all arrays are views of, if there is one.

    Such a map is pinned (`bagpipe.embeddings.lookahead`).
    """
    owners = [_owner(array) for array in arrays]
    if isinstance(owners[0], np.ndarray) or any(owner is not owners[0] for owner in owners):
        return None
    if isinstance(owners[0], Tensor):
        return owners[0].numpy().view(np.uint8) if owners[0].is_pinned() else None
    return np.frombuffer(owners[0], np.uint8)  # type: ignore[call-overload,no-any-return]


def _owner(array: MovedArray) -> object:
    owner: object = array
    while isinstance(owner, np.ndarray) and owner.base is not None:
        owner = owner.base
    return owner.obj if isinstance(owner, memoryview) else owner


@dataclass(frozen=True, kw_only=True)
class DevicePlan:
    """What the kernels of one step need: arrays of `GroupPlan` and `GradientSchedule`.

    With a `ring` its arrays are rings of plans, in which the kernels find that of the step.
    """

    step: int
    batch_size: int
    num_features: int
    lookup_slots: Tensor  # (L,) int32
    bag_offsets: Tensor | None  # (F * B + 1,) int32
    bag_scales: Tensor | None  # (B * F,) float32
    lookup_weights: Tensor | None = None  # (L,) float32
    unique_slots: Tensor  # (U,) int32
    bags: Tensor  # (L,) int32
    bag_weights: Tensor | None = None  # (L,) float32
    piece_offsets: Tensor  # (num_pieces + 1,) int32
    long_uniques: Tensor  # (num_long,) int32
    long_offsets: Tensor  # (num_long + 1,) int32
    ring: Ring | None = None

    @property
    def num_bags(self) -> int:
        return self.batch_size * self.num_features

    @classmethod
    def of(
        cls, plan: GroupPlan, *, step: int, batch_size: int, num_features: int, device: torch.device
    ) -> DevicePlan:
        """Moves one group's plan to `device` on the current stream."""
        return plan_to_device(
            plan, step=step, batch_size=batch_size, num_features=num_features, device=device
        ).plan

    @classmethod
    def of_lookups(
        cls,
        lookups: GroupLookups,
        slots: Int32Array,
        *,
        batch_size: int,
        num_features: int,
        device: torch.device,
    ) -> DevicePlan:
        """A plan that only reads.

        Args:
            lookups: The batch's lookups in one group.
            slots: The slot of each lookup, (L,) int32.
            batch_size: The number of samples.
            num_features: The number of the group's features.
            device: Where the plan goes.
        """
        arrays = {
            "lookup_slots": slots,
            "bag_offsets": lookups.bag_offsets,
            "bag_scales": lookups.bag_scales,
            "lookup_weights": lookups.weights,
        }
        nothing = torch.empty(0, dtype=torch.int32, device=device)
        tensors: dict[str, Any] = _move(arrays, device) | dict.fromkeys(_SCHEDULE, nothing)
        return cls(step=0, batch_size=batch_size, num_features=num_features, **tensors)

    @classmethod
    def of_schedule(cls, tensors: Mapping[str, Tensor], *, step: int, num_bags: int) -> DevicePlan:
        """A plan that only updates.

        Args:
            tensors: A `GradientSchedule`'s arrays on the device, by name.
            step: The number of the step.
            num_bags: How many gradients the schedule's bags are taken from.
        """
        nothing = tensors["unique_slots"][:0]
        return cls(
            step=step,
            batch_size=num_bags,
            num_features=1,
            lookup_slots=nothing,
            bag_offsets=None,
            bag_scales=None,
            ring=None,
            **tensors,
        )


@dataclass(frozen=True, kw_only=True)
class DeviceTransfers:
    """One group's transfers on the device: their slots, and rows where the device moves them."""

    evict_slots: Tensor  # (num_evicted,) int32
    fetch_slots: Tensor  # (num_fetched,) int32
    evict_rows: Tensor | None = None  # (num_evicted,)
    fetch_rows: Tensor | None = None  # (num_fetched,)

    @classmethod
    def of(
        cls, transfers: Transfers, device: torch.device, *, with_rows: bool = False
    ) -> DeviceTransfers:
        """Moves the slots of `transfers`, and their rows if asked for, on the current stream."""
        names = _MOVES if with_rows else _MOVES[:2]
        tensors = all_to_device([getattr(transfers, name) for name in names], device)
        return cls(**dict(zip(names, tensors, strict=True)))


@dataclass(frozen=True, kw_only=True)
class DeviceExchange:
    """What one group's exchanges with other trainers need on the device.

    It says which rows to send, and which sums to apply. Rows are (num_sent,) int32.
    """

    replicas_overlapped: Tensor  # own slots
    replicas_urgent: Tensor
    sync_urgent: Tensor  # places in the own sums
    sync_overlapped: Tensor
    apply_urgent: DevicePlan  # its bags are the own sums, then those received
    apply_overlapped: DevicePlan


@dataclass(frozen=True, kw_only=True)
class PlanRings:
    """One group's plans of many steps, as the device keeps them."""

    plans: DevicePlan  # of no step and no batch size yet
    layout: RingLayout


@dataclass(frozen=True, kw_only=True)
class PlanOnDevice:
    """One group's plan of a step that was made on the device. The host has only what moves.

    The tensors are places of rings: they hold the plan until the step is released.
    """

    overlapped: Transfers
    urgent: Transfers
    num_lookups: int
    num_uniques: int
    inverse: Tensor  # (L,) int32, as that of `GroupPlan`
    on_device: DevicePlan
    overlapped_on_device: DeviceTransfers
    urgent_on_device: DeviceTransfers
    rings: PlanRings | None = None
    """Where it lies, the same object for each step, if these rings are there to stay."""
    exchange: None = None


@dataclass(frozen=True, kw_only=True)
class DeviceGroup:
    """All of one group's plan of a step that moves to the device by one copy."""

    plan: DevicePlan
    overlapped: DeviceTransfers
    exchange: DeviceExchange | None
    along: tuple[Tensor, ...]  # what moved with it


_SCHEDULE: Final = ("unique_slots", "bags", "piece_offsets", "long_uniques", "long_offsets")
_MOVES: Final = ("evict_slots", "fetch_slots", "evict_rows", "fetch_rows")
_SENT: Final = ("replicas_overlapped", "replicas_urgent", "sync_urgent", "sync_overlapped")
_APPLIED: Final = ("apply_urgent", "apply_overlapped")


def plan_to_device(
    plan: HostGroupPlan,
    *,
    step: int,
    batch_size: int,
    num_features: int,
    device: torch.device,
    along: Sequence[MovedArray] = (),
    with_rows: bool = False,
) -> DeviceGroup:
    """Moves one group's plan to a device on the current stream, by one copy.

    Args:
        plan: A `GroupPlan` with its overlapped transfers and its exchanges, if it has any; or a
            `PlanOnDevice`, of which nothing has to move.
        step: The number of the step.
        batch_size: The number of samples.
        num_features: The number of the group's features.
        device: Where the plan goes.
        along: Further arrays for the same copy.
        with_rows: Whether the rows to move go there, too, with their slots.
    """
    if isinstance(plan, PlanOnDevice):
        return DeviceGroup(
            plan=plan.on_device,
            overlapped=plan.overlapped_on_device,
            exchange=None,
            along=tuple(all_to_device(along, device)),
        )
    assert isinstance(plan, GroupPlan)
    schedule, exchange = plan.schedule, plan.exchange
    arrays: dict[str, MovedArray | None] = {
        "inverse": plan.inverse,
        "bag_offsets": plan.bag_offsets,
        "bag_scales": plan.bag_scales,
        "lookup_weights": plan.lookup_weights,
        "unique_slots": schedule.unique_slots,
        "bags": schedule.bags,
        "bag_weights": schedule.bag_weights,
        "piece_offsets": schedule.piece_offsets,
        "long_uniques": schedule.long_uniques,
        "long_offsets": schedule.long_offsets,
    }
    moves = _MOVES if with_rows else _MOVES[:2]
    arrays |= {name: getattr(plan.overlapped, name) for name in moves}
    if exchange is not None:
        arrays |= {name: getattr(exchange, name).send for name in _SENT}
        for apply in _APPLIED:
            arrays |= {
                f"{apply}.{name}": getattr(getattr(exchange, apply), name) for name in _SCHEDULE
            }
    arrays |= {f"along.{index}": array for index, array in enumerate(along)}
    tensors: dict[str, Any] = _move(arrays, device)
    moved_along = tuple(tensors.pop(f"along.{index}") for index in range(len(along)))
    # This takes 5 us here, and 0.35 ms in the oracle.
    tensors["lookup_slots"] = tensors["unique_slots"].index_select(0, tensors.pop("inverse"))
    overlapped = DeviceTransfers(**{name: tensors.pop(name) for name in moves})
    on_device = None
    if exchange is not None:
        num_bags = schedule.num_uniques + exchange.num_room
        applied: dict[str, Any] = {
            apply: DevicePlan.of_schedule(
                {name: tensors.pop(f"{apply}.{name}") for name in _SCHEDULE},
                step=step,
                num_bags=num_bags,
            )
            for apply in _APPLIED
        }
        on_device = DeviceExchange(**{name: tensors.pop(name) for name in _SENT}, **applied)
    device_plan = DevicePlan(step=step, batch_size=batch_size, num_features=num_features, **tensors)
    return DeviceGroup(
        plan=device_plan, overlapped=overlapped, exchange=on_device, along=moved_along
    )


def urgent_to_device(
    plans: Sequence[HostGroupPlan], device: torch.device, *, with_rows: bool
) -> tuple[DeviceTransfers, ...]:
    """The urgent transfers of each group's plan, moved to a device unless they are there.

    Args:
        plans: By group.
        device: Where the transfers go, on the current stream.
        with_rows: Whether the rows to move go there, too, with their slots.
    """
    return tuple(
        plan.urgent_on_device
        if isinstance(plan, PlanOnDevice)
        else DeviceTransfers.of(plan.urgent, device, with_rows=with_rows)
        for plan in plans
    )


def _move(
    arrays: Mapping[str, MovedArray | None], device: torch.device
) -> dict[str, Tensor | None]:
    """The arrays on `device` by name, and None for None."""
    present = {name: array for name, array in arrays.items() if array is not None}
    moved = dict(zip(present, all_to_device(list(present.values()), device), strict=True))
    return {name: moved.get(name) for name in arrays}
