"""What runs in the oracle process: it plans, and hands each trainer its own part of every step.

A step is sent once all trainers have a place for it, so the slowest one holds all back, and either
all get it or none. Once a trainer wants no more, or is gone, the others are told so behind what
they were sent before, and the process ends.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import replace
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import numpy as np

from bagpipe.errors import BackgroundError, BagpipeError, LostError
from bagpipe.feed.loader_states import LoaderStates
from bagpipe.feed.meeting import Door, Porch
from bagpipe.feed.noted import SpanWriter
from bagpipe.feed.seals import OpenBatches
from bagpipe.feed.stream import BatchAdapter, Deferred, Planned, StreamOptions, plan_stream
from bagpipe.feed.wire import FAILURE, ITEM, RELEASED, Failure, Packed, Region, map_region
from bagpipe.native.memory import keep_freed_memory
from bagpipe.native.pipeline import BackgroundIterator
from bagpipe.native.workers import Workers

BatchT = TypeVar("BatchT")

IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Signals that come to all processes of a job, while the trainers decide when a run ends."""
_PLANS_AHEAD = 2
"""Finished plans that wait here."""
_END_TIMEOUT_S = 5.0
_SWITCH_INTERVAL_S = 2e-4
"""How long the stages' threads may keep each other waiting for the GIL; Python's own 5 ms are two
steps."""


def run_child(
    first: Connection,
    door: Door | None,
    batches: Iterable[BatchT | Deferred[BatchT]],
    options: StreamOptions,
    adapter: BatchAdapter,
    num_places: int,
) -> None:
    """The process's main function; returns once a trainer wants no more, or is gone.

    Args:
        first: leads to the host's first rank, which sends its shared memory over it, and then the
            file of spans.
        door: where the host's other ranks come in; None if there are none.
        batches: global batches, read here.
        options: how to plan, for all ranks of the host.
        adapter: how batches are read.
        num_places: places for items in each trainer's shared memory.
    """
    keep_freed_memory()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED_SIGNALS)
    memory, spans = reduction.recv_handle(first), reduction.recv_handle(first)
    lines = _Lines(num_places, SpanWriter(spans))
    lines.add(_Line(options.topology.ranks[0], first, memory, num_places))
    if door is not None:
        failure = _admit_others(door, lines, options)
        if failure is not None:
            lines.end(failure)
            return
    threading.Thread(target=_end_by_force, args=(lines,), daemon=True).start()
    open_batches = OpenBatches()
    planned = plan_stream(batches, options, adapter, open_batches)
    plans = BackgroundIterator(planned, ahead=_PLANS_AHEAD, name="planner", on_item=lines.wake)
    states = batches if isinstance(batches, LoaderStates) else None
    try:
        lines.end(_send_all(plans, lines, open_batches, states))
        lines.wait_for_departure()
    finally:
        if not plans.close(timeout_s=_END_TIMEOUT_S):  # it waits for a reader that never returns
            os._exit(1)


def _send_all(
    plans: BackgroundIterator[Any],
    lines: _Lines,
    open_batches: OpenBatches,
    states: LoaderStates[Any] | None,
) -> Failure:
    """Sends all steps; returns why no more come."""
    try:
        while (departure := lines.wait_for(plans)) is None:
            step = next(plans, None)
            if step is None:
                return Failure(loader_end=b"" if states is None else states.packed_end())
            if states is not None:
                packed = states.packed(step[0].plan.step)
                step = tuple(replace(planned, loader_states=packed) for planned in step)
            departure = lines.send(step, open_batches)
            if departure is not None:
                break
        return departure
    except BaseException as error:  # whatever it is, it must reach the training loops
        return _describe(error)


def _admit_others(door: Door, lines: _Lines, options: StreamOptions) -> Failure | None:
    """Waits for all trainers; a failure if one does not come, or goes."""
    deadline = time.monotonic() + door.timeout_s
    with contextlib.closing(Porch(door)) as porch:
        while missing := [rank for rank in options.topology.ranks if rank not in lines.ranks]:
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                return Failure(
                    error=LostError(
                        f"rank {missing[0]} has not come to the oracle process within "
                        f"{door.timeout_s:.0f} s; that trainer may have ended, or failed before"
                    )
                )
            events, here = select.poll(), [each.fileno() for each in lines.connections]
            for number in (*porch.descriptors, *here):
                events.register(number, select.POLLIN)
            for number, _ in events.poll(1e3 * remaining_s):
                if number in here:
                    departure = lines.read(number)
                    if departure is not None:
                        return departure
                elif (guest := porch.admit(number)) is not None:
                    lines.add(_Line(guest.rank, guest.connection, guest.file, lines.num_places))
    return None


