"""How plans of one group that the host has made lie in rings, and in which rings.

All rings are one piece of memory, and all of a plan's numbers are in one header:

    numbers of unique rows, pieces and long rows    of the plan, then of what it applies
    first rows                                      that are received, of each message
    numbers of rows sent, then received             of each message, by rank
    begins, lengths, targets, additions             of each array, for the kernel that moves them;
                                                    the device does not keep these
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from operator import gt
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from torch import Tensor

from bagpipe.cache.device_plan import (
    APPLIED,
    SCHEDULE,
    SENT,
    DeviceExchange,
    DevicePlan,
    DeviceRows,
    PlanRings,
)
from bagpipe.cache.moved import MovedArray
from bagpipe.cache.ring import RingLayout, RowRings
from bagpipe.plan import GradientSchedule, GroupExchange, GroupPlan

Kind: TypeAlias = tuple[bool, bool, bool, bool]
"""Which of the optional arrays there are."""

_PLACES_BEYOND = 4
"""Places besides those of the steps that are known ahead, two of them to spare.

What moves at tick t follows the compute of step t - 1, but not the gradients that it has deferred.
So the plan of step t - 2 is over, and those of steps t - 1 and t are not."""
_MIN_CAPACITY = 32
_ALIGNED_WORDS = 4
"""A place begins at a multiple of 16 bytes."""
_NUM_SIZES: Final = 3
_FIRSTS: Final = _NUM_SIZES * (1 + len(APPLIED))
_COUNTS: Final = _FIRSTS + len(SENT) + 1  # an even number

_OPTIONAL: Final = ("bag_offsets", "bag_scales", "lookup_weights", "bag_weights")
_MAIN: Final = ("lookup_slots", *SCHEDULE, *_OPTIONAL)
_FLOATS: Final = frozenset(_OPTIONAL[1:])
_EXCHANGED: Final = (*SENT, *(f"{apply}.{name}" for apply in APPLIED for name in SCHEDULE))
_IN_SUMS: Final = {"sync_urgent", "sync_overlapped", *(f"{apply}.bags" for apply in APPLIED)}
"""Places in sums, to which the place of the step's sums is added."""


@dataclass(frozen=True, kw_only=True)
class ExchangeRings:
    """One group's `DeviceExchange` of many steps."""

    replicas_overlapped: RowRings
    replicas_urgent: RowRings
    sync_urgent: RowRings
    sync_overlapped: RowRings
    apply_urgent: PlanRings
    apply_overlapped: PlanRings
    sums_rows: int
    """See `DeviceGroup.sums_rows`."""


@dataclass(frozen=True, kw_only=True)
class HostPlanRings(PlanRings):
    """Rings of plans that the host has made; the same object as long as they stay."""

    exchange: ExchangeRings | None = None
    """With other trainers."""


@dataclass(frozen=True, kw_only=True)
class PlanShape:
    """What is the same for all plans of a group."""

    num_features: int
    num_trainers: int
    """0 without an exchange."""
    device: torch.device

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of all arrays, in the order of `arrays_of`."""
        return _MAIN + _EXCHANGED if self.num_trainers else _MAIN

    @cached_property
    def counts(self) -> int:
        """A message's columns for numbers of rows; an even number."""
        return self.num_trainers + self.num_trainers % 2

    @cached_property
    def num_columns(self) -> int:
        """Of the header's beginning, which the device keeps."""
        return _COUNTS + 2 * len(SENT) * self.counts if self.num_trainers else _NUM_SIZES + 1

    @cached_property
    def width(self) -> int:
        """How many columns a header has on the host."""
        return self.num_columns + 4 * len(self.names)


def arrays_of(plan: GroupPlan) -> list[MovedArray | None]:
    """What lies in rings; the first one's values are places in the second."""
    arrays: list[MovedArray | None] = [
        plan.inverse,
        *_arrays_of_schedule(plan.schedule),
        plan.bag_offsets,
        plan.bag_scales,
        plan.lookup_weights,
        plan.schedule.bag_weights,
    ]
    if (exchange := plan.exchange) is not None:
        arrays += (
            exchange.replicas_overlapped.send,
            exchange.replicas_urgent.send,
            exchange.sync_urgent.send,
            exchange.sync_overlapped.send,
            *_arrays_of_schedule(exchange.apply_urgent),
            *_arrays_of_schedule(exchange.apply_overlapped),
        )
    return arrays


def _arrays_of_schedule(schedule: GradientSchedule) -> tuple[MovedArray, ...]:
    return (
        schedule.unique_slots,
        schedule.bags,
        schedule.piece_offsets,
        schedule.long_uniques,
        schedule.long_offsets,
    )


def kind_of(arrays: Sequence[MovedArray | None]) -> Kind:
    """The kind of a plan whose `arrays_of` these are."""
    offsets, scales, weights, factors = arrays[len(_MAIN) - len(_OPTIONAL) : len(_MAIN)]
    return offsets is not None, scales is not None, weights is not None, factors is not None


