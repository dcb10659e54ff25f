"""Lookups and updates that a CUDA graph holds, for whatever step it is replayed.

A graph is captured once, and its launches keep their arguments. So these name no plan, but the
rings that hold all plans, and a clock on the device says which step it is. Each replay advances the
clock. The host sets it only where a step was trained in another way, and it tells learning rates
only where they change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from bagpipe.cache.device_cache import DeviceCache, UpdateRate
from bagpipe.cache.device_plan import DevicePlan, PlanRings
from bagpipe.cache.ring import Ring

_SHARE_BEYOND = 8
"""Grids have room for an eighth more rows than the current step has. Where more come, programs take
several tiles each."""


class Books(Protocol):
    """What is noted of the current step, since a graph says nothing of what it has done."""

    def receiving(self) -> AbstractContextManager[None]:
        """A context in which other trainers' rows come, without an update."""

    def training(self) -> AbstractContextManager[Sequence[UpdateRate]]:
        """A context in which rows are updated, at these rates by group.

        Other trainers' rows come there, too, unless they have.
        """


class GroupUpdate(Protocol):
    """How a graph updates one group's rows."""

    def receive(self) -> None:
        """Lets rows of other trainers come that the step before has changed."""

    @property
    def plan(self) -> DevicePlan:
        """What is looked up, in rings."""

    @property
    def applied(self) -> DevicePlan:
        """What updates rows, in rings whose rates are the step's."""

    def __call__(self, grads: Tensor) -> None:
        """Updates rows with gradients (B, F, D)."""

    def warm_up(self, grads: Tensor) -> None:
        """Compiles and loads what a call launches; no row changes."""


class OwnUpdate:
    """How a graph updates one group's rows, which this trainer alone uses."""

    def __init__(self, cache: DeviceCache, plan: DevicePlan) -> None:
        """Launches nothing yet; `plan` lies in rings."""
        self._cache, self.plan, self.applied = cache, plan, plan

    def receive(self) -> None:
        """There are no others."""

    def __call__(self, grads: Tensor) -> None:
        """See `GroupUpdate`."""
        self._cache.update(self.plan, grads)

    def warm_up(self, grads: Tensor) -> None:
        """See `GroupUpdate`."""
        self._cache.update(of_no_rows(self.plan), grads)


class GraphRows:
    """The rows of one batch size's steps, as long as their plans lie in the same rings.

    A capture calls `lookup` and `update`, which do nothing then. `replay` trains a step.
    """

    def __init__(
        self,
        caches: Sequence[DeviceCache],
        updates: Sequence[GroupUpdate],
        clock: Tensor,
        books: Books,
    ) -> None:
        """Launches nothing yet.

        Args:
            caches: by group.
            updates: by group.
            clock: (1,) int64 on the device, the step that they look up and update.
            books: of the current step.
        """
        self._caches, self._updates, self._clock = tuple(caches), tuple(updates), clock
        self._books: Books | None = books
        self.step = -1
        """The current one."""
        # What the device has been told.
        self._told_step = -1
        self._rates: list[UpdateRate] = []

    def lookup(self, out: Sequence[Tensor]) -> None:
        """Pools embeddings into `out`, (B, F, D) by group, once other trainers' rows have come."""
        for update in self._updates:
            update.receive()
        self._pool(out)

    def _pool(self, out: Sequence[Tensor]) -> None:
        for cache, update, into in zip(self._caches, self._updates, out, strict=True):
            cache.lookup(update.plan, out=into)

    def update(self, grads: Sequence[Tensor]) -> None:
        """Updates rows with `grads`, (B, F, D) by group, and advances the clock."""
        for update, grad in zip(self._updates, grads, strict=True):
            update(grad)
        self._clock.add_(1)

    def warm_up(self, pooled: Sequence[Tensor]) -> None:
        """Compiles and loads what a capture launches; no row changes."""
        self._pool(pooled)
        for update, grad in zip(self._updates, pooled, strict=True):
            update.warm_up(grad)

    def replay(self, graph: torch.cuda.CUDAGraph) -> None:
        """Trains the current step by a graph that holds `lookup` and `update`."""
        with self._of_step.training() as rates:
            self._tell_step()
            self._tell_rates(rates)
            graph.replay()
            self._told_step += 1

    def look_up_now(self, pooled: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], None]:
        """Looks the current step's rows up without a graph.

        Returns:
            What then updates them with gradients, by group.
        """
        self._tell_step()
        with self._of_step.receiving():
            self.lookup(pooled)
        return self._update_now

    def _update_now(self, grads: Sequence[Tensor]) -> None:
        with self._of_step.training() as rates:
            self._tell_rates(rates)
            self.update(grads)
            self._told_step += 1

    def let_go(self) -> None:
        """Frees caches and rings; no graph of these rows is replayed again."""
        self._caches, self._updates = (), ()
        self._books = None  # the executor, which would live on with its own rows

    @property
    def _of_step(self) -> Books:
        assert self._books is not None, "the stream of these rows is over"
        return self._books

    def _tell_step(self) -> None:
        """Sets the device's clock, unless it is right."""
        if self.step != self._told_step:
            self._clock.fill_(self.step)
            self._told_step = self.step

    def _tell_rates(self, rates: Sequence[UpdateRate]) -> None:
        """Tells the device the rates that it does not know."""
        if list(rates) != self._rates:
            self._rates = list(rates)
            for update, rate in zip(self._updates, self._rates, strict=True):
                tell_rate(update.applied, rate)


