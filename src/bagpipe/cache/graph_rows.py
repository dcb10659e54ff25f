"""Lookups and updates that a CUDA graph holds, for whatever step it is replayed.

A graph is captured once, and its launches keep their arguments. So these name no plan, but the
rings that hold all plans, and a clock on the device says which step it is. Each replay advances the
clock. The host sets it only where a step was trained in another way, and it tells learning rates
only where they change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bagpipe.cache.device_cache import DeviceCache
from bagpipe.cache.device_plan import DevicePlan, PlanOnDevice, PlanRings
from bagpipe.cache.ring import Ring
from bagpipe.plan import HostStepPlan

_SHARE_BEYOND = 8
"""Grids have room for an eighth more rows than the current step has. Where more come, programs take
several tiles each."""


@dataclass(frozen=True, kw_only=True)
class StepToTrain:
    """What a replay has to know of its step."""

    step: int
    rates: Sequence[float]
    """By group, as `DeviceCache.apply` takes them."""


class GraphRows:
    """The rows of one batch size's steps, as long as their plans lie in the same rings.

    A capture calls `lookup` and `update`, which do nothing then. `replay` trains a step.
    """

    def __init__(
        self,
        caches: Sequence[DeviceCache],
        rings: Sequence[PlanRings],
        current: Sequence[DevicePlan],
        training: Callable[[], AbstractContextManager[StepToTrain]],
    ) -> None:
        """Launches nothing yet.

        Args:
            caches: by group.
            rings: by group.
            current: plans of about the size of those to come, by group.
            training: a context in which the current step's rows are updated.
        """
        self._caches = tuple(caches)
        self._training: Callable[[], AbstractContextManager[StepToTrain]] = training
        self._found_in = tuple(rings)
        self._plans = [_with_clock(each, plan) for each, plan in zip(rings, current, strict=True)]
        # What the device has been told.
        self._step = -1
        self._numbers: list[tuple[float, float]] = [(0.0, 0.0)] * len(self._rings)

    def are_in(self, rings: Sequence[PlanRings]) -> bool:
        """Whether these are the rings in which their plans lie."""
        return all(own is each for own, each in zip(self._found_in, rings, strict=True))

    def lookup(self, out: Sequence[Tensor]) -> None:
        """Pools embeddings into `out`, (B, F, D) by group."""
        for cache, plan, into in zip(self._caches, self._plans, out, strict=True):
            cache.lookup(plan, out=into)

    def update(self, grads: Sequence[Tensor]) -> None:
        """Updates rows with `grads`, (B, F, D) by group, and advances the clock."""
        for cache, plan, grad in zip(self._caches, self._plans, grads, strict=True):
            cache.update(plan, grad)
        torch._foreach_add_([ring.clock for ring in self._rings], 1)

    def warm_up(self, pooled: Sequence[Tensor]) -> None:
        """Compiles and loads what a capture launches; no row changes."""
        self.lookup(pooled)
        for cache, plan, grad in zip(self._caches, self._plans, pooled, strict=True):
            assert plan.ring is not None
            layout = plan.ring.layout
            nothing = replace(layout, headers=torch.zeros_like(layout.headers))
            cache.update(replace(plan, ring=replace(plan.ring, layout=nothing)), grad)

    def replay(self, graph: torch.cuda.CUDAGraph) -> None:
        """Trains the current step by a graph that holds `lookup` and `update`."""
        with self._training() as current:
            self._tell(current)
            graph.replay()
            self._step = current.step + 1

    @contextmanager
    def around(self, pooled: Sequence[Tensor]) -> Iterator[Callable[[Sequence[Tensor]], None]]:
        """Trains the current step without a graph: looks up, and yields `update`, to be called."""
        with self._training() as current:
            self._tell(current)
            self.lookup(pooled)
            yield self.update
            self._step = current.step + 1

    def let_go(self) -> None:
        """Frees caches and rings; no graph of these rows is replayed again."""
        self._caches, self._plans, self._found_in = (), [], ()
        self._training = _over  # the executor's, which would live on with its own rows

    @property
    def _rings(self) -> list[Ring]:
        return [plan.ring for plan in self._plans if plan.ring is not None]

    def _tell(self, current: StepToTrain) -> None:
        """Tells the device what it does not know of the step."""
        numbers = [
            (rate, cache.group.optimizer.update_constants(rate).shrinkage)
            for cache, rate in zip(self._caches, current.rates, strict=True)
        ]
        if numbers != self._numbers:
            for ring, values in zip(self._rings, numbers, strict=True):
                for place, value in enumerate(values):
                    ring.rates[place].fill_(value)
            self._numbers = numbers
        if current.step != self._step:
            for ring in self._rings:
                ring.clock.fill_(current.step)


def _with_clock(rings: PlanRings, current: DevicePlan) -> DevicePlan:
    device, num_pieces = rings.layout.headers.device, len(current.piece_offsets) - 1
    sizes = (len(current.unique_slots), num_pieces, len(current.long_uniques))
    uniques, pieces, long = (size + size // _SHARE_BEYOND for size in sizes)
    ring = Ring(
        layout=rings.layout,
        clock=torch.zeros(1, dtype=torch.int64, device=device),
        rates=torch.zeros(2, device=device),
        typical=(uniques, pieces, long),
    )
    return replace(rings.plans, batch_size=current.batch_size, ring=ring)


def _over() -> AbstractContextManager[StepToTrain]:
    raise AssertionError("the stream of these rows is over")


class RowsInGraphs:
    """The rows of one executor's graphs, by batch size."""

    def __init__(self, caches: Sequence[DeviceCache]) -> None:
        """Has none yet; `caches` are by group."""
        self._caches = caches
        self._rows: dict[int, GraphRows] = {}

    def of(
        self,
        plan: HostStepPlan,
        current: Sequence[DevicePlan],
        training: Callable[[], AbstractContextManager[StepToTrain]],
    ) -> GraphRows | None:
        """Those of a step, the same object as long as rings stay.

        Args:
            plan: of the step.
            current: the same, on the device.
            training: as for `GraphRows`.

        Returns:
            None unless the plan lies in rings that are there to stay.
        """
        rings = [
            group.rings
            for group in plan.groups
            if isinstance(group, PlanOnDevice) and group.rings is not None
        ]
        if len(rings) < len(plan.groups):
            self.let_go()  # a capacity has grown: what the old rings take is needed for new ones
            return None
        rows = self._rows.get(plan.batch_size)
        if rows is None or not rows.are_in(rings):
            if rows is not None:
                rows.let_go()
            rows = GraphRows(self._caches, rings, current, training)
            self._rows[plan.batch_size] = rows
        return rows

    def let_go(self) -> None:
        """Frees caches and rings; no graph is replayed again.

        The device may still compute steps of these rings: their plans hold them until it has.
        """
        while self._rows:
            self._rows.popitem()[1].let_go()
