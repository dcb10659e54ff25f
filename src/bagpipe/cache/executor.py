"""Executes plans: moves records between stores and the device cache, ahead of their use and behind it.

Tick t is the moment just before the compute of step t, when that of step t - 1 has been issued. At each tick the trainer's thread
hands out what is due (the late transfers of step t, then the early ones of later steps) and goes on:

    evict   evicted slots -> packed buffer -> pinned host buffer   on CUDA the trainer's thread asks the device for it
            -> store                                               write-back thread
    fetch   store -> pinned staging buffer                         gather thread
            -> fetched slots                                       on CUDA the trainer's thread, once it is there

On a CPU, where copies are work, the gather thread does all but the store's part of an eviction.

The only waits of the trainer's thread are for the rows of the step that it is about to compute: for the early ones, asked for
`prefetch_depth` steps ago ("rows"), and for the late ones ("slots"). Before it reads the store, a fetch waits for the write-backs
that its fence names.

On CUDA both directions have a stream of their own. Evictions follow the compute issued so far, fills follow the evictions before
them, and compute follows the fills of its own step, all by events, so that the host waits for neither. Device work is asked for
by one thread, since threads that do so take turns for Python's lock: a thread of its own for the transfers took 1.5 ms a step, most
of it waiting (docs/results.md). Pinned and device buffers come from torch's caching allocators, which reuse a buffer once the
streams that it was used on are done with it.

A failure in a background thread is raised by the next call here, with its cause. On CUDA, forward and backward must run on the
stream that is current when the next batch is asked for.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bagpipe._jit import jit
from bagpipe._workers import Call, Workers
from bagpipe.cache.communicator import Communicator, TransferKind
from bagpipe.cache.device_cache import DeviceCache
from bagpipe.cache.device_plan import DevicePlan, DeviceTransfers, plan_to_device
from bagpipe.cache.exchange import Exchange
from bagpipe.cache.spans import span
from bagpipe.cache.streams import Streams
from bagpipe.errors import BackgroundError
from bagpipe.store.base import EmbeddingStore
from bagpipe.types import Int32Array, Int64Array, StepPlan, Transfers

_MAX_PENDING_WRITES = 64
"""Write-backs that may be waiting, each of one group and step; more would let a slow store fill the memory."""
_FLUSH_BLOCK_ROWS = 65_536


@dataclass(kw_only=True)
class Waits:
    """Seconds that the trainer's thread waited, added up over steps."""

    plan_s: float = 0.0
    rows_s: float = 0.0
    slots_s: float = 0.0
    replicas_s: float = 0.0  # of rows that other trainers own


@dataclass(kw_only=True)
class _Transfer:
    """A step's early or late transfers, handed out."""

    on_device: tuple[DeviceTransfers, ...]  # by group, as what is gathered
    gathered: Call[list[Tensor]]
    evicted: torch.cuda.Event | None  # what fills must wait for
    is_filled: bool = False


@dataclass(kw_only=True)
class _Pending:
    """A submitted step, up to the time that nothing reads its plan any more."""

    plan: StepPlan
    release: Callable[[], None] | None
    device_plans: tuple[DevicePlan, ...] = ()
    early: _Transfer | None = None
    late: _Transfer | None = None
    ready: torch.cuda.Event | None = None  # its rows, and its plan before them, are on the device
    computed: torch.cuda.Event | None = None  # after its compute, once it has ended


