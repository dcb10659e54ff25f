"""The oracle in a process of its own, so that it and the trainer never wait for one GIL.

The child runs `plan_stream`. Arrays of plans and batches come to the trainer in shared memory
(`bagpipe.feed.wire`). Plans are used where they lie; batches are copied out, since the user may
keep them.

Shared memory is a file without a name (memfd), so that nothing is left behind whatever dies. It is
cut into `num_places` places; item k lies in place k modulo their number and stays until it is
released, in order: that bounds how far the child runs ahead. When an item does not fit, new places
are cut behind the old ones, twice as large as it needs.

    child -> trainer   messages of items, then the end or an error             over one
    trainer -> child   one message for each item released, or the wish to stop   socket

While the trainer records a trace, the child notes its spans for it (`bagpipe.feed.noted`).

Several trainers of one host share the child that the first of them starts. Each has a socket and
shared memory of its own, and gets its own plans and its own share of the batches
(`bagpipe.feed.child`). The others come to an address that the first tells them
(`bagpipe.feed.meeting`).

If the child dies, all trainers raise LostError at the next step. If a trainer dies or ends its
stream, the others raise it once they have used what they were sent, and the child ends itself.
All of this needs Linux.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from multiprocessing import reduction, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Generic, TypeVar

from bagpipe.errors import ConfigError, LostError
from bagpipe.feed.child import IGNORED_SIGNALS, run_child
from bagpipe.feed.meeting import Door, connect
from bagpipe.feed.noted import OracleSpans
from bagpipe.feed.stream import DEFAULT_ADAPTER, BatchAdapter, Deferred, Planned, StreamOptions
from bagpipe.feed.wire import ITEM, RELEASED, STOP, Failure, Received, Region, map_region
from bagpipe.native.fork import in_child
from bagpipe.types import UInt8Array

BatchT = TypeVar("BatchT")

_STOP_TIMEOUT_S, _KILL_TIMEOUT_S, _JOIN_TIMEOUT_S = 5.0, 5.0, 300.0
_LOOK_EVERY_S = 1.0
_CONTEXT: Any = multiprocessing.get_context("spawn")
"""How the child starts: as a program of its own, since a fork would copy locks that are held."""


class SharedOracle(Generic[BatchT]):
    """One trainer's end of an oracle process.

    `items` yields what is planned there; it runs in a thread of the caller's.
    """

    def __init__(
        self,
        connection: Connection,
        file: int,
        process: BaseProcess | None,
        on_region: Callable[[UInt8Array], object],
        stopped_timeout_s: float = _JOIN_TIMEOUT_S,
    ) -> None:
        """Takes all that it is given.

        Args:
            connection: leads to the process.
            file: the descriptor of this trainer's shared memory.
            process: the process, for the trainer that has started it; None for the others.
            on_region: is shown all shared memory before its use.
            stopped_timeout_s: how long the process may be stopped by a signal.
        """
        self._connection, self._process, self._on_region = connection, process, on_region
        self._stopped_timeout_s = stopped_timeout_s
        self._file: int | None = file
        self._mapped: tuple[Region, UInt8Array] | None = None
        self._is_stopped = False
        self.spans: OracleSpans | None = None
        """What notes the process's spans, for the trainer that has started it."""
        self.loader_end = b""
        """Where the loader is in the process, once `items` has ended; empty if it has no state."""
        self._stop_at_end = weakref.finalize(self, _stop, connection, process)
        # When the program ends, multiprocessing waits for its processes before finalizers run. What
        # is registered later than multiprocessing itself runs before that.
        atexit.register(self._stop_at_end)
        in_child(self, SharedOracle._let_go)

    @classmethod
    def join(
        cls,
        address: str,
        rank: int,
        *,
        on_region: Callable[[UInt8Array], object] = lambda _: None,
        join_timeout_s: float = _JOIN_TIMEOUT_S,
    ) -> SharedOracle[Any]:
        """Makes the end of a trainer other than its host's first; see `OracleProcess`.

        Raises:
            BackgroundError: nobody is at the address any more.
        """
        file = _shared_memory()
        try:
            connection = connect(address, rank, file, join_timeout_s)
        except BaseException:
            os.close(file)
            raise
        return cls(connection, file, None, on_region)

    def items(self, *, copy_batches: bool = True) -> Iterator[Planned[BatchT]]:
        """Yields each planned batch, in order; raises what the child raised in its place.

        Without `copy_batches` a batch's arrays are good until its plan is released.
        """
        while True:
            message = self._receive()
            if isinstance(message, Received):
                planned, (batch, sparse) = message.load(
                    self._place(message), copy_second=copy_batches
                )
                yield replace(planned, batch=batch, sparse=sparse, release=self._release)
            elif message.error is None:
                self.loader_end = message.loader_end
                return
            else:
                if message.cause is not None:
                    message.cause.add_note(f"in the oracle process:\n{message.trace}")
                raise message.error from message.cause

    def stop(self) -> None:
        """Ends the child, which makes `items` end too. Stopping twice is allowed."""
        self._is_stopped = True
        _stop(self._connection, self._process)  # what an interrupt leaves undone is done at the end
        self._forget_end()

    def close(self) -> None:
        """Gives the memory back. Closing twice is allowed.

        `items` must have ended, and no plan may be in use.
        """
        self.stop()
        self._connection.close()
        file, self._file = self._file, None
        if file is not None:
            os.close(file)
        self._mapped = None

    def _forget_end(self) -> None:
        self._stop_at_end.detach()
        atexit.unregister(self._stop_at_end)

    def _let_go(self) -> None:
        """Called in a forked child, whose end must not be the oracle's.

        Nor may it keep its end of the connection open: by its closing the oracle sees the trainer's
        death.
        """
        self._forget_end()
        self._connection.close()
        _leave(self._process)
        self._process = None

    def _receive(self) -> Received | Failure:
        try:
            self._wait_unless_stopped()
            message = self._connection.recv_bytes()
        except (EOFError, OSError) as error:
            if self._is_stopped:  # it was told to
                return Failure()
            raise LostError(f"the oracle process{self._fate()}: {_WHAT_TO_DO}") from error
        if message[:1] == ITEM:
            return Received.of(message[1:])
        failure: Failure = pickle.loads(message[1:])
        return failure

    def _wait_unless_stopped(self) -> None:
        """Waits for a message, if this trainer has started the process.

        A process that is stopped gives no other sign. Only time in which this process ran is
        counted: if it was stopped too, that time does not count.

        Raises:
            LostError: it has been stopped for too long.
        """
        stopped_s = 0.0
        while self._process is not None and not self._connection.poll(_LOOK_EVERY_S):
            is_stopped = _is_stopped(self._process)
            stopped_s = stopped_s + _LOOK_EVERY_S if is_stopped else 0.0
            if stopped_s >= self._stopped_timeout_s:
                raise LostError(
                    f"the oracle process (pid {self._process.pid}) has been stopped by a signal "
                    f"for {stopped_s:g} s: continue such a process sooner, or resume from the last "
                    "checkpoint"
                )

    def _fate(self) -> str:
        """How the process has ended, as far as this trainer can tell."""
        if self._process is None:
            return ", which the host's first rank started, ended by itself"
        self._process.join(_KILL_TIMEOUT_S)
        return (
            f" ended by itself (exit code {self._process.exitcode}; -9: killed, perhaps for memory)"
        )

    def _release(self) -> None:
        with contextlib.suppress(OSError):  # the child has ended
            self._connection.send_bytes(RELEASED)

    def _place(self, item: Received) -> UInt8Array:
        """The memory where an item lies, mapped once for all items of its region."""
        assert self._file is not None
        if self._mapped is None or self._mapped[0] != item.region:
            self._mapped = item.region, map_region(self._file, item.region)
            self._on_region(self._mapped[1])
        return self._mapped[1][item.region.place(item.number)]


