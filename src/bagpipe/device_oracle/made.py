"""A step's plan as the device has made it, for the trainer: tensors in rings, and rows to move."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bagpipe.cache.device_plan import DeviceTransfers, PlanOnDevice
from bagpipe.cache.overlap import Buffer, Staging
from bagpipe.device_oracle import state as names
from bagpipe.device_oracle.staged import StagedIds
from bagpipe.device_oracle.state import State
from bagpipe.plan import Transfers
from bagpipe.types import Int32Array, Int64Array


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Which arrays a batch has for one group; the device may keep more."""

    is_jagged: bool
    is_weighted: bool

    @classmethod
    def of(cls, staged: StagedIds) -> Kind:
        """That of a batch."""
        return cls(
            is_jagged=staged.lookups.bag_offsets is not None,
            is_weighted=staged.lookups.weights is not None,
        )


class Moves:
    """The rows that a step moves, and their slots, on their way to the host."""

    def __init__(self, state: State, step: int, header: list[int], staging: Staging) -> None:
        """Asks for them on the current stream; `header` is the step's."""
        self._header = header
        at = step % state.window.num_plans
        num_evicted, num_fetched = header[names.EVICTED], header[names.FETCHED]
        sources = [
            state.evict_rows[at, :num_evicted],
            state.fetch_rows[at, :num_fetched],
            state.evict_slots[at, :num_evicted],
            state.fetch_slots[at, :num_fetched],
        ]
        self._buffer: Buffer = staging.take(sum(each.nbytes for each in sources) // 4, 1)
        words, begin = self._buffer.whole.view(torch.int32), 0
        self._copies = list[Tensor]()
        for source in sources:  # rows first, which may have 64 bits
            end = begin + source.nbytes // 4
            copy = words[begin:end].view(source.dtype)
            copy.copy_(source, non_blocking=True)
            self._copies.append(copy)
            begin = end

    def read(self) -> tuple[Transfers, Transfers]:
        """The overlapped and the urgent transfers, once the copies are there. To be called once."""
        header = self._header
        evict_rows, fetch_rows = (
            copy.numpy().astype(np.int64) for copy in self._copies[:2]
        )  # copies, since the buffer is used again
        evict_slots, fetch_slots = (copy.numpy().copy() for copy in self._copies[2:])
        self._buffer.give_back()
        cut, first = header[names.EVICTED_OVERLAPPED], header[names.FETCHED_OVERLAPPED]

        def transfers(evicted: slice, fetched: slice, fence: int) -> Transfers:
            return Transfers(
                evict_rows=_part(evict_rows, evicted),
                evict_slots=_part(evict_slots, evicted),
                fetch_rows=_part(fetch_rows, fetched),
                fetch_slots=_part(fetch_slots, fetched),
                fence_tick=fence,
            )

        return (
            transfers(slice(cut), slice(first), header[names.OVERLAPPED_FENCE]),
            transfers(slice(cut, None), slice(first, None), header[names.URGENT_FENCE]),
        )


def plan_on_device(
    state: State, step: int, header: list[int], kind: Kind, moves: Moves
) -> PlanOnDevice:
    """The plan of a step that is in the rings, and whose moves are on the host."""
    window = state.window
    position, at = step % window.ring_length, step % window.num_plans
    length, num_uniques = header[names.NUM_LOOKUPS], header[names.NUM_UNIQUES]
    num_bags, num_long = header[names.BATCH_SIZE] * state.num_features, header[names.NUM_LONG]
    has_scales = kind.is_jagged and state.bag_scales.shape[1] > 0
    num_evicted, num_fetched = header[names.EVICTED_OVERLAPPED], header[names.FETCHED_OVERLAPPED]
    overlapped, urgent = moves.read()
    return PlanOnDevice(
        overlapped=overlapped,
        urgent=urgent,
        num_lookups=length,
        inverse=state.inverse[position, :length],
        bag_offsets=state.kept_offsets[position, : num_bags + 1] if kind.is_jagged else None,
        bag_scales=state.bag_scales[position, :num_bags] if has_scales else None,
        lookup_weights=state.kept_weights[position, :length] if kind.is_weighted else None,
        schedule={
            "unique_slots": state.unique_slots[at, :num_uniques],
            "bags": state.bags[position, :length],
            "bag_weights": state.bag_weights[position, :length] if kind.is_weighted else None,
            "piece_offsets": state.piece_offsets[position, : header[names.NUM_PIECES] + 1],
            "long_uniques": state.long_uniques[position, :num_long],
            "long_offsets": state.long_offsets[position, : num_long + 1],
        },
        overlapped_slots=DeviceTransfers(
            evict_slots=state.evict_slots[at, :num_evicted],
            fetch_slots=state.fetch_slots[at, :num_fetched],
            evict_rows=state.evict_rows[at, :num_evicted],
            fetch_rows=state.fetch_rows[at, :num_fetched],
        ),
    )


def _part(values: Int64Array | Int32Array, part: slice) -> np.ndarray:
    return values[part]
