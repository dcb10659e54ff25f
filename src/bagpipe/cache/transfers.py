"""Moves records between stores and the device cache, as `bagpipe.cache.executor` asks at ticks.

    evict   evicted slots -> packed buffer -> pinned host buffer   (on CUDA) the trainer's thread
            -> store                                               write-back threads
    fetch   store -> pinned staging buffer                         gather threads
            -> fetched slots                                       (on CUDA) the trainer's thread

A step asks for the records of all its groups before it waits for any of them.

On a CPU, where copies are work, one thread evicts and asks, and one waits and fills. So a step's
evictions and requests go out while the records of the step before are still on their way. Before a
store in memory is read, a fetch waits for the write-backs that its fence names.

Several threads gather and write back, each the rows of a step of its own. Fences order what must be
in order. Threads that shared a step's rows would have to meet at its end, spinning on a core each.

On CUDA both directions have a stream of their own. Evictions follow the compute issued so far,
fills follow the evictions before them, and compute follows the fills of its own step, all by
events, so that the host waits for neither. Device work is asked for by one thread, since threads
that do so take turns for Python's lock: a thread of its own for the transfers took 1.5 ms a step,
most of it waiting (docs/results.md). Device buffers come from torch's caching allocator, which
reuses one on its own stream; those of the host from `bagpipe.cache.overlap`.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bagpipe.cache.device_cache import DeviceCache
from bagpipe.cache.device_plan import DeviceTransfers
from bagpipe.cache.issued import IssuedTransfers, naming_step
from bagpipe.cache.marks import Marks
from bagpipe.cache.overlap import Buffer, Staging, Streams
from bagpipe.distributed.communicator import Moment
from bagpipe.native.jit import jit
from bagpipe.native.spans import span
from bagpipe.native.workers import Call, Workers
from bagpipe.plan import HostStepPlan, Transfers
from bagpipe.store.base import NO_STEPS, EmbeddingStore, Steps, memory_of, sender_to
from bagpipe.types import Int32Array, Int64Array

_MAX_PENDING_WRITES = 64
"""Write-backs that may be waiting, each of one group and step.

More would let a slow store fill the memory."""
_FLUSH_BLOCK_BYTES = 8 << 20
_FLUSH_BLOCKS_UNDER_WAY = 2
"""Blocks of a flush that are on their way while the next one is read: with one alone a shard
server waits each time for a trainer that waits for it."""
_NUM_THREADS = max(1, min(2, (os.cpu_count() or 1) // 4))
"""That write back, and on CUDA as many that gather.

Random rows take a core milliseconds a step, most of it waiting for memory. But with more threads
the trainer's waits longer for Python's lock than it waits for rows with fewer (docs/results.md)."""


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """A step's records, asked for."""

    stagings: list[Buffer]  # by group (n, record_width)
    waits: ExitStack  # waits for all groups when it is left, whatever fails before or among them
    fence: Steps


