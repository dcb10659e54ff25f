"""What one trainer's executor does besides when there are others: replicas, and gradients on their way to the rows' owners.

Around the compute of step t, in the order in which all ranks do it:

    behind the compute of t - 1    gradients that step t - 2 deferred -> owners, who apply them        background
                                   replicas that step t - 1 does not change -> users                   background
    tick t                         replicas that step t - 1 has changed -> users                       trainer's thread
    backward of t                  the trainer sums its own bags by distinct row; gradients of rows
                                   that step t + 1 uses -> owners, who apply them                      trainer's thread

Gradients are averaged over the trainers, as DistributedDataParallel averages those of the dense part. A row's contributions are
added in the order of ranks and its optimizer runs once, on its owner. All of it is made of the kernels of a single trainer: sums by
row are a lookup in the gradients, and applying is an update whose bags are the sums.

Owned here: for each step that is not over its sums by group (`_Sums`), with room behind them for the sums received.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bagpipe._workers import Call, Workers
from bagpipe.cache.communicator import Communicator, Moment
from bagpipe.cache.device_cache import DeviceCache
from bagpipe.cache.device_plan import DevicePlan
from bagpipe.cache.spans import span
from bagpipe.errors import ConfigError
from bagpipe.types import GradientSchedule, GroupExchange, RowExchange, StepPlan


@dataclass(kw_only=True)
class _Step:
    """A step from the time that its replicas are asked for to the time that its last gradient is applied."""

    plan: StepPlan
    replicas: Call[None] | None = None
    sums: dict[int, Tensor]  # by group (U + room, D)


class Exchange:
    """The exchanges of one `Executor`; its methods are called by the trainer's thread."""

    def __init__(self, communicator: Communicator, caches: Sequence[DeviceCache]) -> None:
        if caches[0].device.type != "cpu":
            raise ConfigError(f"several trainers exchange rows on CPUs only so far, the embeddings are on {caches[0].device}")
        self.communicator = communicator
        communicator.begin_stream()
        self._caches = tuple(caches)
        self._thread = Workers("bagpipe-exchange")
        self._steps: dict[int, _Step] = {}
        self._deferred: dict[int, Call[None]] = {}  # by step

    def ask_for_replicas(self, plan: StepPlan, are_filled: Callable[[], object]) -> None:
        """Hands out a step's later replicas, unless that is done; they are sent once `are_filled` returns."""
        step = self._steps.setdefault(plan.step, _Step(plan=plan, sums={}))
        if step.replicas is None:
            step.replicas = self._thread.submit(self._send_replicas_later, plan, are_filled)

    def finish_replicas(self, plan: StepPlan) -> None:
        """Waits for a step's later replicas and exchanges those that could not be sent before."""
        asked = self._steps[plan.step].replicas
        assert asked is not None
        asked.result()
        for cache, group in zip(self._caches, plan.groups, strict=True):
            exchange = _of(group.exchange)
            self._send_replicas(cache, exchange, exchange.replicas_now, "now", plan.step)

    def update(self, index: int, plan: DevicePlan, grads: Tensor) -> None:
        """Applies what group `index` can be applied of a step's gradients (B, F, D); the rest waits for `defer`."""
        step, cache = self._steps[plan.step], self._caches[index]
        exchange = _of(step.plan.groups[index].exchange)
        num_uniques = len(plan.unique_slots)
        room = max(exchange.sync_now.num_received, exchange.sync_later.num_received)
        sums = torch.empty(num_uniques + room, cache.group.embedding_dim, device=cache.device)
        with span("sum"):
            cache.sum_by_row(plan, grads, sums[:num_uniques])
            sums[:num_uniques] *= 1.0 / self.communicator.num_trainers
        step.sums[index] = sums
        self._sync(cache, exchange.sync_now, exchange.apply_now, sums, num_uniques, "now", plan.step)

    def defer(self, plan: StepPlan) -> None:
        """Hands out a computed step's later gradients, unless that is done."""
        if plan.step in self._steps and plan.step not in self._deferred:
            self._deferred[plan.step] = self._thread.submit(self._apply_later, self._steps[plan.step])

    def finish_deferred(self, last_step: int) -> None:
        """Waits for the later gradients of all steps up to `last_step` that are handed out."""
        for number in [step for step in self._deferred if step <= last_step]:
            self._deferred[number].result()
            del self._deferred[number]
            del self._steps[number]

    def close(self) -> None:
        """Ends the thread; what is under way ends first."""
        self._thread.close()

    def _send_replicas_later(self, plan: StepPlan, are_filled: Callable[[], object]) -> None:
        are_filled()
        for cache, group in zip(self._caches, plan.groups, strict=True):
            exchange = _of(group.exchange)
            self._send_replicas(cache, exchange, exchange.replicas_later, "later", plan.step)

    def _send_replicas(self, cache: DeviceCache, exchange: GroupExchange, rows: RowExchange, moment: Moment, step: int) -> None:
        begin = exchange.first_replica + (exchange.replicas_later.num_received if moment == "now" else 0)
        with span(f"replicas_{moment}"):
            sent = cache.words.index_select(0, torch.from_numpy(rows.send))
            into = cache.words[begin : begin + rows.num_received]
            what = f"replicas of {cache.group.name}"
            self.communicator.exchange(sent, into, rows, moment=moment, step=step, what=what)

    def _apply_later(self, step: _Step) -> None:
        for index, sums in sorted(step.sums.items()):  # none where the trainer has not called backward
            group = step.plan.groups[index]
            exchange = _of(group.exchange)
            num_uniques = group.schedule.num_uniques
            self._sync(self._caches[index], exchange.sync_later, exchange.apply_later, sums, num_uniques, "later", step.plan.step)

    def _sync(
        self,
        cache: DeviceCache,
        rows: RowExchange,
        schedule: GradientSchedule,
        sums: Tensor,
        num_uniques: int,
        moment: Moment,
        step: int,
    ) -> None:
        """Sends gradients to the rows' owners, receives those of own rows behind the own sums, and applies what is due."""
        with span(f"sync_{moment}"):
            sent = sums.index_select(0, torch.from_numpy(rows.send))
            into = sums[num_uniques : num_uniques + rows.num_received]
            what = f"gradients of {cache.group.name}"
            self.communicator.exchange(sent, into, rows, moment=moment, step=step, what=what)
            cache.apply(schedule, sums, step)


def _of(exchange: GroupExchange | None) -> GroupExchange:
    assert exchange is not None
    return exchange
