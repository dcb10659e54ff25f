"""The oracle in a process of its own, so that reading and planning never wait for the trainer's GIL, nor it for theirs.

The child runs `plan_stream`; plans and batches come to the trainer as pickles whose arrays lie outside of them in shared memory
(pickle protocol 5). Plans are used where they lie, batches are copied out, since the user may keep them.

Shared memory is a file without a name (memfd), so that nothing is left behind whatever dies. It is cut into `num_places` places;
item k lies in place k modulo their number and stays until it is released, in order: that bounds how far the child runs ahead. When
an item does not fit, new places are cut behind the old ones, twice as large as it needs.

    child -> parent   descriptions of items, then the end or an error         over one
    parent -> child   one message for each item released, or the wish to stop   socket

If the child dies, the parent raises BackgroundError at the next step; if the parent dies, the child ends itself. Needs Linux.
"""

from __future__ import annotations

import atexit
import contextlib
import copyreg
import io
import mmap
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
import weakref
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import reduction
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from bagpipe._malloc import keep_freed_memory
from bagpipe._memory import copy_buffers
from bagpipe.errors import BackgroundError, BagpipeError, ConfigError
from bagpipe.oracle.pipeline import BackgroundIterator
from bagpipe.oracle.stream import Deferred, Planned, StreamOptions, plan_stream
from bagpipe.types import UInt8Array

BatchT = TypeVar("BatchT")

_ALIGNMENT = 256
_PLANS_AHEAD = 2
"""Finished plans that wait in the child."""
_STOP_TIMEOUT_S = 5.0
_SWITCH_INTERVAL_S = 2e-4
"""How long the stages' threads may keep each other waiting for the GIL; Python's own 5 ms are two steps."""
_RELEASED, _STOP = b"released", b"stop"


@dataclass(frozen=True, kw_only=True)
class _Region:
    """Where the places lie in the shared file."""

    begin: int
    place_bytes: int
    num_places: int

    @property
    def num_bytes(self) -> int:
        return self.place_bytes * self.num_places


@dataclass(frozen=True, kw_only=True)
class _Item:
    """One planned batch as it crosses the socket: two pickles, and (offset, length) of each one's arrays in the item's place."""

    number: int
    region: _Region
    plan: bytes
    plan_spans: tuple[tuple[int, int], ...]
    batch: bytes
    batch_spans: tuple[tuple[int, int], ...]


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
        self._mapped: tuple[_Region, UInt8Array] | None = None
        self._file = os.memfd_create("bagpipe-plans")
        self._connection, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("spawn").Process(
            target=_run_child, args=(theirs, batches, options, find_sparse, num_places), name="bagpipe-oracle"
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
            if isinstance(message, _Failure):
                if message.error is None:
                    return
                if message.cause is not None:
                    message.cause.add_note(f"in the oracle process:\n{message.trace}")
                raise message.error from message.cause
            yield self._open(message, copy_batches)

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

    def _receive(self) -> _Item | _Failure:
        try:
            message: _Item | _Failure = self._connection.recv()
        except (EOFError, OSError) as error:
            if not self._stop.alive:  # it was told to
                return _Failure(error=None, cause=None, trace="")
            self._process.join(_STOP_TIMEOUT_S)
            raise BackgroundError(
                f"the oracle process ended by itself (exit code {self._process.exitcode}; -9: killed, perhaps for memory): its "
                "own messages, if any, are above; lower lookahead_memory, or resume from the last checkpoint"
            ) from error
        return message

    def _open(self, item: _Item, copy_batch: bool) -> Planned[BatchT]:
        place = self._place(item)
        plan_arrays = [place[begin : begin + length] for begin, length in item.plan_spans]
        batch_arrays = [place[begin : begin + length] for begin, length in item.batch_spans]
        if copy_batch:
            batch_arrays = [array.copy() for array in batch_arrays]
        planned: Planned[BatchT] = pickle.loads(item.plan, buffers=plan_arrays)
        batch, sparse = pickle.loads(item.batch, buffers=batch_arrays)
        return replace(planned, batch=batch, sparse=sparse, release=self._release)

    def _release(self) -> None:
        with contextlib.suppress(OSError):  # the child has ended
            self._connection.send_bytes(_RELEASED)

    def _place(self, item: _Item) -> UInt8Array:
        region = item.region
        if self._mapped is None or self._mapped[0] != region:
            self._mapped = region, _map(self._file, region)
            self._on_region(self._mapped[1])
        begin = item.number % region.num_places * region.place_bytes
        return self._mapped[1][begin : begin + region.place_bytes]


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
    num_places: int,
) -> None:
    """The child's main function."""
    keep_freed_memory()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    for number in (signal.SIGINT, signal.SIGTERM):  # the trainer decides when a run ends
        signal.signal(number, signal.SIG_IGN)
    file = reduction.recv_handle(connection)
    failure = _Failure(error=None, cause=None, trace="")
    plans = BackgroundIterator(plan_stream(batches, options, find_sparse), ahead=_PLANS_AHEAD, name="planner")
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
        connection.send(failure)
        sender.wait_for_stop()


