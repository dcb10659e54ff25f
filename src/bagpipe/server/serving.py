"""Whom a shard serves: one epoch's trainers, what they apply now, and how far they have written.

Nothing of another epoch is applied: messages are compared with the epoch at the moment at which
they read or write, so one that arrived before `Shard.begin` and is late does no harm. What is being
applied is counted, so that `begin` and `clear` can wait for it.

A rank's *mark* says how far its transfers have written what they evict. A fetch carries a *fence*
and waits until the marks of every rank have reached it: write before read is kept here, not by the
trainers.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from bagpipe.errors import StoreError
from bagpipe.server.wire import Header
from bagpipe.topology import MAX_TRAINERS

WAIT_TIMEOUT_S = 600.0
"""How long a fetch waits for the marks of all ranks, by default."""
APPLY_TIMEOUT_S = 120.0
"""How long `begin` and `clear` wait for what is being applied, by default."""


class Serving:
    """The state of that; any thread may call it.

    Attributes:
        lock: Guards it. Who holds it may call what says so.
        instance: Tells this life of the server from the one before a restart.
        epoch: The epoch that is served, None: none, or one is beginning.
        run: The run whose tables the shard holds.
    """

    def __init__(
        self,
        name: str,
        *,
        wait_timeout_s: float = WAIT_TIMEOUT_S,
        apply_timeout_s: float = APPLY_TIMEOUT_S,
    ) -> None:
        """Serves nobody before an epoch is opened.

        Args:
            name: The server's, as errors begin with it.
            wait_timeout_s: How long a fetch waits for marks.
            apply_timeout_s: How long what is being applied is waited for.
        """
        self.lock = threading.Condition()
        self.instance = secrets.token_hex(16)
        self.epoch: int | None = None
        self.run = ""
        self._name = name
        self._wait_timeout_s, self._apply_timeout_s = wait_timeout_s, apply_timeout_s
        self._newest_epoch = -1
        self._marks = np.empty((0, 2), np.int64)  # by rank: overlapped, urgent
        self._writing_ranks: set[int] = set()
        self._num_reads = self._num_writes = 0  # that are being applied
        self._is_closed = False

    def end_before(self, epoch: int, num_ranks: int, run: str) -> None:
        """Ends the epoch before, so that this one may begin; what waits for marks fails.

        Raises:
            StoreError: It is not above all before it, or of another run.
        """
        with self.lock:
            if self._is_closed:
                raise self._closed()
            if not 1 <= num_ranks <= MAX_TRAINERS:
                raise self.error(
                    f"an epoch of {num_ranks} trainers, must be from 1 to {MAX_TRAINERS}"
                )
            if self._newest_epoch >= 0 and run != self.run:
                raise self.error(
                    f"holds the tables of run {self.run!r}, not of {run!r}: restart it, or give "
                    "each run servers of its own"
                )
            if epoch <= self._newest_epoch:
                raise self.error(
                    f"epoch {epoch} can't begin, since epoch {self._newest_epoch} has: newer "
                    "trainers have taken the run over; start these again"
                )
            self._newest_epoch, self.run, self.epoch = epoch, run, None
            self.lock.notify_all()

    def open(self, epoch: int, num_ranks: int) -> None:
        """Serves an epoch from now on; its caller holds the lock."""
        self._marks = np.full((num_ranks, 2), -1, np.int64)
        self._writing_ranks = set()
        self.epoch = epoch

    def check_newest(self, epoch: int) -> None:
        """Raises StoreError where a newer epoch has begun; no lock is needed."""
        if self._is_closed:
            raise self._closed()
        if epoch != self._newest_epoch:
            raise self.error(
                f"epoch {epoch} ended while it began, since epoch {self._newest_epoch} has begun"
            )

    def claim_writes(self, header: Header) -> None:
        """See `Shard.claim_writes`."""
        with self.lock:
            self.check_header(header)
            if header.rank in self._writing_ranks:
                raise self.error(
                    f"rank {header.rank} has had its stream of writes in epoch {header.epoch}: "
                    "start all trainers again"
                )
            self._writing_ranks.add(header.rank)

    def mark(self, header: Header) -> None:
        """See `Shard.mark`."""
        steps = (header.steps.overlapped, header.steps.urgent)
        with self.lock:
            self.check_header(header)
            marks = self._marks[header.rank]
            if (marks < steps).any():
                np.maximum(marks, steps, out=marks)
                self.lock.notify_all()

    def wait_for_marks(self, header: Header) -> None:
        """Waits until all ranks have reached a header's fence.

        Raises:
            StoreError: A rank does not within `wait_timeout_s`, or the epoch is not served.
        """
        fence = (header.steps.overlapped, header.steps.urgent)
        with self.lock:
            self.check_header(header)
            reached = self.lock.wait_for(
                lambda: self.epoch != header.epoch or bool((self._marks >= fence).all()),
                self._wait_timeout_s,
            )
            self.check_header(header)
            if not reached:
                late = np.flatnonzero((self._marks < fence).any(axis=1))
                marks = self._marks[late[0]].tolist()
                raise self.error(
                    f"rank {header.rank} of epoch {header.epoch} waited {self._wait_timeout_s:g} s "
                    f"for rank {late[0]} to write what its overlapped and urgent transfers up to "
                    f"steps {fence[0]} and {fence[1]} evict; it has come to {marks[0]} and "
                    f"{marks[1]}: see why it stands still, and start all trainers again"
                )

    @contextmanager
    def applying(self, header: Header, *, writes: bool) -> Iterator[None]:
        """Around what reads or writes records; compares the epoch at that moment."""
        with self.lock:
            self.check_header(header)
            self._num_writes += writes
            self._num_reads += not writes
        try:
            yield
        finally:
            with self.lock:
                self._num_writes -= writes
                self._num_reads -= not writes
                self.lock.notify_all()

    def wait_until_idle(self, why: str, *, reads: bool = True, of_epoch: int | None = None) -> None:
        """Waits, with the lock, until nothing is being written, nor read.

        Args:
            why: What comes then, for the error.
            reads: Whether reads are waited for.
            of_epoch: That which begins then; it need not wait once a newer one has begun.

        Raises:
            StoreError: Something does not end within `apply_timeout_s`, or a newer one has begun.
        """

        def is_idle() -> bool:
            return not self._num_writes and not (reads and self._num_reads)

        def is_over() -> bool:
            return self._is_closed or of_epoch not in (None, self._newest_epoch)

        is_in_time = self.lock.wait_for(lambda: is_idle() or is_over(), self._apply_timeout_s)
        if of_epoch is not None:
            self.check_newest(of_epoch)
        if not is_in_time:
            raise self.error(
                f"{self._num_writes} writes and {self._num_reads} reads have not ended within "
                f"{self._apply_timeout_s:g} s, which must be before {why}: restart this server"
            )

    def check_header(self, header: Header) -> None:
        """Refuses, with the lock, what is of another instance or epoch, or of no rank."""
        if self._is_closed:
            raise self._closed()
        if header.instance != self.instance:
            raise self.error(
                f"rank {header.rank} of epoch {header.epoch} speaks to another life of this "
                "server, which was restarted: start all trainers again"
            )
        self.check_epoch(header.epoch, f"rank {header.rank} of ")
        if header.rank >= len(self._marks):
            raise self.error(
                f"epoch {self.epoch} has {len(self._marks)} trainers and no rank {header.rank}"
            )

    def check_epoch(self, epoch: int, who: str = "") -> None:
        """Refuses, with the lock, what is of another epoch."""
        if self._is_closed:
            raise self._closed()
        if epoch != self.epoch:
            served = "no epoch" if self.epoch is None else f"epoch {self.epoch}"
            raise self.error(
                f"{who}epoch {epoch} is not served, {served} is: trainers of another start are at "
                "work, or the server was restarted; start all trainers again"
            )

    def close(self) -> None:
        """Serves nobody any more, and ends what waits. Closing twice is allowed."""
        with self.lock:
            self._is_closed, self.epoch = True, None
            self.lock.notify_all()

    def error(self, what: str) -> StoreError:
        """One that names the server."""
        return StoreError(f"{self._name}: {what}")

    def _closed(self) -> StoreError:
        return self.error("is closed: start it again, then all trainers")