def in_ring(
    rings: PlanRings,
    clock: Tensor,
    *,
    batch_size: int = 0,
    rate: float = 0.0,
    current: DevicePlan | None = None,
) -> DevicePlan:
    """The plan of whatever step it is.

    Args:
        rings: in which plans lie.
        clock: (1,) int64 on the device, the step.
        batch_size: the number of samples.
        rate: the learning rate, up to `tell_rate`.
        current: a plan of about the size of those to come, by default one that fills its places.
    """
    plans = rings.plans
    sizes = (plans.unique_slots, plans.piece_offsets, plans.long_uniques)
    if current is None:
        uniques, pieces, long = (each.shape[1] for each in sizes)
    else:
        numbers = (
            len(current.unique_slots),
            len(current.piece_offsets) - 1,
            len(current.long_uniques),
        )
        uniques, pieces, long = (number + number // _SHARE_BEYOND for number in numbers)
    ring = Ring(
        layout=rings.layout,
        clock=clock,
        rates=torch.tensor([rate, 0.0], device=clock.device),
        typical=(uniques, pieces, long),
    )
    return replace(plans, batch_size=batch_size, ring=ring)


def of_no_rows(plan: DevicePlan) -> DevicePlan:
    """The same launches, which find that a plan in rings has no rows."""
    assert plan.ring is not None
    layout = plan.ring.layout
    nothing = replace(layout, headers=torch.zeros_like(layout.headers))
    return replace(plan, ring=replace(plan.ring, layout=nothing))


def tell_rate(plan: DevicePlan, rate: UpdateRate) -> None:
    """Tells the device the rate at which a plan in rings updates rows, on the current stream."""
    assert plan.ring is not None
    shrinkage = rate.optimizer.update_constants(rate.rate).shrinkage
    for place, value in enumerate((rate.rate, shrinkage)):
        plan.ring.rates[place].fill_(value)


class RowsInGraphs:
    """The rows of one executor's graphs."""

    def __init__(self, caches: Sequence[DeviceCache]) -> None:
        """Has none yet; `caches` are by group."""
        self._caches = caches
        # by batch size and rings, which differ with what only some batches have
        self._rows: dict[tuple[int, ...], tuple[list[PlanRings], GraphRows]] = {}

    def of(
        self,
        step: int,
        batch_size: int,
        rings: Sequence[PlanRings | None],
        updates: Callable[[Tensor], Sequence[GroupUpdate]],
        books: Books,
    ) -> GraphRows | None:
        """Those of a step, the same object as long as rings stay.

        Args:
            step: its number.
            batch_size: its samples.
            rings: in which its plans lie, by group.
            updates: makes its updates by group, for a clock.
            books: as for `GraphRows`.

        Returns:
            None unless the plans lie in rings that are there to stay.
        """
        found = [each for each in rings if each is not None]
        if len(found) < len(rings):
            self.let_go()  # a capacity has grown: what the old rings take is needed for new ones
            return None
        key = (batch_size, *map(id, found))
        if key not in self._rows:
            clock = torch.zeros(1, dtype=torch.int64, device=self._caches[0].device)
            self._rows[key] = found, GraphRows(self._caches, updates(clock), clock, books)
        _, rows = self._rows[key]
        rows.step = step
        return rows

    def let_go(self) -> None:
        """Frees caches and rings; no graph is replayed again.

        The device may still compute steps of these rings: their plans hold them until it has.
        """
        while self._rows:
            self._rows.popitem()[1][1].let_go()
