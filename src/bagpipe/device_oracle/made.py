"""A step's plan as the device has made it, for the trainer: tensors in rings, and rows to move."""

from __future__ import annotations

from dataclasses import dataclass

from bagpipe.cache.device_plan import DevicePlan, DeviceTransfers, PlanOnDevice, PlanRings
from bagpipe.cache.ring import RingLayout
from bagpipe.device_oracle import state as names
from bagpipe.device_oracle.answers import GroupAnswer
from bagpipe.device_oracle.cuts import Cuts
from bagpipe.device_oracle.staged import StagedIds
from bagpipe.device_oracle.state import State
from bagpipe.plan import Transfers


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Which arrays a batch has for one group; the device may keep more."""

    is_jagged: bool
    is_weighted: bool

    @classmethod
    def of(cls, staged: StagedIds) -> Kind:
        """That of a batch."""
        return cls(is_jagged=staged.bag_offsets is not None, is_weighted=staged.weights is not None)


def rings_of(state: State, kind: Kind) -> PlanRings:
    """The rings of plans, for batches of a kind."""
    has_scales = kind.is_jagged and state.bag_scales.shape[1] > 0
    plans = DevicePlan(
        step=0,
        batch_size=0,
        num_features=state.num_features,
        lookup_slots=state.lookup_slots,
        bag_offsets=state.kept_offsets if kind.is_jagged else None,
        bag_scales=state.bag_scales if has_scales else None,
        lookup_weights=state.kept_weights if kind.is_weighted else None,
        unique_slots=state.unique_slots,
        bags=state.bags,
        bag_weights=state.bag_weights if kind.is_weighted else None,
        piece_offsets=state.piece_offsets,
        long_uniques=state.long_uniques,
        long_offsets=state.long_offsets,
    )
    layout = RingLayout(
        headers=state.plan_headers,
        columns=(names.NUM_UNIQUES, names.NUM_PIECES, names.NUM_LONG),
        num_batches=state.window.ring_length,
    )
    return PlanRings(plans=plans, layout=layout)


def plan_on_device(
    state: State,
    cuts: Cuts,
    step: int,
    kind: Kind,
    answer: GroupAnswer,
    rings: PlanRings | None = None,
) -> PlanOnDevice:
    """The plan of a step that is in the rings, and of which the host has the answer.

    `rings` are these rings, once they are there to stay.
    """
    window, header = state.window, answer.header
    position, at = step % window.ring_length, step % window.num_plans
    length, num_uniques = header[names.NUM_LOOKUPS], header[names.NUM_UNIQUES]
    batch_size, num_long = header[names.BATCH_SIZE], header[names.NUM_LONG]
    num_bags = batch_size * state.num_features
    has_scales = kind.is_jagged and cuts.has_scales
    num_evicted, num_fetched = header[names.EVICTED_OVERLAPPED], header[names.FETCHED_OVERLAPPED]
    cut, is_weighted = cuts.of_place, kind.is_weighted
    on_device = DevicePlan(
        step=step,
        batch_size=batch_size,
        num_features=state.num_features,
        lookup_slots=cut("lookup_slots", at, length),
        bag_offsets=cut("kept_offsets", position, num_bags + 1) if kind.is_jagged else None,
        bag_scales=cut("bag_scales", position, num_bags) if has_scales else None,
        lookup_weights=cut("kept_weights", position, length) if is_weighted else None,
        unique_slots=cut("unique_slots", at, num_uniques),
        bags=cut("bags", position, length),
        bag_weights=cut("bag_weights", position, length) if is_weighted else None,
        piece_offsets=cut("piece_offsets", position, header[names.NUM_PIECES] + 1),
        long_uniques=cut("long_uniques", position, num_long),
        long_offsets=cut("long_offsets", position, num_long + 1),
    )
    return PlanOnDevice(
        overlapped=_transfers(
            answer, slice(num_evicted), slice(num_fetched), header[names.OVERLAPPED_FENCE]
        ),
        urgent=_transfers(
            answer, slice(num_evicted, None), slice(num_fetched, None), header[names.URGENT_FENCE]
        ),
        num_lookups=length,
        num_uniques=num_uniques,
        inverse=cut("inverse", position, length),
        on_device=on_device,
        overlapped_on_device=DeviceTransfers(
            evict_slots=cut("evict_slots", at, num_evicted),
            fetch_slots=cut("fetch_slots", at, num_fetched),
            evict_rows=cut("evict_rows", at, num_evicted),
            fetch_rows=cut("fetch_rows", at, num_fetched),
        ),
        urgent_on_device=_urgent(cuts, at, header),
        rings=rings,
    )


def _urgent(cuts: Cuts, at: int, header: list[int]) -> DeviceTransfers:
    """The urgent transfers of the plan in a place of the ring; most plans have none."""
    evicted = slice(header[names.EVICTED_OVERLAPPED], header[names.EVICTED])
    fetched = slice(header[names.FETCHED_OVERLAPPED], header[names.FETCHED])
    if evicted.start == evicted.stop and fetched.start == fetched.stop:
        return cuts.no_moves
    return DeviceTransfers(
        evict_slots=cuts.place("evict_slots", at)[evicted],
        fetch_slots=cuts.place("fetch_slots", at)[fetched],
        evict_rows=cuts.place("evict_rows", at)[evicted],
        fetch_rows=cuts.place("fetch_rows", at)[fetched],
    )


def _transfers(answer: GroupAnswer, evicted: slice, fetched: slice, fence_tick: int) -> Transfers:
    return Transfers(
        evict_rows=answer.evict_rows[evicted],
        evict_slots=answer.evict_slots[evicted],
        fetch_rows=answer.fetch_rows[fetched],
        fetch_slots=answer.fetch_slots[fetched],
        fence_tick=fence_tick,
    )
