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
same messages in the same order. Where rows travel by peer memory, graphs hold the most of it
(`exchange_graph`); then `note_update` says what one has done.

Owned here: for each step that is not over its sums by group, with room behind them for the sums
received. Where plans lie in rings, two steps' sums take turns in the halves of one tensor.

A trainer without others has a `NoExchange`, which does the same to no effect: its gradients update
its own rows at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from torch import Tensor

from bagpipe.cache.averaging import PeerAverage
from bagpipe.cache.background import BackgroundStream, BackgroundThread
from bagpipe.cache.device_cache import DeviceCache, UpdateRate
from bagpipe.cache.device_plan import DeviceGroup, DevicePlan
from bagpipe.cache.exchange_graph import BehindGraph, SharedUpdate, are_same, lasting_rings
from bagpipe.cache.exchange_messages import RowMessages, of_plan
from bagpipe.cache.exchange_step import ExchangeStep, RowSums
from bagpipe.cache.graph_rows import GroupUpdate
from bagpipe.cache.no_exchange import Filled, NoExchange
from bagpipe.cache.overlap import Streams
from bagpipe.cache.plan_layout import HostPlanRings
from bagpipe.cache.ways import way_for
from bagpipe.distributed.alone import Alone, Peers
from bagpipe.distributed.communicator import Communicator
from bagpipe.native.spans import span
from bagpipe.plan import HostStepPlan


