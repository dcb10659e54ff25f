"""What passes between trainers: replicas, and gradients on their way to the rows' owners.

Around the compute of step t, in the order in which all ranks do it:

    behind the compute of t - 1    gradients that step t - 2 deferred -> owners, who apply them
    (background)                   replicas that step t - 1 does not change -> users
    tick t                         replicas that step t - 1 has changed -> users
    (trainer's thread)
    backward of t                  the trainer sums its own bags by unique row; once it has for
    (trainer's thread)             all groups, gradients of rows that step t + 1 uses -> owners, who
                                   apply them

Gradients are averaged over the trainers, as DistributedDataParallel averages those of the dense
part. A row's contributions are added in the order of ranks and its optimizer runs once, on its
owner. All of it is made of the kernels of a single trainer: sums by row are a descent from zero,
and applying is an update whose bags are the sums.

On a CPU a thread does what is in the background. On CUDA the trainer's thread asks for it too, on a
stream of its own: it follows the compute issued before the tick, and the compute that needs its
result follows it, all by events. Nothing there depends on what is ready when, so all ranks send the
same messages in the same order.

Owned here: for each step that is not over its sums by group, with room behind them for the sums
received.

A trainer without others has a `NoExchange`, which does the same to no effect: its gradients update
its own rows at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bagpipe.cache.device_cache import DeviceCache
from bagpipe.cache.device_plan import DeviceExchange, DevicePlan, DeviceRows
from bagpipe.cache.overlap import Streams
from bagpipe.cache.ways import way_for
from bagpipe.distributed.alone import Alone, Peers
from bagpipe.distributed.communicator import Communicator, Moment
from bagpipe.native.spans import span
from bagpipe.native.workers import Workers
from bagpipe.plan import GroupExchange, HostStepPlan, RowExchange


@dataclass(kw_only=True)
class _Step:
    """A step, from asking for its replicas to applying its last gradient."""

    plan: HostStepPlan
    # by group, once its overlapped rows are in their slots
    on_device: Sequence[DeviceExchange] = ()
    finish_replicas: Callable[[], object] | None = None
    finish_deferred: Callable[[], object] | None = None
    sums: dict[int, Tensor] = field(default_factory=dict)  # by group (U + room, D)
    # by group: the rate of the update when its gradients came
    rates: dict[int, float] = field(default_factory=dict)


def exchange_with(
    peers: Peers, caches: Sequence[DeviceCache], streams: Streams | None
) -> Exchange | NoExchange:
    """The exchanges of one `Executor`.

    `streams` are those of a CUDA device. Raises UsageError while the communicator serves another
    stream of plans.
    """
    return NoExchange(caches) if isinstance(peers, Alone) else Exchange(peers, caches, streams)


class NoExchange:
    """The exchanges of a trainer without others; see `Exchange`."""

    has_others = False

    def __init__(self, caches: Sequence[DeviceCache]) -> None:
        self._caches = tuple(caches)

    def begin_step(self, number: int) -> None:
        """Nothing to compare."""

    def start_behind(
        self, plan: HostStepPlan, filled: Callable[[], Sequence[DeviceExchange]]
    ) -> None:
        """Nothing travels."""

    def ask_for_replicas(
        self, plan: HostStepPlan, filled: Callable[[], Sequence[DeviceExchange]]
    ) -> None:
        """There are none."""

    def finish_replicas(self, plan: HostStepPlan) -> None:
        """There are none."""

    def update(self, index: int, plan: DevicePlan, grads: Tensor, *, number: int) -> None:
        """Updates the rows at once."""
        self._caches[index].update(plan, grads, number=number)

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


class Exchange:
    """The exchanges with other trainers; its methods are called by the trainer's thread."""

    has_others = True

    def __init__(
        self, communicator: Communicator, caches: Sequence[DeviceCache], streams: Streams | None
    ) -> None:
        """See `exchange_with`."""
        communicator.begin_stream()
        self._communicator, self._streams = communicator, streams
        self._caches = tuple(caches)
        self._way = way_for(communicator, caches, streams)
        self._background = _BackgroundThread() if streams is None else _BackgroundStream(streams)
        self._steps: dict[int, _Step] = {}
        self._newest = 0  # step that has begun
        # On a GPU the host does not wait for rows, so one act a step tells all. On a CPU the update
        # must be told before its messages, or a rank that skips it would leave others waiting.
        self._tells_updates_later = streams is not None
        self._untold = ""  # what was done since the last act

    def begin_step(self, number: int) -> None:
        """Compares what ranks have done since the last step, before anything of this one is sent.

        Ends what step `number` - 2 deferred, before its rows may be evicted and its plan released.
        """
        self._newest = number
        self._communicator.tell(f"{self._untold}begins step {number}", needed_at=number + 1)
        self._untold = ""
        self._communicator.compare_acts(number)
        self.finish_deferred(number - 2)

    def start_behind(
        self, plan: HostStepPlan, filled: Callable[[], Sequence[DeviceExchange]]
    ) -> None:
        """Hands out what travels behind the compute of `plan`'s step, which comes now.

        Its own overlapped replicas come first, unless they could be asked for a step ago.
        """
        self.ask_for_replicas(plan, filled)
        self.defer(plan.step - 1)
        if plan.has_urgent:
            self.finish_deferred(plan.step - 1)
            if self._streams is not None:
                self._streams.record_compute()  # urgent evictions follow what was deferred

    def end_step(self, number: int, undivided: Callable[[], AbstractContextManager[None]]) -> None:
        """Sends what has come, where not all groups have gradients.

        No rank may wait for others in vain. What it sends is `undivided`.
        """
        with undivided():
            self._end_step(number)

    def _end_step(self, number: int) -> None:
        step = self._steps.get(number)  # a flush may have ended it
        if step is None or len(step.sums) == len(self._caches):
            return
        names = [self._caches[index].group.name for index in sorted(step.sums)]
        act = f"ends step {number} with gradients of {', '.join(names) or 'nothing'} alone"
        if step.sums:
            self._communicator.do_together(act)
            self._sync_all(step, "urgent")
        else:
            self._communicator.tell(act, needed_at=number + 1)

    def begin_flush(self) -> None:
        """Compares what the ranks have done: all must flush at the same step."""
        self._communicator.do_together(
            f"{self._untold}writes its rows back at step {self._newest} (for an evaluation, a "
            "checkpoint or a look into the tables, or since its batches are over)"
        )
        self._untold = ""

    def ask_for_replicas(
        self, plan: HostStepPlan, filled: Callable[[], Sequence[DeviceExchange]]
    ) -> None:
        """Hands out a step's overlapped replicas, unless that is done.

        They are sent once `filled` returns, which waits for the step's overlapped rows.
        """
        if plan.step not in self._steps:
            step = self._steps[plan.step] = _Step(plan=plan)
            step.finish_replicas = self._background.start(
                self._send_replicas_overlapped, step, filled
            )

    def finish_replicas(self, plan: HostStepPlan) -> None:
        """Waits for a step's overlapped replicas and exchanges the urgent ones."""
        step = self._steps[plan.step]
        assert step.finish_replicas is not None
        step.finish_replicas()
        self._send_replicas(step, "urgent")

    def update(self, index: int, plan: DevicePlan, grads: Tensor, *, number: int) -> None:
        """Takes a step's gradients (B, F, D) of group `index`, for its `number`th update, from 1.

        Once all groups' are there, the urgent ones are exchanged and applied. The others wait for
        the next step's `start_behind`.
        """
        step, cache = self._steps[plan.step], self._caches[index]
        exchange = _of(step.plan.groups[index].exchange)
        step.rates[index] = cache.rate_of(number)
        is_last = len(step.sums) == len(self._caches) - 1
        if is_last:
            lr = cache.group.optimizer.lr
            act = f"updates its rows in step {plan.step} at the learning rate {lr!r}"
            if self._tells_updates_later:
                self._untold = f"{act}, then "
            else:
                self._communicator.tell(act, needed_at=plan.step + 1)
        with span("sum"):
            sums = cache.sum_by_row(
                plan, grads, scale=1.0 / self._communicator.num_trainers, room=exchange.num_room
            )
        step.sums[index] = sums
        if is_last:
            self._sync_all(step, "urgent")

    def defer(self, number: int) -> None:
        """Hands out the overlapped gradients of the computed step `number`, unless that is done."""
        step = self._steps.get(number)
        if step is not None and step.finish_deferred is None:
            step.finish_deferred = self._background.start(self._apply_overlapped, step)

    def finish_deferred(self, last_step: int) -> None:
        """Waits for the overlapped gradients of all steps up to `last_step` that are handed out."""
        for number, step in list(self._steps.items()):
            if number <= last_step and step.finish_deferred is not None:
                step.finish_deferred()
                del self._steps[number]

    def finish_all(self, open_step: int | None) -> None:
        """Applies every gradient that has come.

        Those of `open_step` count once they are there for all groups.
        """
        for number, step in self._steps.items():
            if step.sums and (number != open_step or len(step.sums) == len(self._caches)):
                self.defer(number)
        self.finish_deferred(max(self._steps, default=0))
        self._way.finish()  # nothing is written back that was made of rows that did not come

    def end_flush(self) -> None:
        """Waits until all ranks have written their rows back."""
        self._communicator.barrier("waiting for all ranks to write their rows back")

    def close(self, *, wait: bool = True) -> None:
        """Ends what is in the background, after what is under way.

        Without `wait` it waits for nothing, since the stream has failed.
        """
        self._background.close(wait=wait)
        self._way.close(wait=wait)
        self._communicator.end_stream(has_failed=not wait)

    def _send_replicas_overlapped(
        self, step: _Step, filled: Callable[[], Sequence[DeviceExchange]]
    ) -> None:
        step.on_device = filled()
        self._send_replicas(step, "overlapped")

    def _send_replicas(self, step: _Step, moment: Moment) -> None:
        for cache, group, on_device in zip(
            self._caches, step.plan.groups, step.on_device, strict=True
        ):
            exchange = _of(group.exchange)
            begin = exchange.first_replica
            if moment == "overlapped":
                rows, send = exchange.replicas_overlapped, on_device.replicas_overlapped
            else:
                rows, send = exchange.replicas_urgent, on_device.replicas_urgent
                begin += exchange.replicas_overlapped.num_received
            with span(f"replicas_{moment}"):
                self._exchange(
                    cache.words, begin, send, rows, moment, step, f"replicas of {cache.group.name}"
                )

    def _apply_overlapped(self, step: _Step) -> None:
        self._sync_all(step, "overlapped")

    def _sync_all(self, step: _Step, moment: Moment) -> None:
        for index in sorted(step.sums):  # none where no rank has called backward
            self._sync(step, index, moment)

    def _sync(self, step: _Step, index: int, moment: Moment) -> None:
        """Sends gradients to the rows' owners, receives those of own rows, and applies what is due.

        What is received lies behind this rank's own sums.
        """
        cache, group = self._caches[index], step.plan.groups[index]
        on_device, sums = step.on_device[index], step.sums[index]
        exchange, num_uniques = _of(group.exchange), group.num_uniques
        if moment == "overlapped":
            rows, send, apply = (
                exchange.sync_overlapped,
                on_device.sync_overlapped,
                on_device.apply_overlapped,
            )
        else:
            rows, send, apply = exchange.sync_urgent, on_device.sync_urgent, on_device.apply_urgent
        with span(f"sync_{moment}"):
            what = f"gradients of {cache.group.name}"
            self._exchange(sums, num_uniques, send, rows, moment, step, what)
            cache.apply(apply, sums, rate=step.rates[index])

    def _exchange(
        self,
        values: Tensor,
        first_received: int,
        send: DeviceRows,
        rows: RowExchange,
        moment: Moment,
        step: _Step,
        what: str,
    ) -> None:
        number = step.plan.step
        num_bytes = len(rows.send) * values.shape[1] * values.element_size()
        self._communicator.note_sent(num_bytes, moment=moment, step=number)
        self._way.exchange(
            values, first_received, send, rows, moment=moment, step=number, what=what
        )


