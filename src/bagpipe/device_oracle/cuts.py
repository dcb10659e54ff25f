"""Beginnings of a state's tensors. Cutting a tensor takes the host microseconds, so cuts are kept.

A cut is a view: it may be kept as long as the tensor is. Most lengths are those of the batch before
in the same place, where batches have one size.
"""

from __future__ import annotations

from torch import Tensor

from bagpipe.cache.device_plan import DeviceTransfers
from bagpipe.device_oracle.state import State

_INPUTS = ("given", "bag_offsets", "lookup_weights")
_RINGS = (
    "inverse bags piece_offsets long_uniques long_offsets kept_offsets bag_scales kept_weights "
    "bag_weights unique_slots lookup_slots evict_rows evict_slots fetch_rows fetch_slots"
).split()


class Cuts:
    """Cuts of one state's tensors, for one thread."""

    def __init__(self, state: State) -> None:
        """Cuts each ring into its places, and nothing else yet."""
        self._inputs = {name: _Cut(getattr(state, name)) for name in _INPUTS}
        self._places = {
            name: [_Cut(place) for place in getattr(state, name).unbind(0)] for name in _RINGS
        }
        self.no_moves = DeviceTransfers(
            evict_slots=state.evict_slots[0, :0],
            fetch_slots=state.fetch_slots[0, :0],
            evict_rows=state.evict_rows[0, :0],
            fetch_rows=state.fetch_rows[0, :0],
        )
        self.has_scales = state.bag_scales.shape[1] > 0

    def of_input(self, name: str, length: int) -> Tensor:
        """The beginning of what the host writes."""
        return self._inputs[name].to(length)

    def place(self, name: str, place: int) -> Tensor:
        """A ring's whole place."""
        return self._places[name][place].whole

    def of_place(self, name: str, place: int, length: int) -> Tensor:
        """The beginning of a ring's place."""
        return self._places[name][place].to(length)


class _Cut:
    """The beginning of one tensor, as it was asked for last."""

    def __init__(self, whole: Tensor) -> None:
        self.whole, self._length, self._part = whole, -1, whole

    def to(self, length: int) -> Tensor:
        if length != self._length:
            self._length, self._part = length, self.whole[:length]
        return self._part
