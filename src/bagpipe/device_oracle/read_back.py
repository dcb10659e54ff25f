"""Plans that the device made, read back whole: for the checker, tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np
from torch import Tensor

from bagpipe.cache.device_plan import PlanOnDevice
from bagpipe.device_oracle.oracle import DeviceOracle
from bagpipe.device_oracle.planner import MadePlan, Planner
from bagpipe.errors import PlanError
from bagpipe.oracle import DedupedBatch, checked
from bagpipe.oracle.dedup import DedupedGroup
from bagpipe.oracle.merge import merge
from bagpipe.plan import GradientSchedule, GroupPlan, StepPlan, Transfers

PayloadT = TypeVar("PayloadT")


def checked_on_device(
    planner: Planner, made: Iterable[MadePlan[PayloadT]]
) -> Iterator[MadePlan[PayloadT]]:
    """Passes plans on until one breaks an invariant.

    Raises:
        PlanError: One does; see `bagpipe.oracle.checked`.
    """
    options = planner.options
    whole = (read_back(planner, each) for each in made)
    for _, batch in checked(options.groups, options.num_slots, whole):
        yield batch.payload


def read_back(
    planner: Planner, made: MadePlan[PayloadT]
) -> tuple[tuple[StepPlan, ...], DedupedBatch[MadePlan[PayloadT]]]:
    """A plan and its batch as the host's oracle would hand them out. The plan must be the last.

    Raises:
        PlanError: A lookup is not in the slot of its row.
    """
    plan = made.plan
    whole = StepPlan(
        step=plan.step,
        issue_tick=plan.issue_tick,
        batch_size=plan.batch_size,
        groups=tuple(_group_plan(plan.step, group) for group in plan.groups),
        lookahead=plan.lookahead,
    )
    groups = tuple(
        merge(oracle.group, [_deduped(oracle, plan.step, group)])
        for oracle, group in zip(planner.oracles, whole.groups, strict=True)
    )
    return (whole,), DedupedBatch(payload=made, groups=groups, share_sizes=(plan.batch_size,))


def _group_plan(step: int, plan: PlanOnDevice) -> GroupPlan:
    on_device, inverse = plan.on_device, _read(plan.inverse)
    lookup_slots, expected = _read(on_device.lookup_slots), _read(on_device.unique_slots)[inverse]
    wrong = np.flatnonzero(lookup_slots != expected)
    if len(wrong):
        raise PlanError(
            f"step {step}: lookup {wrong[0]} is in slot {lookup_slots[wrong[0]]}, and its row in "
            f"slot {expected[wrong[0]]}"
        )
    return GroupPlan(
        inverse=inverse,
        bag_offsets=_read_if(on_device.bag_offsets),
        bag_scales=_read_if(on_device.bag_scales),
        schedule=GradientSchedule(
            unique_slots=_read(on_device.unique_slots),
            bags=_read(on_device.bags),
            piece_offsets=_read(on_device.piece_offsets),
            long_uniques=_read(on_device.long_uniques),
            long_offsets=_read(on_device.long_offsets),
            bag_weights=_read_if(on_device.bag_weights),
        ),
        overlapped=_copied(plan.overlapped),
        urgent=_copied(plan.urgent),
        lookup_weights=_read_if(on_device.lookup_weights),
    )


def _deduped(oracle: DeviceOracle, step: int, plan: GroupPlan) -> DedupedGroup:
    position = step % oracle.window.ring_length
    rows = oracle.state.unique_rows[position, : plan.num_uniques]
    schedule = plan.schedule
    return DedupedGroup(
        unique_rows=_read(rows).astype(np.int64),
        inverse=plan.inverse,
        bag_offsets=plan.bag_offsets,
        bag_scales=plan.bag_scales,
        bags=schedule.bags,
        piece_offsets=schedule.piece_offsets,
        long_uniques=schedule.long_uniques,
        long_offsets=schedule.long_offsets,
        lookup_weights=plan.lookup_weights,
        bag_weights=schedule.bag_weights,
    )


def _copied(transfers: Transfers) -> Transfers:
    return Transfers(
        evict_rows=transfers.evict_rows.copy(),
        evict_slots=transfers.evict_slots.copy(),
        fetch_rows=transfers.fetch_rows.copy(),
        fetch_slots=transfers.fetch_slots.copy(),
        fence_tick=transfers.fence_tick,
    )


def _read(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().numpy().copy()


def _read_if(tensor: Tensor | None) -> np.ndarray | None:
    return None if tensor is None else _read(tensor)