class OracleProcess(SharedOracle[BatchT]):
    """The end of the trainer that starts the process: the only one, or its host's first."""

    def __init__(
        self,
        batches: Iterable[BatchT | Deferred[BatchT]],
        options: StreamOptions,
        adapter: BatchAdapter = DEFAULT_ADAPTER,
        *,
        num_places: int,
        on_region: Callable[[UInt8Array], object] = lambda _: None,
        join_timeout_s: float = _JOIN_TIMEOUT_S,
    ) -> None:
        """Starts the child.

        With several trainers it plans for all of this host, who `join` at `address`.

        Args:
            batches: global batches; the child reads them.
            options: how to plan.
            adapter: how batches are read.
            num_places: how many items may be sent and not yet released.
            on_region: is shown all shared memory before its use.
            join_timeout_s: how long the others may take to join, and the process may be stopped.

        Raises:
            ConfigError: `batches` or `adapter` can't be sent to another process, or the system is
                not Linux.
        """
        file, door = _shared_memory(), None
        self.address = ""
        topology = options.topology
        ranks = topology.ranks_of_host or tuple(range(topology.num_trainers))
        if len(ranks) > 1:
            door = Door.open(join_timeout_s)
            self.address = door.address
            options = replace(options, topology=replace(topology, ranks=ranks))
        ours, theirs = multiprocessing.Pipe()
        process = _CONTEXT.Process(
            target=run_child,
            args=(theirs, door, batches, options, adapter, num_places),
            name="bagpipe-oracle",
        )
        super().__init__(ours, file, process, on_region, join_timeout_s)
        spans = _shared_memory()
        self.spans = OracleSpans(spans, ours.send_bytes)
        try:
            with _signals_put_off():
                process.start()
            reduction.send_handle(ours, file, process.pid)
            reduction.send_handle(ours, spans, process.pid)
        except (AttributeError, TypeError, pickle.PicklingError) as error:
            self.close()
            raise ConfigError(
                f"oracle = 'process': the batches can't be sent to another process ({error}): give "
                "an iterable that can be pickled, or use oracle = 'thread'"
            ) from error
        finally:
            theirs.close()  # so that the child's death ends the stream
            if door is not None:
                door.listener.close()


