"""What CUDA graphs hold of the exchanges of `exchange`, where plans lie in rings.

    in the graph of a step      replicas that the step before has changed -> users;
                                gradients summed by row; urgent ones -> owners, who apply them
    in a graph behind compute   gradients that the step before deferred -> owners, who apply them;
                                replicas of the step that follows -> users

Both do what `Exchange` does without a graph, in the same order, so a rank may replay a graph while
another one does not.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bagpipe.cache.captured import captured_graph
from bagpipe.cache.device_cache import DeviceCache, UpdateRate
from bagpipe.cache.device_plan import DeviceGroup, DevicePlan
from bagpipe.cache.graph_rows import in_ring, of_no_rows, tell_rate
from bagpipe.cache.plan_layout import ExchangeRings, HostPlanRings
from bagpipe.cache.ring import RowRings, RowsByClock
from bagpipe.cache.ways import Launcher

_logger = logging.getLogger("bagpipe.lookahead")


def lasting_rings(groups: Sequence[DeviceGroup]) -> list[ExchangeRings] | None:
    """Where a step's exchanges lie, by group, if these rings are there to stay."""
    rings = [
        group.rings.exchange
        for group in groups
        if isinstance(group.rings, HostPlanRings) and group.rings.exchange is not None
    ]
    return rings if rings and len(rings) == len(groups) else None


def are_same(rings: Sequence[ExchangeRings], others: Sequence[ExchangeRings] | None) -> bool:
    """Whether these are the same objects."""
    return others is not None and all(a is b for a, b in zip(rings, others, strict=True))


class SharedUpdate:
    """How a graph updates one group's rows, which other trainers use, too."""

    def __init__(
        self,
        cache: DeviceCache,
        rings: HostPlanRings,
        sums: Tensor,
        clock: Tensor,
        launcher: Launcher,
        *,
        batch_size: int,
        num_trainers: int,
    ) -> None:
        """Launches nothing yet.

        Args:
            cache: the group's.
            rings: in which its plans lie.
            sums: (2 * sums_rows, D) float32, where sums by row are put.
            clock: (1,) int64 on the device, the step.
            launcher: sends rows.
            batch_size: samples of the steps that it is for.
            num_trainers: by which gradients are divided.
        """
        exchange = _exchange_of(rings)
        self._cache, self._launcher, self._sums = cache, launcher, sums
        self._scale = 1.0 / num_trainers
        self.plan = in_ring(rings, clock, batch_size=batch_size)
        by_place = replace(rings.plans, unique_slots=_places_of_sums(rings))
        self._summed = in_ring(
            replace(rings, plans=by_place), clock, batch_size=batch_size, rate=-self._scale
        )
        self._replicas = _at(exchange.replicas_urgent, clock)
        self._sent = _at(exchange.sync_urgent, clock)
        self.applied = in_ring(exchange.apply_urgent, clock)

    def receive(self) -> None:
        """See `GroupUpdate`."""
        self._launcher.launch(self._cache.words, self._replicas, "urgent")

    def __call__(self, grads: Tensor) -> None:
        """Sums gradients (B, F, D), sends the urgent sums and applies what has come."""
        self._cache.sum_into(self._sums, self._summed, grads, self._scale)
        self._launcher.launch(self._sums, self._sent, "urgent")
        self._cache.apply(self.applied, self._sums, rate=self._cache.rate_of(1))

    def warm_up(self, grads: Tensor) -> None:
        """See `GroupUpdate`."""
        self._launcher.warm_up(self._cache.words, self._replicas, "urgent")
        self._cache.sum_into(self._sums, of_no_rows(self._summed), grads, self._scale)
        self._launcher.warm_up(self._sums, self._sent, "urgent")
        self._cache.apply(of_no_rows(self.applied), self._sums, rate=self._cache.rate_of(1))