def exchange_with(
    peers: Peers, caches: Sequence[DeviceCache], streams: Streams | None
) -> Exchange | NoExchange:
    """The exchanges of one `Executor`.

    `streams` are those of a CUDA device. Raises UsageError while the communicator serves another
    stream of plans.
    """
    return NoExchange(caches) if isinstance(peers, Alone) else Exchange(peers, caches, streams)


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
        self._launcher = self._way.launcher  # what graphs exchange rows by, if they can
        self._messages = RowMessages(communicator, caches, self._way)
        self.dense_average = PeerAverage.by(self._launcher, communicator)
        self._background = BackgroundThread() if streams is None else BackgroundStream(streams)
        self._behind: BehindGraph | None = None
        self._sums = [cache.no_sums(0) for cache in self._caches]  # by group, of plans in rings
        self._steps: dict[int, ExchangeStep] = {}
        self._newest = 0  # step that has begun
        # On a GPU the host does not wait for rows, so one act a step tells all. On a CPU the update
        # must be told before its messages, or a rank that skips it would leave others waiting.
        self._tells_updates_later = streams is not None
        # Gradients of the step before are asked for when a step's own rows are there, as a GPU has
        # them in one graph with the next step's replicas. On a CPU they travel while the trainer's
        # thread waits for rows.
        self._defers_late = streams is not None
        self._untold = ""  # what was done since the last act

    def begin_step(self, number: int) -> None:
        """Compares what ranks have done since the last step, before anything of this one is sent.

        Ends what step `number` - 2 deferred, before its rows may be evicted and its plan released.
        """
        self._newest = number
        if self.dense_average is not None:
            self.dense_average.step = number
        self._communicator.tell(f"{self._untold}begins step {number}", needed_at=number + 1)
        self._untold = ""
        self._communicator.compare_acts(number)
        self.finish_deferred(number - 2)

    def begin_replicas(self, plan: HostStepPlan, filled: Filled) -> None:
        """Hands out what must travel before the transfers of `plan`'s step, which comes now.

        These are its own overlapped replicas, unless they could be asked for a step ago. They are
        sent once `filled` returns, which waits for the step's overlapped rows.
        """
        if plan.step not in self._steps:
            self._start(None, plan, filled)
        if plan.has_urgent or not self._defers_late:
            self.defer(plan.step - 1)
        if plan.has_urgent:
            self.finish_deferred(plan.step - 1)
            if self._streams is not None:
                self._streams.record_compute()  # urgent evictions follow what was deferred

    def finish_replicas(self, plan: HostStepPlan) -> None:
        """Waits for a step's overlapped replicas.

        Exchanges the urgent ones, too, unless a graph may do so.
        """
        step = self._steps[plan.step]
        assert step.finish_replicas is not None
        step.finish_replicas()
        if self._launcher is None:
            self._send_urgent_replicas(step)

    def send_urgent_replicas(
        self, number: int, undivided: Callable[[], AbstractContextManager[None]]
    ) -> None:
        """Exchanges those of step `number`, unless that is done; what it sends is `undivided`."""
        step = self._steps.get(number)  # a flush may have ended it
        if step is not None and not step.has_urgent_replicas:
            with undivided():
                self._send_urgent_replicas(step)

    def _send_urgent_replicas(self, step: ExchangeStep) -> None:
        self._messages.send_replicas(step, "urgent")
        step.has_urgent_replicas = True

    def start_behind(
        self, plan: HostStepPlan, following: HostStepPlan | None, filled: Filled
    ) -> None:
        """Hands out what travels behind the compute of `plan`'s step, which comes now.

        These are the gradients that the step before deferred, and replicas of the `following` step,
        if its overlapped rows have been asked for; `filled` waits for them.
        """
        before = self._steps.get(plan.step - 1)
        if before is not None and before.finish_deferred is not None:
            before = None
        if before is not None or following is not None:
            self._start(before, following, filled)

    def end_step(self, number: int, undivided: Callable[[], AbstractContextManager[None]]) -> None:
        """Sends what has come, where not all groups have gradients.

        No rank may wait for others in vain. What it sends is `undivided`.
        """
        self.send_urgent_replicas(number, undivided)
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
            self._messages.sync(step, "urgent")
        else:
            self._communicator.tell(act, needed_at=number + 1)

    def begin_flush(self) -> None:
        """Compares what the ranks have done: all must flush at the same step."""
        self._communicator.do_together(
            f"{self._untold}writes its rows back at step {self._newest} (for an evaluation, a "
            "checkpoint or a look into the tables, or since its batches are over)"
        )
        self._untold = ""

    def update(self, index: int, plan: DevicePlan, grads: Tensor, *, number: int) -> None:
        """Takes a step's gradients (B, F, D) of group `index`, for its `number`th update, from 1.

        Once all groups' are there, the urgent ones are exchanged and applied. The others wait for
        the next step.
        """
        step, cache = self._steps[plan.step], self._caches[index]
        is_last = len(step.sums) == len(self._caches) - 1
        if is_last:
            self._tell_update(step)
        with span("sum"):
            sums = self._sums_of(step, index)
            places = cache.places(sums.first, sums.first + len(plan.unique_slots))
            by_place = replace(plan, unique_slots=places)
            cache.sum_into(sums.values, by_place, grads, 1.0 / self._communicator.num_trainers)
        step.rates[index], step.sums[index] = cache.rate_of(number), sums
        if is_last:
            self._messages.sync(step, "urgent")

    def fits_graph(self, number: int) -> bool:
        """Whether a graph can hold what step `number` still exchanges."""
        return self._launcher is not None and not self._steps[number].has_urgent_replicas

    def updates_in_graph(
        self, plan: HostStepPlan, groups: Sequence[DeviceGroup], clock: Tensor
    ) -> list[GroupUpdate]:
        """How a graph updates rows, by group."""
        assert self._launcher is not None
        step, updates = self._steps[plan.step], list[GroupUpdate]()
        for index, (cache, group) in enumerate(zip(self._caches, groups, strict=True)):
            assert isinstance(group.rings, HostPlanRings)
            update = SharedUpdate(
                cache,
                group.rings,
                self._sums_of(step, index).values,
                clock,
                self._launcher,
                batch_size=plan.batch_size,
                num_trainers=self._communicator.num_trainers,
            )
            updates.append(update)
        return updates

    def note_replicas(self, number: int) -> None:
        """Says that what a graph holds has exchanged the urgent replicas of step `number`."""
        step = self._steps[number]
        if not step.has_urgent_replicas:
            self._messages.note_launched(step, "replicas_urgent")
            step.has_urgent_replicas = True

    def note_update(self, number: int, rates: Sequence[UpdateRate]) -> None:
        """Says that it has updated the rows of step `number`, too, all groups at their rates."""
        self.note_replicas(number)
        step = self._steps[number]
        self._tell_update(step)
        for index in range(len(self._caches)):
            step.sums[index], step.rates[index] = self._sums_of(step, index), rates[index]
        self._messages.note_launched(step, "sync_urgent")

    def _tell_update(self, step: ExchangeStep) -> None:
        lr, number = self._caches[-1].group.optimizer.lr, step.plan.step
        act = f"updates its rows in step {number} at the learning rate {lr!r}"
        if self._tells_updates_later:
            self._untold = f"{act}, then "
        else:
            self._communicator.tell(act, needed_at=number + 1)

    def defer(self, number: int) -> None:
        """Hands out the overlapped gradients of the computed step `number`, unless that is done."""
        step = self._steps.get(number)
        if step is not None and step.finish_deferred is None:
            self._start(step, None, tuple)

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
        if wait:  # else the device may still replay them
            self._behind = None
            if self.dense_average is not None:
                self.dense_average.let_go()
        self._communicator.end_stream(has_failed=not wait)

    def _start(
        self, before: ExchangeStep | None, following: HostStepPlan | None, filled: Filled
    ) -> None:
        """Hands out a step's deferred gradients, and overlapped replicas unless that is done."""
        after = None
        if following is not None and following.step not in self._steps:
            after = self._steps[following.step] = ExchangeStep(plan=following)
        if before is None and after is None:
            return
        finish = self._background.start(self._send_behind, before, after, filled)
        if before is not None:
            before.finish_deferred = finish
        if after is not None:
            after.finish_replicas = finish

    def _send_behind(
        self, before: ExchangeStep | None, after: ExchangeStep | None, filled: Filled
    ) -> None:
        if after is not None:
            after.on_device = filled()
        if before is not None and after is not None and self._replay_behind(before, after):
            return
        if before is not None:
            self._messages.sync(before, "overlapped")
        if after is not None:
            self._messages.send_replicas(after, "overlapped")

    def _replay_behind(self, before: ExchangeStep, after: ExchangeStep) -> bool:
        """Does both by a graph, if it can hold them."""
        rings = lasting_rings(after.on_device)
        if self._launcher is None or rings is None:
            self._behind = None  # what old rings take is needed for new ones
            return False
        is_whole = len(before.sums) == len(self._caches)
        if not is_whole or not are_same(rings, lasting_rings(before.on_device)):
            return False
        if self._behind is None or not are_same(rings, self._behind.rings):
            self._behind = BehindGraph(self._launcher, self._caches, rings, self._sums)
        self._behind.replay(before.plan.step, [rate for _, rate in sorted(before.rates.items())])
        self._messages.note_launched(before, "sync_overlapped")
        self._messages.note_launched(after, "replicas_overlapped")
        return True

    def _sums_of(self, step: ExchangeStep, index: int) -> RowSums:
        """Where a step's sums belong."""
        cache, group = self._caches[index], step.plan.groups[index]
        num_rows = step.on_device[index].sums_rows
        if num_rows == 0:  # not in rings
            return RowSums(
                values=cache.no_sums(group.num_uniques + of_plan(group.exchange).num_room), first=0
            )
        if len(self._sums[index]) != 2 * num_rows:
            self._sums[index] = cache.no_sums(2 * num_rows)
        return RowSums(values=self._sums[index], first=step.on_device[index].first_sum)