def numbers_of(
    exchange: GroupExchange | None, lengths: list[int], shape: PlanShape
) -> tuple[list[int], list[int]]:
    """A plan's sizes, and the beginning of its header as of a step whose sums begin at 0.

    Args:
        exchange: The plan's.
        lengths: Of `arrays_of`, 0 for what is not there.
        shape: Of the plan.
    """
    lookups, uniques, _, offsets, long, _, bag_offsets, bag_scales, *_ = lengths
    sizes = [lookups, uniques, offsets - 1 - uniques, long, max(bag_offsets - 1, bag_scales)]
    numbers = [uniques, offsets - 1, long]
    if exchange is None:
        return sizes, [*numbers, 0]
    at = len(_MAIN) + len(SENT)
    sizes += lengths[at - len(SENT) : at]
    for begin in (at, at + len(SCHEDULE)):
        applied, bags, offsets, long = lengths[begin : begin + 4]
        sizes += [bags, applied, offsets - 1 - applied, long]
        numbers += [applied, offsets - 1, long]
    sent, received, pad = list[int](), list[int](), [0] * (shape.counts - shape.num_trainers)
    num_received = list[int]()
    for rows in (
        exchange.replicas_overlapped,
        exchange.replicas_urgent,
        exchange.sync_urgent,
        exchange.sync_overlapped,
    ):
        counts = rows.receive_counts.tolist()
        num_received.append(sum(counts))
        received += counts + pad
        sent += rows.send_counts.tolist() + pad
    sizes.append(uniques + max(num_received[2:]))
    first = exchange.first_replica
    numbers += [first, first + num_received[0], uniques, uniques, 0, *sent, *received]
    return sizes, numbers


def put_sums_at(first_sum: int, numbers: list[int]) -> None:
    """Changes the beginning of a header to that of a step whose sums begin at `first_sum`."""
    for name in ("sync_urgent", "sync_overlapped"):
        numbers[_FIRSTS + SENT.index(name)] += first_sum


