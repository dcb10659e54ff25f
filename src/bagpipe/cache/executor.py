"""Executes plans: moves records between stores and the device cache, ahead of their use and behind it.

Tick t is the moment just before the compute of step t, when that of step t - 1 has been issued. At each tick the trainer's thread
hands out work and goes on; three background threads do it, each in the order given:

    transfer thread   late transfers of step t, then the early ones of later steps that are due: evicted slots -> packed
                      buffer, staging buffer -> fetched slots; and the plan's arrays -> device
    gather thread     for the same: store -> staging buffer
    write-back thread packed buffer -> store

The only waits of the trainer's thread are for the transfers of the step that it is about to compute: for the early ones, issued
`prefetch_depth` steps ago ("rows"), and for the late ones ("slots"). Before it reads the store, a fetch waits for the write-backs
that its fence names. On CUDA both directions go through pinned memory on a stream of their own, ordered with the compute
stream by events, so that the host waits for neither. Pinned and device buffers come from torch's caching allocators, which reuse a
buffer once the streams that it was used on are done with it.

Positions, in steps: submitted >= issued >= transferred >= trained >= written back.

A failure in a background thread is raised by the next call here, with its cause. On CUDA, forward and backward must run on the
stream that is current when the next batch is asked for.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from bagpipe.cache.device_cache import DeviceCache
from bagpipe.cache.device_plan import DevicePlan, DeviceTransfers, plan_to_device
from bagpipe.cache.spans import span
from bagpipe.errors import BackgroundError
from bagpipe.store.base import EmbeddingStore
from bagpipe.types import Int64Array, StepPlan, Transfers

Result = TypeVar("Result")

_MAX_PENDING_WRITES = 64
"""Write-backs that may be waiting, each of one group and step; more would let a slow store fill the memory."""
_FLUSH_BLOCK_ROWS = 65_536


@dataclass(kw_only=True)
class Waits:
    """Seconds that the trainer's thread waited, added up over steps."""

    plan_s: float = 0.0
    rows_s: float = 0.0
    slots_s: float = 0.0


@dataclass(kw_only=True)
class _Pending:
    """A submitted step: its plan and, once issued, what the background threads are doing for it."""

    plan: StepPlan
    release: Callable[[], None] | None
    early: Future[_Transferred] | None = None
    late: Future[_Transferred] | None = None


@dataclass(frozen=True, kw_only=True)
class _Transferred:
    """The result of one step's early or late transfers; `ready` is what the compute stream must wait for on CUDA."""

    plans: tuple[DevicePlan, ...]  # by group, with the early transfers; empty with the late ones
    ready: torch.cuda.Event | None