def _end_by_force(lines: _Lines) -> None:
    """Ends the process once a trainer is gone, even if the reader never returns.

    This thread sleeps until then.
    """
    events = select.poll()
    for connection in lines.connections:
        events.register(connection, 0)  # only when it hangs up
    gone = [number for number, _ in events.poll()]
    # beside this thread, which may wait for a trainer that does not read either
    threading.Thread(target=_exit_in_time, daemon=True).start()
    for number in gone:
        lines.end(lines.departure(number))


def _exit_in_time() -> None:
    """Gives the main thread some time to end the process by itself."""
    time.sleep(_END_TIMEOUT_S)
    os._exit(1)


class _Lines:
    """The ways to all trainers."""

    def __init__(self, num_places: int, spans: SpanWriter) -> None:
        self.num_places, self._spans = num_places, spans
        self._lines: dict[int, _Line] = {}  # by file descriptor
        self._messages = select.poll()  # a connection's own poll takes twenty times as long
        self._wake = os.eventfd(0)
        self._messages.register(self._wake, select.POLLIN)
        self._is_waiting = False  # for a plan
        self._writers: Workers | None = None  # one for each line but the first
        self._sending = threading.Lock()
        self._has_ended = False

    @property
    def ranks(self) -> list[int]:
        return [line.rank for line in self._lines.values()]

    @property
    def connections(self) -> list[Connection]:
        return [line.connection for line in self._lines.values()]

    def add(self, line: _Line) -> None:
        """Takes a line; lines are kept in the order of ranks, as plans are."""
        number = line.connection.fileno()
        self._lines = dict(
            sorted([*self._lines.items(), (number, line)], key=lambda item: item[1].rank)
        )
        self._messages.register(number, select.POLLIN)

    def wake(self) -> None:
        """Ends the waiting for a plan. The planner's thread calls it, so it must cost little."""
        if self._is_waiting:
            os.eventfd_write(self._wake, 1)

    def wait_for(self, plans: BackgroundIterator[Any]) -> Failure | None:
        """Waits for the next plan, or their end.

        Returns:
            What the other trainers shall hear, if one wants no more meanwhile.
        """
        while not plans.is_ready:
            self._is_waiting = True
            # asked again, since a plan that came before `_is_waiting` was set has woken nobody
            ready = [] if plans.is_ready else self._messages.poll()
            self._is_waiting = False
            for number, _ in ready:
                departure = self.read(number)
                if departure is not None:
                    return departure
        return None

    def send(self, step: Sequence[Planned[Any]], open_batches: OpenBatches) -> Failure | None:
        """Sends a step to all trainers, once each has a place for its item.

        Returns:
            What the other trainers shall hear, if one wants no more meanwhile: then nothing is
            sent.

        Raises:
            DataError: the loader has changed a batch.
        """
        lines = self._lines.values()
        items = [line.pack(planned) for line, planned in zip(lines, step, strict=True)]
        while ready := self._messages.poll(None if any(line.is_full for line in lines) else 0):
            for number, _ in ready:
                departure = self.read(number)
                if departure is not None:
                    return departure
        messages = self._write(items)
        for planned in step:  # now, since its arrays have been copied
            if planned.seal is not None:
                planned.seal.check()
        open_batches.end(step[0].plan.step)
        with self._sending:
            if not self._has_ended:
                for line, message in zip(lines, messages, strict=True):
                    line.send(message)
        return None

    def _write(self, items: Sequence[Packed]) -> list[bytes]:
        """Puts items into their places, side by side: copying takes longer than all else here.

        Returns their messages.
        """
        first, *others = self._lines.values()
        if self._writers is None:
            self._writers = Workers("bagpipe-writer", len(others))
        calls = [
            self._writers.submit(line.write, item)
            for line, item in zip(others, items[1:], strict=True)
        ]
        return [first.write(items[0]), *(call.result() for call in calls)]

    def read(self, number: int) -> Failure | None:
        """Reads what a trainer says.

        Returns:
            What the other trainers shall hear, if this one wants no more, or is gone.
        """
        if number == self._wake:
            os.eventfd_read(self._wake)
            return None
        line = self._lines[number]
        try:
            message = line.connection.recv_bytes()
        except (EOFError, OSError):
            return self.departure(number)
        if message == RELEASED:
            line.num_released += 1
            return None
        if self._spans.obeys(message):
            return None
        line.has_departed = True
        return Failure(
            error=LostError(
                f"rank {line.rank} has ended its stream of batches, so no more steps are planned"
            )
        )

    def departure(self, number: int) -> Failure:
        """What the other trainers shall hear of one that is gone."""
        line = self._lines[number]
        line.has_departed = True
        return Failure(
            error=LostError(
                f"rank {line.rank}'s connection to the oracle process closed: that trainer has "
                "ended"
            )
        )

    def end(self, failure: Failure) -> None:
        """Tells all trainers that nothing comes any more, and why; only the first call does."""
        with self._sending:
            if not self._has_ended:
                self._has_ended = True
                for line in self._lines.values():
                    line.send(FAILURE + pickle.dumps(Failure() if line.has_departed else failure))

    def wait_for_departure(self) -> None:
        """Returns when a trainer has ended its stream, or is gone."""
        while not any(line.has_departed for line in self._lines.values()):
            for number, _ in self._messages.poll():
                self.read(number)