class PlanLayout:
    """Rings of certain capacities, for as many steps as there are places.

    `plan` and `exchange` make views of a place, which hold the rings.
    """

    def __init__(self, shape: PlanShape, sizes: list[int], kind: Kind, num_places: int) -> None:
        """Allocates rings.

        Args:
            shape: Of the plans.
            sizes: The most that plans have, see `numbers_of`.
            kind: Which optional arrays there are.
            num_places: K, even, so that a place is always of the same half of the sums.
        """
        self.shape, self.sizes, self.kind, self.num_places = shape, sizes, kind, num_places
        self.num_plans = 0
        self.sums_rows = sizes[-1] if shape.num_trainers else 0
        capacities = _capacities(sizes, kind)
        strides = [-(-each // _ALIGNED_WORDS) * _ALIGNED_WORDS for each in capacities]
        *firsts, end = accumulate((stride * num_places for stride in strides), initial=0)
        # Zeros, since a graph that is warmed up may read a place that no plan has been in.
        self.words = torch.zeros(end, dtype=torch.int32, device=shape.device)
        self.ends = [
            np.array(
                [
                    *(
                        first + place * stride
                        for first, stride in zip(firsts, strides, strict=True)
                    ),
                    *(self.first_sum(place) * (name in _IN_SUMS) for name in shape.names),
                ],
                np.int64,
            )
            for place in range(num_places)
        ]
        """Targets and additions, by place."""
        self.headers = torch.zeros(
            num_places, shape.num_columns, dtype=torch.int64, device=shape.device
        )
        self.header_rows = self.headers.unbind(0)
        self._arrays = {
            name: self._ring(name, first, stride, capacity)
            for name, first, stride, capacity in zip(
                shape.names, firsts, strides, capacities, strict=True
            )
        }
        self._places = {name: ring.unbind(0) for name, ring in self._arrays.items()}
        self._rings: dict[Kind, HostPlanRings] = {}

    def fits(self, sizes: list[int], kind: Kind, num_places: int) -> bool:
        """Whether plans of these sizes have room."""
        return not (
            any(map(gt, sizes, self.sizes))
            or any(map(gt, kind, self.kind))
            or num_places > self.num_places
        )

    def grown(self, sizes: list[int], kind: Kind, num_places: int) -> PlanLayout:
        """Other rings, with a quarter more room than these sizes need where there is too little."""
        new_sizes = [
            old if size <= old else max(size + size // 4, _MIN_CAPACITY)
            for old, size in zip(self.sizes, sizes, strict=True)
        ]
        offsets, scales, weights, factors = map(max, kind, self.kind)
        num_places = max(num_places, self.num_places)
        return PlanLayout(self.shape, new_sizes, (offsets, scales, weights, factors), num_places)

    def first_sum(self, step: int) -> int:
        """Where a step's sums begin, or those of all steps in a place."""
        return step % 2 * self.sums_rows

    def rings(self, kind: Kind) -> HostPlanRings:
        """The rings for plans of a kind, the same object each time."""
        rings = self._rings.get(kind)
        if rings is None:
            rings = self._rings[kind] = self._rings_of(kind)
        return rings

    def plan(self, step: int, batch_size: int, lengths: Sequence[int], kind: Kind) -> DevicePlan:
        """Views of a step's plan.

        Args:
            step: The number of the step.
            batch_size: The number of samples.
            lengths: Of `arrays_of`.
            kind: Which optional arrays there are.
        """
        has, by_name = dict(zip(_OPTIONAL, kind, strict=True)), self._by_name(lengths)
        arrays: dict[str, Any] = {
            name: self._place(name, step, by_name) if has.get(name, True) else None
            for name in _MAIN
        }
        return DevicePlan(
            step=step, batch_size=batch_size, num_features=self.shape.num_features, **arrays
        )

    def exchange(self, step: int, lengths: Sequence[int]) -> DeviceExchange | None:
        """Views of a step's exchange; arguments as for `plan`."""
        if not self.shape.num_trainers:
            return None
        header, views = self.header_rows[step % self.num_places], dict[str, Any]()
        by_name = self._by_name(lengths)
        for index, name in enumerate(SENT):
            sent, received = self._counts(index)
            views[name] = DeviceRows(
                send=self._place(name, step, by_name),
                send_counts=header[sent],
                receive_counts=header[received],
            )
        for apply in APPLIED:
            arrays = {name: self._place(f"{apply}.{name}", step, by_name) for name in SCHEDULE}
            views[apply] = DevicePlan.of_schedule(arrays, step=step, num_bags=2 * self.sums_rows)
        return DeviceExchange(**views)

    def _ring(self, name: str, first: int, stride: int, capacity: int) -> Tensor:
        whole = self.words[first : first + self.num_places * stride]
        whole = whole.view(torch.float32) if name in _FLOATS else whole
        return whole.view(self.num_places, stride)[:, :capacity]

    def _by_name(self, lengths: Sequence[int]) -> dict[str, int]:
        return dict(zip(self.shape.names, lengths, strict=True))

    def _place(self, name: str, step: int, lengths: Mapping[str, int]) -> Tensor:
        return self._places[name][step % self.num_places][: lengths[name]]

    def _counts(self, index: int) -> tuple[slice, slice]:
        """The columns of the numbers of rows that a message sends and receives."""
        first, size = _COUNTS + index * self.shape.counts, self.shape.num_trainers
        behind = first + len(SENT) * self.shape.counts
        return slice(first, first + size), slice(behind, behind + size)

    def _layout(self, first_column: int) -> RingLayout:
        return RingLayout(
            headers=self.headers,
            columns=(first_column, first_column + 1, first_column + 2),
            num_batches=self.num_places,
        )

    def _rings_of(self, kind: Kind) -> HostPlanRings:
        has = dict(zip(_OPTIONAL, kind, strict=True))
        arrays: dict[str, Any] = {
            name: self._arrays[name] if has.get(name, True) else None for name in _MAIN
        }
        plans = DevicePlan(step=0, batch_size=0, num_features=self.shape.num_features, **arrays)
        return HostPlanRings(plans=plans, layout=self._layout(0), exchange=self._exchange_rings)

    @cached_property
    def _exchange_rings(self) -> ExchangeRings | None:
        if not self.shape.num_trainers:
            return None
        rings = dict[str, Any]()
        for index, name in enumerate(SENT):
            sent, received = self._counts(index)
            rings[name] = RowRings(
                send=self._arrays[name],
                send_counts=self.headers[:, sent],
                receive_counts=self.headers[:, received],
                firsts=self.headers[:, _FIRSTS + index],
            )
        for index, apply in enumerate(APPLIED):
            arrays = {name: self._arrays[f"{apply}.{name}"] for name in SCHEDULE}
            rings[apply] = PlanRings(
                plans=DevicePlan.of_schedule(arrays, step=0, num_bags=0),
                layout=self._layout(_NUM_SIZES * (1 + index)),
            )
        return ExchangeRings(sums_rows=self.sums_rows, **rings)


def places_for(depth: int) -> int:
    """How many places there must be for plans that move `depth` steps ahead."""
    return depth + _PLACES_BEYOND + depth % 2  # even


def no_layout(shape: PlanShape) -> PlanLayout:
    """Rings without room."""
    num_sizes = 5 + (len(SENT) + 4 * len(APPLIED) + 1 if shape.num_trainers else 0)
    return PlanLayout(shape, [0] * num_sizes, (False,) * 4, 0)


def _capacities(sizes: Sequence[int], kind: Kind) -> list[int]:
    """Of all arrays."""
    lookups, uniques, further, long, bags, *exchanged = sizes
    optional = (bags + 1, bags, lookups, lookups)
    capacities = [
        lookups,
        *_of_schedule(lookups, uniques, further, long),
        *(has * each for has, each in zip(kind, optional, strict=True)),
    ]
    if exchanged:
        capacities += exchanged[: len(SENT)]
        for begin in (len(SENT), len(SENT) + 4):
            capacities += _of_schedule(*exchanged[begin : begin + 4])
    return capacities


def _of_schedule(bags: int, uniques: int, further: int, long: int) -> tuple[int, ...]:
    return uniques, bags, uniques + further + 1, long, long + 1