class Executor:
    """Runs one stream of plans against one cache and one store a group. Owned by one `EmbeddingBagCollection`."""

    def __init__(
        self, caches: Sequence[DeviceCache], stores: Sequence[EmbeddingStore], communicator: Communicator | None = None
    ) -> None:
        """`communicator` says that there are other trainers; plans are then those of its rank."""
        self.caches, self.stores = tuple(caches), tuple(stores)
        self._exchange = None if communicator is None else Exchange(communicator, caches)
        self.waits = Waits()
        self.current: tuple[DevicePlan, ...] | None = None
        """The plans of the step that is being computed, by group."""
        self._device = caches[0].device
        self._streams: Streams | None = Streams(self._device) if self._device.type == "cuda" else None
        self._rows_of_slots = [np.full(cache.num_slots, -1, np.int64) for cache in caches]  # the gather thread's
        self._gather_thread, self._write_thread = Workers("bagpipe-gather"), Workers("bagpipe-write-back")
        self._pending: deque[_Pending] = deque()
        self._writes: deque[tuple[int, Call[None]]] = deque()  # (tick, write-back)
        self._ended: deque[_Pending] = deque()  # steps whose plans the device may still read
        self._is_clean = True  # the stores hold everything
        self.at_close: list[Callable[[], None]] = []
        """Called at the end of `close`, when neither the threads nor the device read a plan any more."""

    def submit(self, plan: StepPlan, release: Callable[[], None] | None = None) -> None:
        """Takes the plan of the next step; to be called in order, `prefetch_depth` steps ahead where possible.

        `release` is called by the trainer's thread once nothing reads the plan's arrays any more, if that is before `close`.
        """
        self._pending.append(_Pending(plan=plan, release=release))

    def begin_step(self) -> None:
        """Tick of the oldest submitted step: issues what is due, then waits until that step can be computed."""
        pending = self._pending[0]
        tick = pending.plan.step
        with _naming(tick):
            self._finish_deferred(tick - 2)  # before their rows may be evicted, and their plans released
            self._release_ended(None if self._streams is None else self._streams.record_compute())
            # A plan that came too late to be issued ahead: its own early transfers still come before its late ones, which may
            # fill a slot that an early one empties. Early ones of later steps come last: they may fetch what this step's late
            # ones evict.
            self._issue_early(pending)
            self._exchange_behind(pending)
            if any(_moves_anything(group.late) for group in pending.plan.groups):
                self._issue_late(pending)
            for due in self._pending:
                if due.plan.early_tick <= tick:
                    self._issue_early(due)
            self._exchange_ahead(tick)
            self._raise_failed_writes()
            self._wait_for_rows(pending)
            for due in self._pending:
                if due.early is not None and due.early.gathered.has_succeeded:
                    self._fill(due, due.early)
        if self._streams is not None and pending.ready is not None:
            self._streams.compute.wait_event(pending.ready)
        self.current = pending.device_plans
        self._is_clean = False

    def is_current(self, plan: DevicePlan) -> bool:
        """Whether `plan` belongs to the step that is being computed."""
        return any(current is plan for current in self.current or ())

    def update(self, index: int, plan: DevicePlan, grads: Tensor) -> None:
        """Applies one optimizer step of group `index` with the gradient (B, F, D) of its lookup."""
        if self._exchange is None:
            self.caches[index].update(plan, grads)
        else:
            self._exchange.update(index, plan, grads)

    def end_step(self) -> None:
        """Says that the compute of the current step has been issued."""
        self.current = None
        self._ended.append(self._pending.popleft())

    def flush(self) -> None:
        """Writes every resident record to its store; rows stay in the cache. What is updated afterwards needs another flush."""
        if self._is_clean:
            return
        self._drain()
        if self._exchange is not None and self._ended:
            self._exchange.defer(self._ended[-1].plan)
            self._exchange.finish_deferred(self._ended[-1].plan.step)
        for cache, store, rows_of_slots in zip(self.caches, self.stores, self._rows_of_slots, strict=True):
            slots = np.flatnonzero(rows_of_slots >= 0).astype(np.int32)
            for begin in range(0, len(slots), _FLUSH_BLOCK_ROWS):
                block = slots[begin : begin + _FLUSH_BLOCK_ROWS]
                records = cache.read(torch.from_numpy(block).to(self._device)).cpu()
                store.write(rows_of_slots[block], records.numpy())
        if self._exchange is not None:
            self._exchange.communicator.barrier("waiting for all ranks to write their rows back")
        self._is_clean = self.current is None  # a step that is open may still update its rows

    def close(self) -> None:
        """Ends the background threads; what is not flushed is lost. Closing twice is allowed."""
        if self._exchange is not None:
            self._exchange.close()
        self._gather_thread.close()
        self._write_thread.close()
        if self._streams is not None:
            torch.cuda.synchronize(self._device)  # plans and the caches' memory are in use until then
        self._pending.clear()
        self._ended.clear()
        self.current = None
        while self.at_close:
            self.at_close.pop(0)()

    def _issue_early(self, pending: _Pending) -> None:
        """Hands out a step's early transfers and its plan's way to the device, unless that is done."""
        if pending.early is None:
            transfers = tuple(group.early for group in pending.plan.groups)
            pending.early = self._issue(pending, transfers, pending.plan.early_tick, self._plan_to_device)
            self._mark_written("early", pending.plan.step)

    def _issue_late(self, pending: _Pending) -> None:
        """Hands out the late transfers of the step that comes now."""
        transfers = tuple(group.late for group in pending.plan.groups)
        pending.late = self._issue(pending, transfers, pending.plan.step, self._late_slots_to_device)

    def _issue(
        self,
        pending: _Pending,
        transfers: tuple[Transfers, ...],
        tick: int,
        to_device: Callable[[_Pending], tuple[DeviceTransfers, ...]],
    ) -> _Transfer:
        """On CUDA evicts and hands out the fetches; on a CPU, where that is work, the gather thread does all of it."""
        if self._streams is None:
            done = self._gather_thread.submit(self._transfer_on_cpu, pending, transfers, tick, to_device)
            return _Transfer(on_device=(), gathered=done, evicted=None, is_filled=True)
        with torch.cuda.stream(self._streams.out):
            on_device = to_device(pending)
            self._streams.out.wait_event(self._streams.computed)
            self._evict_all(transfers, on_device, tick)
            evicted = self._streams.out.record_event()
        gathered = self._gather_thread.submit(self._gather, pending.plan, transfers)
        return _Transfer(on_device=on_device, gathered=gathered, evicted=evicted)

    def _transfer_on_cpu(
        self,
        pending: _Pending,
        transfers: tuple[Transfers, ...],
        tick: int,
        to_device: Callable[[_Pending], tuple[DeviceTransfers, ...]],
    ) -> list[Tensor]:
        """Runs on the gather thread. The compute that evictions must follow is over when it is asked for."""
        on_device = to_device(pending)
        self._evict_all(transfers, on_device, tick)
        self._fill_slots(on_device, self._gather(pending.plan, transfers))
        return []

    def _plan_to_device(self, pending: _Pending) -> tuple[DeviceTransfers, ...]:
        plan = pending.plan
        with span("plan"):
            moved = [
                plan_to_device(
                    group_plan,
                    step=plan.step,
                    batch_size=plan.batch_size,
                    num_features=len(cache.group.features),
                    device=self._device,
                )
                for group_plan, cache in zip(plan.groups, self.caches, strict=True)
            ]
        pending.device_plans = tuple(device_plan for device_plan, _ in moved)
        return tuple(slots for _, slots in moved)

    def _late_slots_to_device(self, pending: _Pending) -> tuple[DeviceTransfers, ...]:
        return tuple(DeviceTransfers.of(group.late, self._device) for group in pending.plan.groups)

    def _evict_all(self, transfers: Sequence[Transfers], on_device: Sequence[DeviceTransfers], tick: int) -> None:
        with span("evict"):
            for index, (moved, slots) in enumerate(zip(transfers, on_device, strict=True)):
                self._evict(index, moved, slots.evict_slots, tick)

    def _evict(self, index: int, transfers: Transfers, slots: Tensor, tick: int) -> None:
        """Reads the evicted slots into a packed buffer and hands it to the write-back thread."""
        if len(transfers.evict_rows) == 0:
            return
        records, copied = self.caches[index].read(slots), None
        if self._streams is not None:
            records = torch.empty(records.shape, pin_memory=True).copy_(records, non_blocking=True)
            copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            copied.record(self._streams.out)
        rows = transfers.evict_rows.copy()  # may be written later than the plan is released
        self._hand_to_writer(tick, self._write_back, index, rows, records, copied)

    def _hand_to_writer(self, tick: int, work: Callable[..., None], *arguments: Any) -> None:
        """Hands out a call to the write-back thread, once there are few enough, and forgets those that have succeeded."""
        if len(self._writes) >= _MAX_PENDING_WRITES:
            self._writes[0][1].result()
        while self._writes and self._writes[0][1].has_succeeded:
            self._writes.popleft()
        self._writes.append((tick, self._write_thread.submit(work, *arguments)))

    def _write_back(self, index: int, rows: Int64Array, records: Tensor, copied: torch.cuda.Event | None) -> None:
        """Runs on the write-back thread."""
        if copied is not None:
            copied.synchronize()
        with span("write_back"):
            self.stores[index].write(rows, records.numpy())

    def _gather(self, plan: StepPlan, transfers: Sequence[Transfers]) -> list[Tensor]:
        """Runs on the gather thread: after the write-backs of the fence reads each group's rows (n, record_width)."""
        fence = max(moved.fence_tick for moved in transfers)
        if self._exchange is not None and fence >= 0:
            # What other ranks evict up to the fence and this plan knows of, the early transfers of these steps do. Each waits for
            # earlier steps' alone, so ranks never wait for each other in a circle.
            depth = plan.step - plan.early_tick
            self._exchange.communicator.wait_written("early", min(fence + depth, plan.step - 1))
            self._exchange.communicator.wait_written("late", fence)
        for tick, write in list(self._writes):  # all that was evicted before these transfers is among them
            if tick <= fence:
                write.result()
        stagings = []
        for index, moved in enumerate(transfers):
            _note_moves(self._rows_of_slots[index], moved.evict_slots, moved.fetch_rows, moved.fetch_slots)
            staging = torch.empty(
                len(moved.fetch_rows), self.caches[index].group.record_width, pin_memory=self._streams is not None
            )
            if len(moved.fetch_rows):
                with span("gather"):
                    self.stores[index].fetch(moved.fetch_rows, staging.numpy())
            stagings.append(staging)
        return stagings

    def _finish_deferred(self, last_step: int) -> None:
        if self._exchange is not None:
            self._exchange.finish_deferred(last_step)

    def _exchange_behind(self, pending: _Pending) -> None:
        """Hands out what travels behind the compute of the step that comes now, after its own replicas that could come ahead."""
        if self._exchange is None:
            return
        self._ask_for_replicas(pending)
        if self._ended:
            self._exchange.defer(self._ended[-1].plan)
        if pending.plan.has_late:
            self._exchange.finish_deferred(pending.plan.step - 1)

    def _exchange_ahead(self, tick: int) -> None:
        """Hands out the next step's replicas, once all transfers that are due at this tick are issued."""
        if self._exchange is None:
            return
        self._mark_written("late", tick)
        if len(self._pending) > 1 and self._pending[1].early is not None:
            self._ask_for_replicas(self._pending[1])

    def _ask_for_replicas(self, pending: _Pending) -> None:
        assert self._exchange is not None
        assert pending.early is not None
        self._exchange.ask_for_replicas(pending.plan, pending.early.gathered.result)

    def _mark_written(self, kind: TransferKind, step: int) -> None:
        """Tells the other ranks once what has been issued so far is written."""
        if self._exchange is None:
            return
        mark = self._exchange.communicator.mark_written
        self._gather_thread.submit(self._hand_to_writer, step, mark, kind, step)  # on a CPU that thread evicts

    def _wait_for_rows(self, pending: _Pending) -> None:
        """Fills the rows of the step that comes now, and accounts for the time that they are not gathered yet."""
        assert pending.early is not None
        started = time.perf_counter()
        pending.early.gathered.result()
        rows_done = time.perf_counter()
        self.waits.rows_s += rows_done - started
        self._fill(pending, pending.early)
        if pending.late is not None:
            started = time.perf_counter()
            pending.late.gathered.result()
            self.waits.slots_s += time.perf_counter() - started
            self._fill(pending, pending.late)
        if self._exchange is not None:
            started = time.perf_counter()
            self._exchange.finish_replicas(pending.plan)
            self.waits.replicas_s += time.perf_counter() - started

    def _fill(self, pending: _Pending, transfer: _Transfer) -> None:
        """Puts gathered records into their slots, unless they are there."""
        if transfer.is_filled:
            return
        assert self._streams is not None
        assert transfer.evicted is not None
        transfer.is_filled = True
        with torch.cuda.stream(self._streams.into):
            self._streams.into.wait_event(transfer.evicted)
            self._fill_slots(transfer.on_device, transfer.gathered.result())
            pending.ready = self._streams.into.record_event()

    def _fill_slots(self, on_device: Sequence[DeviceTransfers], stagings: Sequence[Tensor]) -> None:
        with span("fetch"):
            for cache, slots, staging in zip(self.caches, on_device, stagings, strict=True):
                if len(staging):
                    cache.fill(slots.fetch_slots, staging.to(self._device, non_blocking=True))

    def _drain(self) -> None:
        """Waits for all issued transfers and write-backs, and raises what they raised."""
        for pending in self._pending:
            with _naming(pending.plan.step):
                for transfer in (pending.early, pending.late):
                    if transfer is not None:
                        transfer.gathered.result()
                        self._fill(pending, transfer)
        for tick, write in list(self._writes):
            with _naming(tick):
                write.result()
        if self._streams is not None:
            torch.cuda.synchronize(self._device)

    def _release_ended(self, computed: torch.cuda.Event | None) -> None:
        """Lets go of the plans of ended steps: on a CPU at once, on CUDA when the device has come to `computed`.

        Until then they are held, since the memory of a plan on the device belongs to another stream than the one that reads it.
        """
        for ended in self._ended:
            ended.computed = ended.computed or computed
        num_kept = 0 if self._exchange is None else 1  # gradients of the last one are on their way
        while len(self._ended) > num_kept and (self._ended[0].computed is None or self._ended[0].computed.query()):  # type: ignore[no-untyped-call]
            release = self._ended.popleft().release
            if release is not None:
                release()

    def _raise_failed_writes(self) -> None:
        for tick, write in list(self._writes):
            if write.has_failed:
                with _naming(tick):
                    write.result()


def _moves_anything(transfers: Transfers) -> bool:
    return len(transfers.evict_rows) > 0 or len(transfers.fetch_rows) > 0


@jit
def _note_moves(rows_of_slots: Int64Array, evict_slots: Int32Array, fetch_rows: Int64Array, fetch_slots: Int32Array) -> None:
    for slot in evict_slots:
        rows_of_slots[slot] = -1
    for index in range(len(fetch_slots)):
        rows_of_slots[fetch_slots[index]] = fetch_rows[index]


@contextmanager
def _naming(step: int) -> Iterator[None]:
    """Raises any failure inside as the cause of a BackgroundError."""
    try:
        yield
    except BackgroundError:
        raise
    except Exception as error:
        raise BackgroundError(f"moving embedding rows for step {step} failed: {error}") from error