_WHAT_TO_DO = (
    "its own messages, if any, are above; lower lookahead_memory, or resume from the last "
    "checkpoint"
)


def _is_stopped(process: BaseProcess) -> bool:
    """Whether a signal has stopped it; not whether it has ended."""
    try:
        return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def _shared_memory() -> int:
    """The descriptor of an empty file without a name."""
    if not hasattr(os, "memfd_create"):
        raise ConfigError(
            f"oracle = 'process' needs Linux, this is {sys.platform}: use oracle = 'thread'"
        )
    return os.memfd_create("bagpipe-plans")


@contextlib.contextmanager
def _signals_put_off() -> Iterator[None]:
    """Keeps signals from a process that is started inside, until `run_child` ignores them.

    torchrun and Ctrl-C send them to whole groups of processes.
    """
    resource_tracker.ensure_running()  # or `start` does it, and takes the signals back
    before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _stop(connection: Connection, process: BaseProcess | None) -> None:
    """Tells the child to stop, and ends it, by force if need be, where this trainer started it."""
    with contextlib.suppress(OSError):
        connection.send_bytes(STOP)
        # whoever receives here must not wait for a process that does not answer
        with socket.socket(fileno=os.dup(connection.fileno())) as end:
            end.shutdown(socket.SHUT_RD)
    if process is not None and process.pid is not None:
        process.join(_STOP_TIMEOUT_S)
        if process.is_alive():  # in the user's reader, which nothing else can interrupt
            process.kill()
            process.join(_KILL_TIMEOUT_S)
            if process.is_alive():
                _leave(process)
                warnings.warn(
                    f"the oracle process (pid {process.pid}) was killed, but does not end within "
                    f"{_KILL_TIMEOUT_S:.0f} s: its reader waits for the system, as for a mount "
                    "that is dead; it ends when that answers",
                    RuntimeWarning,
                    stacklevel=2,
                )


def _leave(process: BaseProcess | None) -> None:
    """Keeps multiprocessing from waiting for the process at the end of this one."""
    multiprocessing.process._children.discard(process)  # type: ignore[attr-defined]