class Executor:
    """Runs one stream of plans against one cache and one store a group. Owned by one `EmbeddingBagCollection`."""

    def __init__(self, caches: Sequence[DeviceCache], stores: Sequence[EmbeddingStore]) -> None:
        self.caches, self.stores = tuple(caches), tuple(stores)
        self.waits = Waits()
        self.current: tuple[DevicePlan, ...] | None = None
        """The plans of the step that is being computed, by group."""
        self._device = caches[0].device
        self._stream: torch.cuda.Stream | None = None
        if self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._compute_stream: torch.cuda.Stream | None = None
        self._rows_of_slots = [np.full(cache.num_slots, -1, np.int64) for cache in caches]
        self._transfer_thread = ThreadPoolExecutor(1, thread_name_prefix="bagpipe-transfer")
        self._gather_thread = ThreadPoolExecutor(1, thread_name_prefix="bagpipe-gather")
        self._issued: deque[tuple[int, Future[_Transferred]]] = deque()  # (tick, transfers) that may not have evicted yet
        self._write_thread = ThreadPoolExecutor(1, thread_name_prefix="bagpipe-write-back")
        self._pending: deque[_Pending] = deque()
        self._writes: deque[tuple[int, Future[None]]] = deque()  # (tick, write-back), appended by the transfer thread
        self._ended: list[Callable[[], None]] = []  # of steps that have ended since the last one began
        self._computing: deque[tuple[torch.cuda.Event, list[Callable[[], None]]]] = deque()  # of those that the device is still at
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
        computed = self._record_compute()
        self._release_ended(computed)
        # A plan that came too late to be issued ahead: its own early transfers still come before its late ones, which may fill
        # a slot that an early one empties. Early ones of later steps come last: they may fetch what this step's late ones evict.
        self._issue_early(pending, computed)
        if any(_moves_anything(group.late) for group in pending.plan.groups):
            pending.late = self._issue(pending.plan, tick, computed, is_late=True)
        for due in self._pending:
            if due.plan.early_tick <= tick:
                self._issue_early(due, computed)
        self._raise_failed_writes()
        assert pending.early is not None
        started = time.perf_counter()
        early = self._result(pending.early, pending.plan.step)
        rows_done = time.perf_counter()
        late = None if pending.late is None else self._result(pending.late, pending.plan.step)
        self.waits.rows_s += rows_done - started
        self.waits.slots_s += time.perf_counter() - rows_done
        self._wait_on_device(early, late)
        self.current = early.plans
        self._is_clean = False

    def _issue_early(self, pending: _Pending, computed: torch.cuda.Event | None) -> None:
        if pending.early is None:
            pending.early = self._issue(pending.plan, pending.plan.early_tick, computed, is_late=False)

    def _issue(self, plan: StepPlan, tick: int, computed: torch.cuda.Event | None, *, is_late: bool) -> Future[_Transferred]:
        """Hands a step's late or early transfers to the threads."""
        while self._issued and self._issued[0][1].done():
            self._issued.popleft()
        transfers = [group.late if is_late else group.early for group in plan.groups]
        gathered = self._gather_thread.submit(self._gather, transfers, tuple(self._issued))
        issued = self._transfer_thread.submit(self._transfer, plan, transfers, gathered, tick, computed, is_late=is_late)
        self._issued.append((tick, issued))
        return issued

    def is_current(self, plan: DevicePlan) -> bool:
        """Whether `plan` belongs to the step that is being computed."""
        return any(current is plan for current in self.current or ())

    def end_step(self) -> None:
        """Says that the compute of the current step has been issued."""
        self.current = None
        release = self._pending.popleft().release
        if release is not None:
            self._ended.append(release)

    def flush(self) -> None:
        """Writes every resident record to its store; rows stay in the cache. What is updated afterwards needs another flush."""
        if self._is_clean:
            return
        self._drain()
        for cache, store, rows_of_slots in zip(self.caches, self.stores, self._rows_of_slots, strict=True):
            slots = np.flatnonzero(rows_of_slots >= 0).astype(np.int32)
            for begin in range(0, len(slots), _FLUSH_BLOCK_ROWS):
                block = slots[begin : begin + _FLUSH_BLOCK_ROWS]
                records = cache.read(torch.from_numpy(block).to(self._device)).cpu()
                store.write(rows_of_slots[block], records.numpy())
        self._is_clean = self.current is None  # a step that is open may still update its rows

    def close(self) -> None:
        """Ends the background threads; what is not flushed is lost. Closing twice is allowed."""
        for pending in self._pending:
            for future in (pending.early, pending.late):
                if future is not None:
                    future.cancel()
        self._gather_thread.shutdown(wait=True, cancel_futures=True)
        self._transfer_thread.shutdown(wait=True, cancel_futures=True)
        self._write_thread.shutdown(wait=True, cancel_futures=True)
        if self._stream is not None:
            self._stream.synchronize()  # the caches' memory goes back to the compute stream's pool
        self._pending.clear()
        self.current = None
        while self.at_close:
            self.at_close.pop(0)()

    def _drain(self) -> None:
        """Waits for all issued transfers and write-backs, and raises what they raised."""
        for pending in self._pending:
            for future in (pending.early, pending.late):
                if future is not None:
                    self._result(future, pending.plan.step)
        for tick, write in list(self._writes):
            self._result(write, tick)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _transfer(
        self,
        plan: StepPlan,
        transfers: Sequence[Transfers],
        gathered: Future[list[Tensor]],
        tick: int,
        computed: torch.cuda.Event | None,
        *,
        is_late: bool,
    ) -> _Transferred:
        """Runs on the transfer thread: one step's late transfers, or its early ones and its plan's way to the device."""
        with self._on_side_stream(computed) as ready:
            with span("plan"):
                plans: tuple[DevicePlan, ...] = ()
                if is_late:
                    moves = [DeviceTransfers.of(moved, self._device) for moved in transfers]
                else:
                    plans, moves = self._plans_to_device(plan)
            with span("evict"):
                for index, (moved, on_device) in enumerate(zip(transfers, moves, strict=True)):
                    self._evict(index, moved, on_device.evict_slots, tick)
            with span("fetch"):
                for index, (moved, on_device, staging) in enumerate(zip(transfers, moves, gathered.result(), strict=True)):
                    self._fill(index, moved, on_device.fetch_slots, staging)
        return _Transferred(plans=plans, ready=ready)

    def _plans_to_device(self, plan: StepPlan) -> tuple[tuple[DevicePlan, ...], list[DeviceTransfers]]:
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
        return tuple(device_plan for device_plan, _ in moved), [transfers for _, transfers in moved]

    def _evict(self, index: int, transfers: Transfers, slots: Tensor, tick: int) -> None:
        """Reads the evicted slots into a packed buffer and hands it to the write-back thread."""
        if len(transfers.evict_rows) == 0:
            return
        records = self.caches[index].read(slots)
        self._rows_of_slots[index][transfers.evict_slots] = -1
        copied = None
        if self._stream is not None:
            records = torch.empty(records.shape, pin_memory=True).copy_(records, non_blocking=True)
            copied = self._stream.record_event()
        if len(self._writes) >= _MAX_PENDING_WRITES:
            self._writes[0][1].result()
        while self._writes and self._writes[0][1].done() and self._writes[0][1].exception() is None:
            self._writes.popleft()
        rows = transfers.evict_rows.copy()  # may be written later than the plan is released
        write = self._write_thread.submit(self._write_back, index, rows, records, copied)
        self._writes.append((tick, write))

    def _write_back(self, index: int, rows: Int64Array, records: Tensor, copied: torch.cuda.Event | None) -> None:
        """Runs on the write-back thread."""
        if copied is not None:
            copied.synchronize()
        with span("write_back"):
            self.stores[index].write(rows, records.numpy())

    def _gather(self, transfers: Sequence[Transfers], issued: Sequence[tuple[int, Future[_Transferred]]]) -> list[Tensor]:
        """Runs on the gather thread: reads each group's rows from its store (n, record_width), once their fence allows."""
        stagings = []
        for index, moved in enumerate(transfers):
            staging = torch.empty(len(moved.fetch_rows), self.caches[index].group.record_width, pin_memory=self._stream is not None)
            if len(moved.fetch_rows):
                self._await_fence(moved.fence_tick, issued)
                with span("gather"):
                    self.stores[index].fetch(moved.fetch_rows, staging.numpy())
            stagings.append(staging)
        return stagings

    def _await_fence(self, fence_tick: int, issued: Sequence[tuple[int, Future[_Transferred]]]) -> None:
        """Waits until all that was evicted up to `fence_tick`, by transfers issued before, is in the store."""
        for tick, transferred in issued:
            if tick <= fence_tick:
                transferred.result()
        for tick, write in list(self._writes):
            if tick <= fence_tick:
                write.result()

    def _fill(self, index: int, transfers: Transfers, slots: Tensor, staging: Tensor) -> None:
        """Puts gathered records into their slots."""
        if len(transfers.fetch_rows) == 0:
            return
        self.caches[index].fill(slots, staging.to(self._device, non_blocking=True))
        self._rows_of_slots[index][transfers.fetch_slots] = transfers.fetch_rows

    @contextmanager
    def _on_side_stream(self, computed: torch.cuda.Event | None) -> Iterator[torch.cuda.Event | None]:
        """Issues device work on the side stream, after `computed`; the event yielded is recorded at the end of it."""
        if self._stream is None or computed is None:
            yield None
            return
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(computed)
            yield ready
            ready.record(self._stream)

    def _release_ended(self, computed: torch.cuda.Event | None) -> None:
        """Releases the plans of ended steps: on a CPU at once, on CUDA when the device has come to `computed`."""
        if self._ended and computed is not None:
            self._computing.append((computed, self._ended))
        elif self._ended:
            for release in self._ended:
                release()
        self._ended = []
        while self._computing and self._computing[0][0].query():  # type: ignore[no-untyped-call]
            for release in self._computing.popleft()[1]:
                release()

    def _record_compute(self) -> torch.cuda.Event | None:
        """An event after all compute issued so far; None on a CPU, where it is done already."""
        if self._stream is None:
            return None
        self._compute_stream = torch.cuda.current_stream(self._device)
        computed: torch.cuda.Event = self._compute_stream.record_event()
        return computed

    def _wait_on_device(self, early: _Transferred, late: _Transferred | None) -> None:
        """Makes the compute stream, not the host, wait for the step's transfers."""
        if self._compute_stream is None:
            return
        for transferred in (early, late):
            if transferred is not None and transferred.ready is not None:
                self._compute_stream.wait_event(transferred.ready)
        for plan in early.plans:
            plan.record_stream(self._compute_stream)

    def _raise_failed_writes(self) -> None:
        for tick, write in list(self._writes):
            if write.done() and write.exception() is not None:
                self._result(write, tick)

    def _result(self, future: Future[Result], step: int) -> Result:
        """A background task's result; what it raised is raised here as the cause of a BackgroundError."""
        try:
            return future.result()
        except Exception as error:
            raise BackgroundError(f"moving embedding rows for step {step} failed: {error}") from error


def _moves_anything(transfers: Transfers) -> bool:
    return len(transfers.evict_rows) > 0 or len(transfers.fetch_rows) > 0