class _Sender:
    """Puts items into their places and describes them to the parent."""

    def __init__(self, connection: Connection, file: int, num_places: int) -> None:
        self._connection, self._file = connection, file
        self._region = _Region(begin=0, place_bytes=0, num_places=num_places)
        self._memory = np.empty(0, np.uint8)  # the region's
        self._num_sent = self._num_released = 0

    def send(self, planned: Planned[Any]) -> bool:
        """Waits for the place that the item needs; False when the parent wants no more."""
        plan, plan_buffers = _pickled(replace(planned, batch=None, sparse=None))
        batch, batch_buffers = _pickled((planned.batch, planned.sparse))
        spans, num_bytes = _lay_out([*plan_buffers, *batch_buffers])
        if num_bytes > self._region.place_bytes:
            self._grow(num_bytes)
        if not self._wait_for_place():
            return False
        place = self._num_sent % self._region.num_places * self._region.place_bytes
        copy_buffers([*plan_buffers, *batch_buffers], self._memory[place:], [begin for begin, _ in spans])
        item = _Item(
            number=self._num_sent,
            region=self._region,
            plan=plan,
            plan_spans=tuple(spans[: len(plan_buffers)]),
            batch=batch,
            batch_spans=tuple(spans[len(plan_buffers) :]),
        )
        try:
            self._connection.send(item)
        except OSError:
            return False
        self._num_sent += 1
        return True

    def wait_for_stop(self) -> None:
        """Returns when the parent has said so, or is gone."""
        while self._take_message():
            pass

    def _wait_for_place(self) -> bool:
        while self._num_sent - self._num_released >= self._region.num_places or self._connection.poll():
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


def _describe_array(array: npt.NDArray[Any]) -> tuple[Any, ...]:
    """How to make an array again: by type and shape alone, since numpy's own way takes twice as long and the GIL all the while."""
    if array.dtype.isbuiltin != 1 or array.dtype.hasobject or array.nbytes == 0 or not array.flags.c_contiguous:
        return array.__reduce_ex__(pickle.HIGHEST_PROTOCOL)  # type: ignore[return-value]
    return _make_array, (array.dtype.char, array.shape, pickle.PickleBuffer(array))  # type: ignore[arg-type]


def _make_array(dtype: str, shape: tuple[int, ...], memory: memoryview) -> npt.NDArray[Any]:
    return np.frombuffer(memory, dtype).reshape(shape)


_REDUCERS: Any = ChainMap({np.ndarray: _describe_array}, copyreg.dispatch_table)


def _pickled(value: object) -> tuple[bytes, Sequence[memoryview]]:
    file, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
    pickler = pickle.Pickler(file, protocol=5, buffer_callback=buffers.append)
    pickler.dispatch_table = _REDUCERS
    pickler.dump(value)
    return file.getvalue(), [buffer.raw() for buffer in buffers]


def _lay_out(buffers: Sequence[memoryview]) -> tuple[list[tuple[int, int]], int]:
    """(offset, length) of each buffer in a place, and the bytes that the place needs."""
    spans, end = [], 0
    for buffer in buffers:
        spans.append((end, buffer.nbytes))
        end += -(-buffer.nbytes // _ALIGNMENT) * _ALIGNMENT
    return spans, max(end, 1)


def _map(file: int, region: _Region) -> UInt8Array:
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