class BehindGraph:
    """What travels behind compute, as long as plans lie in the same rings.

    Its graph is captured at the first replay. If it can't be, the same is launched call by call.
    """

    def __init__(
        self,
        launcher: Launcher,
        caches: Sequence[DeviceCache],
        rings: Sequence[ExchangeRings],
        sums: Sequence[Tensor],
    ) -> None:
        """Launches nothing yet; caches, rings and sums, as for `SharedUpdate`, are by group."""
        self.rings = tuple(rings)
        self._launcher, self._caches = launcher, tuple(caches)
        self._clocks = [
            torch.zeros(1, dtype=torch.int64, device=caches[0].device) for _ in range(2)
        ]
        before, following = self._clocks
        self._sums = tuple(sums)
        self._deferred = [_at(each.sync_overlapped, before) for each in rings]
        self._applied = [in_ring(each.apply_overlapped, before) for each in rings]
        self._replicas = [_at(each.replicas_overlapped, following) for each in rings]
        self._graph: torch.cuda.CUDAGraph | None = None
        self._is_tried = False
        # What the device has been told.
        self._step = -1
        self._rates: list[UpdateRate] = []

    def replay(self, step: int, rates: Sequence[UpdateRate]) -> None:
        """Does all of it, on the current stream.

        Args:
            step: the one that has deferred gradients; that of the replicas is the next but one.
            rates: of that step, by group, as `DeviceCache.apply` takes them.
        """
        if not self._is_tried:
            self._is_tried = True
            self._graph = self._capture()
        self._tell(step, list(rates))
        if self._graph is None:
            self._launch()
        else:
            self._graph.replay()
        self._step = step + 1

    def _launch(self) -> None:
        for cache, sums, sent, applied in self._deferrals:
            self._launcher.launch(sums, sent, "overlapped")
            cache.apply(applied, sums, rate=cache.rate_of(1))
        for cache, replicas in zip(self._caches, self._replicas, strict=True):
            self._launcher.launch(cache.words, replicas, "overlapped")
        torch._foreach_add_(self._clocks, 1)

    def _capture(self) -> torch.cuda.CUDAGraph | None:
        for cache, sums, sent, applied in self._deferrals:
            self._launcher.warm_up(sums, sent, "overlapped")
            cache.apply(of_no_rows(applied), sums, rate=cache.rate_of(1))
        for cache, replicas in zip(self._caches, self._replicas, strict=True):
            self._launcher.warm_up(cache.words, replicas, "overlapped")
        device = self._caches[0].device
        if device.type != "cuda":
            return None
        try:
            with captured_graph(torch.cuda.Stream(device)) as graph:
                self._launch()
        except RuntimeError as error:
            _logger.warning("what trainers exchange behind compute is in no graph: %s", error)
            return None
        return graph

    @property
    def _deferrals(self) -> list[tuple[DeviceCache, Tensor, RowsByClock, DevicePlan]]:
        return list(zip(self._caches, self._sums, self._deferred, self._applied, strict=True))

    def _tell(self, step: int, rates: list[UpdateRate]) -> None:
        """Tells the device what it does not know of the step."""
        if rates != self._rates:
            for applied, rate in zip(self._applied, rates, strict=True):
                tell_rate(applied, rate)
            self._rates = rates
        if step != self._step:
            for clock, number in zip(self._clocks, (step, step + 2), strict=True):
                clock.fill_(number)


def _exchange_of(rings: HostPlanRings) -> ExchangeRings:
    assert rings.exchange is not None
    return rings.exchange


def _at(rows: RowRings, clock: Tensor) -> RowsByClock:
    return RowsByClock(clock=clock, **vars(rows))


def _places_of_sums(rings: HostPlanRings) -> Tensor:
    """Where each unique row has its sum, by place of the ring: (K, capacity) int32."""
    num_rows, (num_places, capacity) = _exchange_of(rings).sums_rows, rings.plans.unique_slots.shape
    numbers = torch.arange(capacity, dtype=torch.int32, device=rings.plans.unique_slots.device)
    return torch.stack([numbers, numbers + num_rows]).repeat(num_places // 2, 1)