class _BackgroundThread:
    """Work behind a CPU's compute, one after the other, up to the first that fails."""

    def __init__(self) -> None:
        self._thread = Workers("bagpipe-exchange")
        self._failure: BaseException | None = None

    def start(self, work: Callable[..., None], *arguments: Any) -> Callable[[], object]:
        """Hands out a call; what is returned waits for it and raises what it raised."""
        return self._thread.submit(self._do, work, *arguments).result

    def _do(self, work: Callable[..., None], *arguments: Any) -> None:
        # A failed call has left messages out. Other ranks would take those of the next call for
        # them, and gloo ends a process that is sent more than it waits for.
        if self._failure is not None:
            raise self._failure
        try:
            work(*arguments)
        except BaseException as failure:
            self._failure = failure
            raise

    def close(self, *, wait: bool) -> None:
        self._thread.close(wait=wait)


class _BackgroundStream:
    """Work behind a GPU's compute: after that of the last tick, beside what is issued next."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._stream: torch.cuda.Stream = torch.cuda.Stream(streams.compute.device)

    def start(self, work: Callable[..., None], *arguments: Any) -> Callable[[], object]:
        """Asks the device for it; what is returned lets the current stream follow it."""
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._streams.computed)
            work(*arguments)
            done = self._stream.record_event()
        return partial(_follow, done, self._stream.device)

    def close(self, *, wait: bool) -> None:
        """Nothing to end: the executor waits for the device."""


def _follow(event: torch.cuda.Event, device: torch.device) -> None:
    torch.cuda.current_stream(device).wait_event(event)


def _of(exchange: GroupExchange | None) -> GroupExchange:
    assert exchange is not None
    return exchange
