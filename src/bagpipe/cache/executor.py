"""Executes plans: says at each tick which records move, and when a step's rows are there.

Tick t is the moment just before the compute of step t, when that of step t - 1 has been issued. At
each tick the trainer's thread hands out what is due (the urgent transfers of step t, then the
overlapped ones of later steps) and goes on. `bagpipe.cache.transfers` moves them;
`bagpipe.cache.exchange` moves what passes between the caches of several trainers.

The trainer's thread waits only for the rows of the step that it is about to compute: for the
overlapped ones, asked for `prefetch_depth` steps ago ("rows"), for the urgent ones ("slots"), and
for those of other trainers ("replicas").

A failure in a background thread is raised by the next call here, with its cause. On CUDA, forward
and backward must run on the stream that is current when the next batch is asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
from torch import Tensor

from bagpipe.cache.device_cache import DeviceCache, UpdateRate
from bagpipe.cache.device_plan import DeviceGroup, DevicePlan, DeviceTransfers, urgent_to_device
from bagpipe.cache.exchange import exchange_with
from bagpipe.cache.graph_rows import GraphRows, RowsInGraphs
from bagpipe.cache.issued import naming_step
from bagpipe.cache.marks import marks_on
from bagpipe.cache.moved import MovedArray
from bagpipe.cache.movers import mover_for
from bagpipe.cache.overlap import Streams, for_user
from bagpipe.cache.pending import Pending
from bagpipe.cache.plan_rings import PlanMover
from bagpipe.cache.undivided import Undivided
from bagpipe.cache.waits import Waits
from bagpipe.distributed.alone import ALONE, Peers
from bagpipe.native.spans import span
from bagpipe.plan import HostStepPlan
from bagpipe.store.base import EmbeddingStore


class Executor:
    """Runs one stream of plans against each group's cache and store.

    Owned by one `EmbeddingBagCollection`.
    """

    def __init__(
        self,
        caches: Sequence[DeviceCache],
        stores: Sequence[EmbeddingStore],
        peers: Peers = ALONE,
        num_skipped: list[int] | None = None,
        stream: int = 1,
    ) -> None:
        """Makes the threads that move records.

        Args:
            caches: by group.
            stores: by group.
            peers: the other trainers; by default none. Plans are those of this one's rank.
            num_skipped: counts by group the steps without an update, and is kept up to date.
            stream: how many streams these stores have served, with this one.
        """
        self._num_skipped = [0] * len(caches) if num_skipped is None else num_skipped
        self._updated: set[int] = set()  # groups, in the step that is being computed
        self.caches, self.stores = tuple(caches), tuple(stores)
        self.waits = Waits()
        self.is_in_step = False
        """Whether a step is being computed."""
        self._current: tuple[DevicePlan, ...] | None = None  # once somebody has asked for it
        self.moved_along: tuple[Tensor, ...] = ()
        """What `submit` was given to move along with the current step's plan, on the device."""
        self._device = caches[0].device
        self._streams = Streams(self._device) if self._device.type == "cuda" else None
        self._exchange = exchange_with(peers, caches, self._streams)
        self.dense_average = self._exchange.dense_average
        """Averages the dense part's gradients by peer memory; None: no rows travel by it."""
        self._mover = mover_for(caches, stores, self._streams, marks_on(stores, stream))
        self._plans = PlanMover(caches, peers, self._streams, with_rows=self._mover.with_rows)
        self._pending: list[Pending] = []
        self._ended: list[Pending] = []  # steps whose plans may still be read
        self._num_kept = int(self._exchange.has_others)  # ended, their gradients on their way
        self._is_clean = True  # the stores hold everything
        self._undivided = Undivided()
        self._in_graph = RowsInGraphs(self.caches)
        self.at_close: list[Callable[[], None]] = [self._mover.give_memory_back]
        """Called at the end of `close`, when neither threads nor device read a plan any more."""

    def submit(
        self,
        plan: HostStepPlan,
        release: Callable[[], None] | None = None,
        along: Sequence[MovedArray] = (),
    ) -> None:
        """Takes the plan of the next step, in order, `prefetch_depth` steps ahead where possible.

        With several trainers all ranks must be equally far ahead of a step when it begins, since
        what they exchange depends on it.

        Args:
            plan: of this rank.
            release: called by the trainer's thread once nothing reads the arrays of `plan` and
                `along` any more, if that is before `close`.
            along: moves to the device with the plan, and is then in `moved_along`.
        """
        self._pending.append(Pending(plan=plan, release=release, along=along))

    def begin_step(self) -> None:
        """The tick of the oldest submitted step: issues what is due, then waits for its rows."""
        self._undivided.check()
        pending = self._pending[0]
        tick = pending.plan.step
        self._is_clean = False
        with naming_step(tick):
            self._exchange.begin_step(tick)
            self._note_computed()
            self._release_ended()
            # A plan that came too late to be issued ahead: its own overlapped transfers still come
            # before its urgent ones, which may fill a slot that an overlapped one empties.
            # Overlapped ones of later steps come last: they may fetch what this step's urgent ones
            # evict.
            self._issue_overlapped(pending)
            self._exchange.begin_replicas(pending.plan, partial(self._filled, pending))
            for group in pending.plan.groups:
                if len(group.urgent.evict_rows) or len(group.urgent.fetch_rows):
                    self._issue_urgent(pending)
                    break
            # Before the overlapped ones of later steps: other ranks may wait for it before they do
            # what those wait for.
            self._mover.mark("urgent", tick)
            for due in self._pending:
                if due.overlapped is None and due.plan.issue_tick <= tick:
                    self._issue_overlapped(due)
            self._mover.raise_failed_writes()
            self._wait_for_rows(pending)
            # Before replicas go out: urgent rows are among them.
            for transfers in (pending.overlapped, pending.urgent):
                if transfers is not None and transfers.filled is not None:
                    assert self._streams is not None
                    self._streams.compute.wait_event(transfers.filled)
            self._wait_for_replicas(pending)
            for due in self._pending:
                if (
                    due.overlapped is not None
                    and not due.overlapped.is_filled
                    and due.overlapped.gathered.has_succeeded
                ):
                    self._mover.fill(due.overlapped)
        self.is_in_step, self._current = True, None
        self.moved_along = for_user(pending.on_device[-1].along, self._streams)

    @property
    def current(self) -> tuple[DevicePlan, ...] | None:
        """The plans of the step that is being computed, by group; the same value throughout."""
        if self.is_in_step and self._current is None:
            self._exchange.send_urgent_replicas(self.step, self.undivided)
            self._current = tuple(group.plan for group in self._pending[0].on_device)
        return self._current

    def is_current(self, plan: DevicePlan) -> bool:
        """Whether `plan` belongs to the step that is being computed."""
        return any(current is plan for current in self.current or ())

    def update(self, index: int, plan: DevicePlan, grads: Tensor) -> None:
        """Applies one optimizer step of group `index` with the gradient (B, F, D) of its lookup."""
        number = plan.step + 1 - self._num_skipped[index]
        self._exchange.update(index, plan, grads, number=number)
        self._updated.add(index)

    def rows_in_graph(self) -> GraphRows | None:
        """The current step's rows for a graph, if it can find their plan."""
        if not self.caches[0].reads_rings or not self._exchange.fits_graph(self.step):
            return None
        pending = self._pending[0]
        return self._in_graph.of(
            pending.plan.step,
            pending.plan.batch_size,
            [group.rings for group in pending.on_device],
            partial(self._exchange.updates_in_graph, pending.plan, pending.on_device),
            self,
        )

    @contextmanager
    def receiving(self) -> Iterator[None]:
        """See `Books`."""
        with self.undivided():
            yield
            self._exchange.note_replicas(self.step)

    @contextmanager
    def training(self) -> Iterator[Sequence[UpdateRate]]:
        """See `Books`."""
        step = self.step
        with self.undivided():
            rates = [
                cache.rate_of(step + 1 - skipped)
                for cache, skipped in zip(self.caches, self._num_skipped, strict=True)
            ]
            yield rates
            self._exchange.note_update(step, rates)
            self._updated.update(range(len(self.caches)))

    def end_step(self) -> None:
        """Says that the compute of the current step has been issued."""
        self._exchange.end_step(self._pending[0].plan.step, self.undivided)
        ended, pending, updated = [*self._ended, self._pending[0]], self._pending[1:], set[int]()
        num_skipped = [
            count + (index not in self._updated) for index, count in enumerate(self._num_skipped)
        ]
        # Without a call between, so that no signal's handler sees a part of it.
        self._num_skipped[:], self._updated = num_skipped, updated
        self._ended, self._pending, self.is_in_step, self._current = ended, pending, False, None

    @property
    def step(self) -> int:
        """The number of the step that is being computed, or comes next."""
        return self._pending[0].plan.step

    def undivided(self) -> AbstractContextManager[None]:
        """For updates and for handing out transfers, see `Undivided`."""
        return self._undivided.of(self.step)

    def release_computed(self) -> None:
        """Waits for the device, up to the last tick, and lets go of its plans.

        The next plan may wait for their room.
        """
        for ended in self._ended:
            if ended.computed is not None:
                ended.computed.synchronize()
        self._release_ended()

    def flush(self) -> None:
        """Writes every resident record to its store; rows stay in the cache.

        What is updated afterwards needs another flush. After an interrupt it may be called again.

        Raises:
            UsageError: an interrupt came into `undivided` work.
        """
        self._undivided.check()
        if self._is_clean:
            return
        self._exchange.begin_flush()
        for pending in self._pending:
            with naming_step(pending.plan.step):
                for transfer in (pending.overlapped, pending.urgent):
                    if transfer is not None:
                        self._mover.fill(transfer)
        self._mover.finish_writes()
        if self._streams is not None:
            # whatever stream is current: what is sent next follows the steps' compute
            torch.cuda.synchronize(self._device)
            self._streams.record_compute()
        if self.is_in_step:
            self._exchange.send_urgent_replicas(self.step, self.undivided)
        self._exchange.finish_all(self._pending[0].plan.step if self.is_in_step else None)
        if self._streams is not None:
            torch.cuda.synchronize(self._device)
        self._mover.write_all()
        self._exchange.end_flush()
        self._is_clean = not self.is_in_step  # a step that is open may still update its rows

    def close(self, *, has_failed: bool = False) -> None:
        """Ends the background threads; what is not flushed is lost. Closing twice is allowed.

        After a failure with several trainers it waits for nothing, since the others may never send
        what a thread, or the device, waits for.
        """
        is_stuck = has_failed and self._exchange.has_others
        self._exchange.close(wait=not is_stuck)
        self._mover.close(wait=not is_stuck)
        if self._streams is not None and not is_stuck:
            # plans and the caches' memory are in use until then
            torch.cuda.synchronize(self._device)
        self._pending.clear()
        self._ended.clear()
        self._in_graph.let_go()
        self.is_in_step, self._current, self.moved_along = False, None, ()
        if is_stuck:
            self.at_close.clear()
        while self.at_close:
            self.at_close[0]()
            self.at_close.pop(0)

    def _issue_overlapped(self, pending: Pending) -> None:
        """Hands out a step's plan and its overlapped transfers, unless that is done."""
        if pending.overlapped is None:
            plan = pending.plan
            transfers = tuple(group.overlapped for group in plan.groups)
            to_device = partial(self._plan_to_device, pending)
            with self.undivided():
                pending.overlapped = self._mover.issue(plan, transfers, plan.issue_tick, to_device)
            self._mover.mark("overlapped", plan.step)

    def _issue_urgent(self, pending: Pending) -> None:
        """Hands out the urgent transfers of the step that comes now."""
        groups, with_rows = pending.plan.groups, self._mover.with_rows
        transfers = tuple(group.urgent for group in groups)
        to_device = partial(urgent_to_device, groups, self._device, with_rows=with_rows)
        with self.undivided():
            pending.urgent = self._mover.issue(
                pending.plan, transfers, pending.plan.step, to_device
            )

    def _plan_to_device(self, pending: Pending) -> tuple[DeviceTransfers, ...]:
        with span("plan"):
            pending.on_device = self._plans.move(pending.plan, pending.along)
        return tuple(group.overlapped for group in pending.on_device)

    def _wait_for_replicas(self, pending: Pending) -> None:
        """Waits for the replicas of the step that comes now, and asks for those of the next one."""
        started = time.perf_counter()
        self._exchange.finish_replicas(pending.plan)
        self.waits.replicas_s += time.perf_counter() - started
        following = self._pending[1] if len(self._pending) > 1 else None
        if following is None or following.overlapped is None:
            self._exchange.start_behind(pending.plan, None, tuple)
        else:
            filled = partial(self._filled, following)
            self._exchange.start_behind(pending.plan, following.plan, filled)

    def _filled(self, pending: Pending) -> Sequence[DeviceGroup]:
        """Waits until a step's overlapped rows are in their slots, on CUDA on the current stream.

        Returns its groups.
        """
        assert pending.overlapped is not None
        self._mover.fill(pending.overlapped)
        if pending.overlapped.filled is not None:
            assert self._streams is not None
            self._streams.current().wait_event(pending.overlapped.filled)
        return pending.on_device

    def _wait_for_rows(self, pending: Pending) -> None:
        """Fills the rows of the step that comes now, and accounts for waiting for them."""
        assert pending.overlapped is not None
        started = time.perf_counter()
        pending.overlapped.gathered.result()
        rows_done = time.perf_counter()
        self.waits.rows_s += rows_done - started
        self._mover.fill(pending.overlapped)
        if pending.urgent is not None:
            started = time.perf_counter()
            pending.urgent.gathered.result()
            self.waits.slots_s += time.perf_counter() - started
            self._mover.fill(pending.urgent)

    def _note_computed(self) -> None:
        """Lets what is issued from now on follow all compute so far.

        From now on only the device reads the plans of steps that have ended.
        """
        computed = None if self._streams is None else self._streams.record_compute()
        for index in range(len(self._ended) - self._num_kept):
            ended = self._ended[index]
            ended.is_over, ended.computed = True, ended.computed or computed

    def _release_ended(self) -> None:
        """Lets go of the plans of steps that are over, on CUDA once the device has computed them.

        Until then they are held, since the memory of a plan on the device belongs to another stream
        than the one that reads it.
        """
        while self._ended and self._ended[0].is_over:
            computed = self._ended[0].computed
            if computed is not None and not computed.query():
                break
            ended = self._ended.pop(0)
            for transfers in (ended.overlapped, ended.urgent):
                if transfers is not None:
                    self._mover.give_back(transfers)
            for group in ended.on_device:
                group.give_back()
            if ended.release is not None:
                ended.release()