class _Line:
    """The way to one trainer: a connection, and places in its shared memory."""

    def __init__(self, rank: int, connection: Connection, file: int, num_places: int) -> None:
        self.rank, self.connection = rank, connection
        self.num_released = 0
        self.has_departed = False  # wants no more, or is gone
        self._num_sent = 0
        self._file = file
        self._region = Region(begin=0, place_bytes=0, num_places=num_places)
        self._memory = np.empty(0, np.uint8)  # the region's

    @property
    def is_full(self) -> bool:
        """Whether no place is free."""
        return self._num_sent - self.num_released >= self._region.num_places

    def pack(self, planned: Planned[Any]) -> Packed:
        """Packs what the trainer gets, and makes places large enough for it."""
        item = Packed.of(
            replace(planned, batch=None, sparse=None, seal=None), (planned.batch, planned.sparse)
        )
        if item.num_bytes > self._region.place_bytes:
            self._grow(item.num_bytes)
        return item

    def write(self, item: Packed) -> bytes:
        """Puts an item into its place; returns the message that describes it."""
        item.write(self._memory[self._region.place(self._num_sent)])
        self._num_sent += 1
        return ITEM + item.message(self._num_sent - 1, self._region)

    def send(self, message: bytes) -> None:
        """Sends it to the trainer, if that still listens."""
        with contextlib.suppress(OSError):  # that its end has closed will be read soon
            self.connection.send_bytes(message)

    def _grow(self, num_bytes: int) -> None:
        """Cuts new places; the old ones stay for the items that lie there."""
        place_bytes = -(-2 * num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        region = replace(
            self._region, begin=self._region.begin + self._region.num_bytes, place_bytes=place_bytes
        )
        try:
            # else the process would be killed at a later write, if memory is full
            os.posix_fallocate(self._file, region.begin, region.num_bytes)
        except OSError as error:
            raise BackgroundError(
                f"the oracle process can't get {region.num_bytes:,} bytes of shared memory for "
                f"{region.num_places} plans ({error}): use a smaller batch, or more memory"
            ) from error
        self._region, self._memory = region, map_region(self._file, region)


def _describe(error: BaseException) -> Failure:
    """What trainers are told of an error here."""
    trace = "".join(traceback.format_exception(error))
    if not isinstance(error, BagpipeError):
        return Failure(
            error=BackgroundError(f"the oracle process failed: {error!r}"),
            cause=_sendable(error),
            trace=trace,
        )
    return Failure(
        error=error,
        cause=None if error.__cause__ is None else _sendable(error.__cause__),
        trace=trace,
    )


def _sendable(error: BaseException) -> BaseException:
    """The error, or where it can't be pickled its description."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a stranger's exception does
        return RuntimeError(repr(error))
    return error
