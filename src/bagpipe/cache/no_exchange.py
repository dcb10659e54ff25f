"""The exchanges of a trainer without others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TypeAlias

from torch import Tensor

from bagpipe.cache.device_cache import DeviceCache, UpdateRate
from bagpipe.cache.device_plan import DeviceGroup, DevicePlan
from bagpipe.cache.graph_rows import GroupUpdate, OwnUpdate, in_ring
from bagpipe.plan import HostStepPlan

Filled: TypeAlias = Callable[[], Sequence[DeviceGroup]]
"""Waits until a step's overlapped rows are in their slots, and returns its groups."""


class NoExchange:
    """The exchanges of a trainer without others; see `Exchange`."""

    has_others = False
    dense_average = None

    def __init__(self, caches: Sequence[DeviceCache]) -> None:
        self._caches = tuple(caches)

    def begin_step(self, number: int) -> None:
        """Nothing to compare."""

    def begin_replicas(self, plan: HostStepPlan, filled: Filled) -> None:
        """There are none."""

    def finish_replicas(self, plan: HostStepPlan) -> None:
        """There are none."""

    def send_urgent_replicas(
        self, number: int, undivided: Callable[[], AbstractContextManager[None]]
    ) -> None:
        """There are none."""

    def start_behind(
        self, plan: HostStepPlan, following: HostStepPlan | None, filled: Filled
    ) -> None:
        """Nothing travels."""

    def update(self, index: int, plan: DevicePlan, grads: Tensor, *, number: int) -> None:
        """Updates the rows at once."""
        self._caches[index].update(plan, grads, number=number)

    def fits_graph(self, number: int) -> bool:
        """A graph can hold what is exchanged, which is nothing."""
        return True

    def updates_in_graph(
        self, plan: HostStepPlan, groups: Sequence[DeviceGroup], clock: Tensor
    ) -> list[GroupUpdate]:
        """How a graph updates rows, by group."""
        updates: list[GroupUpdate] = []
        for cache, group in zip(self._caches, groups, strict=True):
            assert group.rings is not None
            rows = in_ring(group.rings, clock, batch_size=plan.batch_size, current=group.plan)
            updates.append(OwnUpdate(cache, rows))
        return updates

    def note_replicas(self, number: int) -> None:
        """There are none."""

    def note_update(self, number: int, rates: Sequence[UpdateRate]) -> None:
        """Nobody to tell."""

    def end_step(self, number: int, undivided: Callable[[], AbstractContextManager[None]]) -> None:
        """Nothing to send."""

    def begin_flush(self) -> None:
        """Nothing to compare."""

    def finish_all(self, open_step: int | None) -> None:
        """All gradients are applied."""

    def end_flush(self) -> None:
        """Nobody to wait for."""

    def close(self, *, wait: bool = True) -> None:
        """Nothing to end."""
