"""The oracle in a process of its own, so that reading and planning never wait for the trainer's GIL, nor it for theirs.

The child runs `plan_stream`; arrays of plans and batches come to the trainer in shared memory (`_wire`). Plans are used where they
lie, batches are copied out, since the user may keep them.

Shared memory is a file without a name (memfd), so that nothing is left behind whatever dies. It is cut into `num_places` places;
item k lies in place k modulo their number and stays until it is released, in order: that bounds how far the child runs ahead. When
an item does not fit, new places are cut behind the old ones, twice as large as it needs.

    child -> parent   messages of items, then the end or an error             over one
    parent -> child   one message for each item released, or the wish to stop   socket

If the child dies, the parent raises BackgroundError at the next step; if the parent dies, the child ends itself. Needs Linux.
"""

from __future__ import annotations

import atexit
import contextlib
import mmap
import multiprocessing
import os
import pickle
import select
import signal
import sys
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from multiprocessing import reduction
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, Generic, TypeVar

import numpy as np

from bagpipe._malloc import keep_freed_memory
from bagpipe.errors import BackgroundError, BagpipeError, ConfigError
from bagpipe.jagged import share_batch
from bagpipe.oracle._wire import Packed, Received, Region
from bagpipe.oracle.pipeline import BackgroundIterator
from bagpipe.oracle.stream import Deferred, Planned, StreamOptions, plan_stream
from bagpipe.types import UInt8Array

BatchT = TypeVar("BatchT")

_PLANS_AHEAD = 2
"""Finished plans that wait in the child."""
_STOP_TIMEOUT_S = 5.0
_SWITCH_INTERVAL_S = 2e-4
"""How long the stages' threads may keep each other waiting for the GIL; Python's own 5 ms are two steps."""
_RELEASED, _STOP = b"released", b"stop"  # to the child
_ITEM, _FAILURE = b"i", b"f"  # from it: what a message begins with


@dataclass(frozen=True, kw_only=True)
class _Failure:
    """What ended the stream; None: its natural end."""

    error: BaseException | None
    cause: BaseException | None
    trace: str


class OracleProcess(Generic[BatchT]):
    """Owns the child process; `items` yields what `plan_stream` yields there, from a thread of the caller's."""

    def __init__(
        self,
        batches: Iterable[BatchT | Deferred[BatchT]],
        options: StreamOptions,
        find_sparse: Callable[[BatchT], Any],
        share: Callable[[BatchT, int, int], BatchT] = share_batch,
        *,
        num_places: int,
        on_region: Callable[[UInt8Array], None] = lambda _: None,
    ) -> None:
        """Starts the child. `num_places` bounds the items not yet released; `on_region` is shown all shared memory before its use.

        Raises ConfigError when `batches` or `find_sparse` can't be sent to another process, or the system is not Linux.
        """
        if not hasattr(os, "memfd_create"):
            raise ConfigError(f"oracle = 'process' needs Linux, this is {sys.platform}: use oracle = 'thread'")
        self._on_region = on_region
        self._mapped: tuple[Region, UInt8Array] | None = None
        self._file = os.memfd_create("bagpipe-plans")
        self._connection, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("spawn").Process(
            target=_run_child, args=(theirs, batches, options, find_sparse, share, num_places), name="bagpipe-oracle"
        )
        self._stop = weakref.finalize(self, _stop, self._connection, self._process)
        # When the program ends multiprocessing waits for its processes, before finalizers run but after what is registered later.
        atexit.register(self._stop)
        try:
            self._process.start()
            theirs.close()  # so that the child's death ends the stream
            reduction.send_handle(self._connection, self._file, self._process.pid)
        except (AttributeError, TypeError, pickle.PicklingError) as error:
            self.stop()
            raise ConfigError(
                f"oracle = 'process': the batches can't be sent to another process ({error}): give an iterable that can be "
                "pickled, or use oracle = 'thread'"
            ) from error

    def items(self, *, copy_batches: bool = True) -> Iterator[Planned[BatchT]]:
        """Each planned batch, in order; raises what the child raised in its place.

        Without `copy_batches` a batch's arrays are good until the plan is released.
        """
        while True:
            message = self._receive()
            if isinstance(message, Received):
                planned, (batch, sparse) = message.load(self._place(message), copy_second=copy_batches)
                yield replace(planned, batch=batch, sparse=sparse, release=self._release)
            elif message.error is None:
                return
            else:
                if message.cause is not None:
                    message.cause.add_note(f"in the oracle process:\n{message.trace}")
                raise message.error from message.cause

    def stop(self) -> None:
        """Ends the child, which makes `items` end too. Stopping twice is allowed."""
        self._stop()
        atexit.unregister(self._stop)

    def close(self) -> None:
        """Gives the memory back; `items` must have ended and no plan may be in use."""
        self.stop()
        self._connection.close()
        os.close(self._file)
        self._mapped = None

    def _receive(self) -> Received | _Failure:
        try:
            message = self._connection.recv_bytes()
        except (EOFError, OSError) as error:
            if not self._stop.alive:  # it was told to
                return _Failure(error=None, cause=None, trace="")
            self._process.join(_STOP_TIMEOUT_S)
            raise BackgroundError(
                f"the oracle process ended by itself (exit code {self._process.exitcode}; -9: killed, perhaps for memory): its "
                "own messages, if any, are above; lower lookahead_memory, or resume from the last checkpoint"
            ) from error
        if message[:1] == _ITEM:
            return Received.of(message[1:])
        failure: _Failure = pickle.loads(message[1:])
        return failure

    def _release(self) -> None:
        with contextlib.suppress(OSError):  # the child has ended
            self._connection.send_bytes(_RELEASED)

    def _place(self, item: Received) -> UInt8Array:
        if self._mapped is None or self._mapped[0] != item.region:
            self._mapped = item.region, _map(self._file, item.region)
            self._on_region(self._mapped[1])
        return self._mapped[1][item.region.place(item.number)]