class RecordMover:
    """Owns the threads that gather and write back.

    Its methods are called by the trainer's thread.
    """

    with_rows = False
    """Whether the device needs the rows that move, beside their slots."""

    def __init__(
        self,
        caches: Sequence[DeviceCache],
        stores: Sequence[EmbeddingStore],
        streams: Streams | None,
        marks: Marks | None,
    ) -> None:
        """`streams` are those of a CUDA device; `marks` those of stores that go by them."""
        self._caches, self._stores = tuple(caches), tuple(stores)
        self._sends = tuple(map(sender_to, stores))
        self._streams, self._marks, self._device = streams, marks, caches[0].device
        self._rows_of_slots = [np.full(cache.num_slots, -1, np.int64) for cache in caches]
        self._to_note: deque[Sequence[Transfers]] = deque()  # in order of issue, not yet there
        self._noting = threading.Lock()
        # On a CPU one thread each takes steps in order, as the device's streams do elsewhere. On
        # CUDA one sends in order, where marks must come behind what has been sent.
        is_in_order = streams is None or marks is not None
        self._order_thread = Workers("bagpipe-in-order") if is_in_order else None
        self._gather_threads = Workers("bagpipe-gather", 1 if streams is None else _NUM_THREADS)
        self._write_threads = Workers("bagpipe-write-back", _NUM_THREADS)
        self._writes: deque[tuple[int, Call[None]]] = deque()  # (tick, write-back)
        self._stagings = [Staging(self._device, memory_of(store)) for store in stores]

    def issue(
        self,
        plan: HostStepPlan,
        transfers: Sequence[Transfers],
        tick: int,
        to_device: Callable[[], tuple[DeviceTransfers, ...]],
    ) -> IssuedTransfers:
        """On CUDA evicts and hands out the fetches; on a CPU threads do all of it.

        `to_device` moves the slots, by group, to the device. On a CPU the evicting thread calls it.
        """
        if self._streams is None:
            assert self._order_thread is not None
            self._to_note.append(transfers)
            asked = self._order_thread.submit(self._evict_and_ask, plan, transfers, tick, to_device)
            done = self._gather_threads.submit(self._receive_and_fill, asked)
            return IssuedTransfers(on_device=(), gathered=done, evicted=None, is_filled=True)
        with self._streams.on(self._streams.out):
            on_device = to_device()
            self._streams.let_out_follow()
            evicted = (
                self._evict_all(transfers, on_device, tick) or self._streams.out.record_event()
            )
        self._to_note.append(transfers)  # nothing that an interrupt could still prevent
        gathered = self._gather_threads.submit(self._gather, plan, transfers)
        return IssuedTransfers(on_device=on_device, gathered=gathered, evicted=evicted)

    def fill(self, issued: IssuedTransfers) -> None:
        """Puts gathered records into their slots, once; waits until they are gathered."""
        if issued.is_filled:
            issued.gathered.result()
            return
        assert self._streams is not None
        assert issued.evicted is not None
        stagings = issued.gathered.result()
        with self._streams.on(self._streams.into):
            self._streams.into.wait_event(issued.evicted)
            self._fill_slots(issued.on_device, stagings)
            issued.filled = self._streams.into.record_event()
        issued.is_filled = True

    def give_back(self, issued: IssuedTransfers) -> None:
        """Says that the device has filled a step's slots, by an event that it has reached."""
        for buffer in issued.gathered.result():
            buffer.give_back()

    def mark(self, kind: Moment, step: int) -> None:
        """Tells stores that go by marks that what has been issued is sent."""
        if self._marks is not None:
            assert self._order_thread is not None
            self._order_thread.submit(self._marks.mark, kind, step)

    def raise_failed_writes(self) -> None:
        """Raises what a write-back has raised."""
        for tick, write in list(self._writes):
            if write.has_failed:
                with naming_step(tick):
                    write.result()

    def finish_writes(self) -> None:
        """Waits for all write-backs of transfers that are gathered, and raises what they raised."""
        for tick, write in list(self._writes):
            with naming_step(tick):
                write.result()

    def write_all(self) -> None:
        """Writes every resident record to its store; no transfer may be under way."""
        under_way = deque[Callable[[], None]]()
        for index, cache in enumerate(self._caches):
            rows_of_slots = self._rows_of_slots[index]
            slots = np.flatnonzero(rows_of_slots >= 0).astype(np.int32)
            block_rows = max(1, _FLUSH_BLOCK_BYTES // cache.group.record_bytes)
            for begin in range(0, len(slots), block_rows):
                block = slots[begin : begin + block_rows]
                buffer = self._read(index, torch.from_numpy(block).to(self._device))
                if self._streams is not None:
                    self._streams.current().synchronize()
                sent = self._sends[index](rows_of_slots[block], buffer.array)
                under_way.append(partial(self._write_back, sent, buffer))
                if len(under_way) > _FLUSH_BLOCKS_UNDER_WAY:
                    under_way.popleft()()
        for sent in under_way:
            sent()

    def give_memory_back(self) -> None:
        """To the stores; nobody uses it any more."""
        for staging in self._stagings:
            staging.close()

    def close(self, *, wait: bool = True) -> None:
        """Ends the threads.

        Without `wait` they end by themselves, once what they wait for has come or failed.
        """
        if self._order_thread is not None:
            self._order_thread.close(wait=wait)
        for threads in (self._gather_threads, self._write_threads):
            threads.close(wait=wait)
        self._to_note.clear()

    def _evict_and_ask(
        self,
        plan: HostStepPlan,
        transfers: Sequence[Transfers],
        tick: int,
        to_device: Callable[[], tuple[DeviceTransfers, ...]],
    ) -> tuple[tuple[DeviceTransfers, ...], _Asked]:
        """Runs on the evicting thread.

        The compute that evictions must follow is over when it is asked for. No slot is emptied that
        is still to be filled, since a row leaves only after its use.
        """
        on_device = to_device()
        self._evict_all(transfers, on_device, tick)
        return on_device, self._ask(plan, transfers)

    def _receive_and_fill(
        self, evicted: Call[tuple[tuple[DeviceTransfers, ...], _Asked]]
    ) -> list[Buffer]:
        """Runs on the gather thread."""
        on_device, asked = evicted.result()
        stagings = self._receive(asked)
        self._fill_slots(on_device, stagings)
        for buffer in stagings:
            buffer.give_back()
        return []

    def _evict_all(
        self, transfers: Sequence[Transfers], on_device: Sequence[DeviceTransfers], tick: int
    ) -> torch.cuda.Event | None:
        """On CUDA returns what comes after all of it, if there is any."""
        with span("evict"):
            evicted = None
            for index, (moved, slots) in enumerate(zip(transfers, on_device, strict=True)):
                if len(moved.evict_rows):
                    evicted = self._evict(index, moved, slots.evict_slots, tick)
            return evicted

    def _evict(
        self, index: int, transfers: Transfers, slots: Tensor, tick: int
    ) -> torch.cuda.Event | None:
        """Reads the evicted slots into a packed buffer and hands it to the write-back thread."""
        buffer = self._read(index, slots)
        rows = transfers.evict_rows.copy()  # may be written later than the plan is released
        if self._streams is None:
            sent = self._sends[index](rows, buffer.array)
            self._hand_out(self._write_threads, tick, self._write_back, sent, buffer)
            return None
        copied = torch.cuda.Event(blocking=True)
        copied.record(self._streams.out)
        if self._order_thread is None:
            send: Callable[[], Callable[[], None]] = partial(
                self._send_copied, index, rows, buffer, copied
            )
        else:
            send = self._order_thread.submit(self._send_copied, index, rows, buffer, copied).result
        self._hand_out(self._write_threads, tick, self._write_back_copied, send, buffer)
        return copied

    def _read(self, index: int, slots: Tensor) -> Buffer:
        """Reads slots; on CUDA the buffer holds them once the current stream has come so far."""
        cache, staging = self._caches[index], self._stagings[index]
        buffer = staging.take(slots.shape[0], cache.group.record_width)
        records = cache.read(slots, None if self._streams else buffer.tensor)
        if self._streams is not None:
            buffer.tensor.copy_(records, non_blocking=True)
        return buffer

    def _hand_out(
        self, threads: Workers, tick: int, work: Callable[..., None], *arguments: Any
    ) -> None:
        """Hands out a write-back, once few enough of them wait.

        Forgets those that have succeeded.
        """
        if len(self._writes) >= _MAX_PENDING_WRITES:
            self._writes[0][1].result()
        while self._writes and self._writes[0][1].has_succeeded:
            self._writes.popleft()
        self._writes.append((tick, threads.submit(work, *arguments)))

    def _write_back(self, sent: Callable[[], None], buffer: Buffer) -> None:
        """Runs on a write-back thread; in a flush on the trainer's."""
        with span("write_back"):
            sent()
        buffer.give_back()

    def _write_back_copied(self, send: Callable[[], Callable[[], None]], buffer: Buffer) -> None:
        """Runs on a write-back thread; `send` sends, or waits for what does."""
        self._write_back(send(), buffer)

    def _send_copied(
        self, index: int, rows: Int64Array, buffer: Buffer, copied: torch.cuda.Event
    ) -> Callable[[], None]:
        """On CUDA sends records once they are on the host; returns what waits for the store."""
        copied.synchronize()
        return self._sends[index](rows, buffer.array)

    def _gather(self, plan: HostStepPlan, transfers: Sequence[Transfers]) -> list[Buffer]:
        """Runs on a gather thread, on CUDA."""
        return self._receive(self._ask(plan, transfers))

    def _ask(self, plan: HostStepPlan, transfers: Sequence[Transfers]) -> _Asked:
        """Asks for each group's rows, all before any is waited for."""
        fence, stagings = _fence_of(plan, transfers), []
        counted = fence if self._marks is None else self._marks.fence(fence)
        with ExitStack() as waits:  # what was asked for is borrowed until it has been waited for
            for index, (store, moved) in enumerate(zip(self._stores, transfers, strict=True)):
                rows, width = moved.fetch_rows, self._caches[index].group.record_width
                staging = self._stagings[index].take(len(rows), width)
                if len(rows):
                    waits.callback(_wait, store.ask(rows, staging.array, counted))
                stagings.append(staging)
            return _Asked(stagings=stagings, waits=waits.pop_all(), fence=fence)

    def _receive(self, asked: _Asked) -> list[Buffer]:
        """Runs on a gather thread: waits for what was asked for, behind its fence."""
        with asked.waits:
            # all that was evicted before these transfers is among them
            for tick, write in list(self._writes):
                if tick <= asked.fence.urgent:
                    write.result()
        self._note_moves()
        return asked.stagings

    def _note_moves(self) -> None:
        """Notes which rows the slots hold after what has been issued so far.

        Slots change hands in the order of issue, whichever thread notes it.
        """
        with self._noting:
            while self._to_note:
                for rows_of_slots, moved in zip(
                    self._rows_of_slots, self._to_note.popleft(), strict=True
                ):
                    _move_rows(
                        rows_of_slots, moved.evict_slots, moved.fetch_rows, moved.fetch_slots
                    )

    def _fill_slots(self, on_device: Sequence[DeviceTransfers], stagings: Sequence[Buffer]) -> None:
        with span("fetch"):
            for cache, slots, staging in zip(self._caches, on_device, stagings, strict=True):
                if staging.shape[0]:
                    cache.fill(
                        slots.fetch_slots, staging.tensor.to(self._device, non_blocking=True)
                    )


def _fence_of(plan: HostStepPlan, transfers: Sequence[Transfers]) -> Steps:
    """What must be written before these transfers read, of this rank and of others."""
    tick = max(moved.fence_tick for moved in transfers)
    if tick < 0:
        return NO_STEPS
    # What other ranks evict up to the tick and this plan knows of, the overlapped transfers of
    # these steps do. Each waits for earlier steps' alone, so ranks never wait for each other in a
    # circle.
    depth = plan.step - plan.issue_tick
    return Steps(overlapped=min(tick + depth, plan.step - 1), urgent=tick)


def _wait(wait: Callable[[], None]) -> None:
    with span("gather"):
        wait()


@jit
def _move_rows(
    rows_of_slots: Int64Array,
    evict_slots: Int32Array,
    fetch_rows: Int64Array,
    fetch_slots: Int32Array,
) -> None:
    for slot in evict_slots:
        rows_of_slots[slot] = -1
    for index in range(len(fetch_slots)):
        rows_of_slots[fetch_slots[index]] = fetch_rows[index]