def _stop(connection: Connection, process: SpawnProcess) -> None:
    with contextlib.suppress(OSError):
        connection.send_bytes(_STOP)
    if process.pid is not None:
        process.join(_STOP_TIMEOUT_S)
        if process.is_alive():  # in the user's reader, which nothing else can interrupt
            process.kill()
            process.join()


def _run_child(
    connection: Connection,
    batches: Iterable[BatchT | Deferred[BatchT]],
    options: StreamOptions,
    find_sparse: Callable[[BatchT], Any],
    share: Callable[[BatchT, int, int], BatchT],
    num_places: int,
) -> None:
    """The child's main function."""
    keep_freed_memory()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    for number in (signal.SIGINT, signal.SIGTERM):  # the trainer decides when a run ends
        signal.signal(number, signal.SIG_IGN)
    file = reduction.recv_handle(connection)
    failure = _Failure(error=None, cause=None, trace="")
    plans = BackgroundIterator(plan_stream(batches, options, find_sparse, share), ahead=_PLANS_AHEAD, name="planner")
    sender = _Sender(connection, file, num_places)
    try:
        for planned in plans:
            if not sender.send(planned):
                return
    except BaseException as error:
        failure = _describe(error)
    finally:
        plans.close()
    with contextlib.suppress(OSError):
        connection.send_bytes(_FAILURE + pickle.dumps(failure))
        sender.wait_for_stop()


class _Sender:
    """Puts items into their places and describes them to the parent."""

    def __init__(self, connection: Connection, file: int, num_places: int) -> None:
        self._connection, self._file = connection, file
        self._region = Region(begin=0, place_bytes=0, num_places=num_places)
        self._memory = np.empty(0, np.uint8)  # the region's
        self._messages = select.poll()  # the connection's own poll takes twenty times as long
        self._messages.register(connection.fileno(), select.POLLIN)
        self._num_sent = self._num_released = 0

    def send(self, planned: Planned[Any]) -> bool:
        """Waits for the place that the item needs; False when the parent wants no more."""
        item = Packed.of(replace(planned, batch=None, sparse=None), (planned.batch, planned.sparse))
        if item.num_bytes > self._region.place_bytes:
            self._grow(item.num_bytes)
        if not self._wait_for_place():
            return False
        item.write(self._memory[self._region.place(self._num_sent)])
        try:
            self._connection.send_bytes(_ITEM + item.message(self._num_sent, self._region))
        except OSError:
            return False
        self._num_sent += 1
        return True

    def wait_for_stop(self) -> None:
        """Returns when the parent has said so, or is gone."""
        while self._take_message():
            pass

    def _wait_for_place(self) -> bool:
        while self._num_sent - self._num_released >= self._region.num_places or self._messages.poll(0):
            if not self._take_message():
                return False
        return True

    def _take_message(self) -> bool:
        try:
            message = self._connection.recv_bytes()
        except (EOFError, OSError):
            return False
        self._num_released += message == _RELEASED
        return message == _RELEASED

    def _grow(self, num_bytes: int) -> None:
        """Cuts new places; the old ones stay for the items that lie there."""
        place_bytes = -(-2 * num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        region = replace(self._region, begin=self._region.begin + self._region.num_bytes, place_bytes=place_bytes)
        try:
            os.posix_fallocate(self._file, region.begin, region.num_bytes)  # or a full memory would kill the process later
        except OSError as error:
            raise BackgroundError(
                f"the oracle process can't get {region.num_bytes:,} bytes of shared memory for {region.num_places} plans "
                f"({error}): use a smaller batch, or more memory"
            ) from error
        self._region, self._memory = region, _map(self._file, region)


def _map(file: int, region: Region) -> UInt8Array:
    return np.frombuffer(mmap.mmap(file, region.num_bytes, offset=region.begin), np.uint8)


def _describe(error: BaseException) -> _Failure:
    trace = "".join(traceback.format_exception(error))
    if not isinstance(error, BagpipeError):
        return _Failure(error=BackgroundError(f"the oracle process failed: {error!r}"), cause=_sendable(error), trace=trace)
    return _Failure(error=error, cause=None if error.__cause__ is None else _sendable(error.__cause__), trace=trace)


def _sendable(error: BaseException) -> BaseException:
    """The error, or where it can't be pickled its description."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a stranger's exception does
        return RuntimeError(repr(error))
    return error
