"""One shard of every group, and who may read and write it: a shard server without its network.

An *epoch* is one start of all trainers. `begin` opens it. From then on nothing of another epoch is
applied: messages are compared with the epoch at the moment at which they read or write, so one that
arrived before `begin` and is late does no harm. `begin` waits for what is being applied, then puts
the stores back to the checkpoint from which the trainers start.

A rank's *mark* says how far its transfers have written what they evict. A fetch carries a *fence*
and waits until the marks of every rank have reached it: write before read is kept here, not by the
trainers.

One lock guards the state; copying is done outside it. What is being applied is counted, so that
`begin` and `clear` can wait for it.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np

from bagpipe.errors import StoreError
from bagpipe.native.jit import jit
from bagpipe.server.wire import Header, piece_rows
from bagpipe.store.base import EmbeddingStore
from bagpipe.topology import MAX_TRAINERS, shard_of
from bagpipe.types import Float32Array, Group, Int64Array

WAIT_TIMEOUT_S = 600.0
"""How long a fetch waits for the marks of all ranks, by default."""
APPLY_TIMEOUT_S = 120.0
"""How long `begin` and `clear` wait for what is being applied, by default."""


class CutStore(EmbeddingStore, Protocol):
    """The records of one group and shard, which can go back to the last committed cut."""

    def put_back(self, checkpoint: Path | None, *, is_base: bool) -> None:
        """Makes the records those of `checkpoint`, None: those at the start of a run.

        With `is_base` it is the last cut that was committed here, so that only rows written since
        need to be put back. A cut in hand is given up.

        Raises:
            StoreError, CheckpointError: Files can't be read; the records are then undefined.
        """

    def cut(self) -> None:
        """Takes the rows written since the base into a cut, as they are now; copies nothing."""

    def write_cut(self, folder: Path) -> object:
        """Writes the cut's records into `folder`; other threads may fetch and write meanwhile.

        Returns:
            What the manifest says of the file.
        """

    def committed(self) -> None:
        """The cut in hand is the base from now on."""

    def abandon(self) -> None:
        """The rows of the cut in hand count as written since the base again."""


class Shard:
    """The state of one shard server; any thread may call it."""

    def __init__(
        self,
        groups: Sequence[Group],
        seed: int,
        number: int,
        num_shards: int,
        stores: Sequence[CutStore],
        *,
        wait_timeout_s: float = WAIT_TIMEOUT_S,
        apply_timeout_s: float = APPLY_TIMEOUT_S,
    ) -> None:
        """Serves nobody before an epoch begins.

        Args:
            groups: All groups of the run.
            seed: What initial records are drawn from.
            number: Which of the `num_shards` shards this is, from 0 on.
            num_shards: Into how many shards rows are divided.
            stores: One for each group, taken over.
            wait_timeout_s: How long a fetch waits for marks.
            apply_timeout_s: How long `begin` and `clear` wait for what is being applied.
        """
        assert 0 <= number < num_shards
        assert len(groups) == len(stores)
        self.groups, self.seed = tuple(groups), seed
        self.number, self.num_shards = number, num_shards
        self.instance = secrets.token_hex(16)
        """Tells this life of the server from the one before a restart."""
        self.epoch: int | None = None
        """The epoch that is served, None: none, or one is beginning."""
        self.base: str | None = None
        """The name of the checkpoint whose records the stores hold but for rows written since."""
        self._stores = tuple(stores)
        self._wait_timeout_s, self._apply_timeout_s = wait_timeout_s, apply_timeout_s
        self._changed = threading.Condition()
        self._beginning = threading.Lock()
        self._newest_epoch = -1
        self._marks = np.empty((0, 2), np.int64)  # by rank: overlapped, urgent
        self._writing_ranks: set[int] = set()
        self._num_reads = self._num_writes = 0  # that are being applied
        self._cut: str | None = None
        self._is_closed = False

    def begin(self, epoch: int, num_ranks: int, checkpoint: Path | None) -> str:
        """Ends the epoch before, puts the records back to `checkpoint` and opens a new epoch.

        A late call, of an epoch that is not above all before it, is refused. So is a second call
        for an epoch whose first one failed: each start of trainers has a number of its own.

        Args:
            epoch: The number of the start.
            num_ranks: How many trainers there are.
            checkpoint: The folder of the checkpoint from which they start, None: from nothing.

        Returns:
            The instance, which every message must name.

        Raises:
            StoreError: It is refused, or a write does not end within `apply_timeout_s`.
            CheckpointError: The checkpoint can't be read; the shard then serves nobody.
        """
        if not 1 <= num_ranks <= MAX_TRAINERS:
            raise self._error(f"an epoch of {num_ranks} trainers, must be from 1 to {MAX_TRAINERS}")
        with self._changed:
            if self._is_closed:
                raise self._closed()
            if epoch <= self._newest_epoch:
                raise self._error(
                    f"epoch {epoch} can't begin, since epoch {self._newest_epoch} has: newer "
                    "trainers have taken the run over; start these again"
                )
            self._newest_epoch, self.epoch = epoch, None
            self._changed.notify_all()  # what waits for marks fails
        with self._beginning:  # a newer epoch waits for the one before it
            with self._changed:
                self._refuse_overtaken(epoch)
                self._wait_until_idle(f"epoch {epoch} begins")
                is_base = checkpoint is not None and checkpoint.name == self.base
                self.base = self._cut = None
            for store in self._stores:
                store.put_back(checkpoint, is_base=is_base)
            with self._changed:
                self.base = None if checkpoint is None else checkpoint.name
                self._refuse_overtaken(epoch)
                self._marks = np.full((num_ranks, 2), -1, np.int64)
                self._writing_ranks = set()
                self.epoch = epoch
        return self.instance

    def claim_writes(self, header: Header) -> None:
        """Says that a stream for a rank's writes begins: an epoch has one for each rank.

        The writes of a stream that broke may be lost, so there is no second one.

        Raises:
            StoreError: There has been one, or the header is of another epoch or instance.
        """
        with self._changed:
            self._check_header(header)
            if header.rank in self._writing_ranks:
                raise self._error(
                    f"rank {header.rank} has had its stream of writes in epoch {header.epoch}: "
                    "start all trainers again"
                )
            self._writing_ranks.add(header.rank)

    def write(self, header: Header, rows: Int64Array, records: Float32Array) -> None:
        """Writes records (n, record_width) to rows (n,), then notes the header's mark.

        Raises:
            StoreError: A row is not this shard's, or the header is of another epoch, instance or
                group; nothing was written.
        """
        self._check_rows(header, rows)
        with self._applying(header, writes=True):
            self._stores[header.group].write(rows, records)
        self.mark(header)

    def mark(self, header: Header) -> None:
        """Notes how far a rank has written; of marks of one kind the newest counts.

        Raises:
            StoreError: The header is of another epoch or instance.
        """
        steps = (header.steps.overlapped, header.steps.urgent)
        with self._changed:
            self._check_header(header)
            marks = self._marks[header.rank]
            if (marks < steps).any():
                np.maximum(marks, steps, out=marks)
                self._changed.notify_all()

    def fetch(self, header: Header, rows: Int64Array, out: Float32Array) -> None:
        """Reads the records of rows (n,) into `out`, once all ranks have reached the fence.

        Raises:
            StoreError: As for `write`, the epoch ends meanwhile, or a rank does not reach the fence
                within `wait_timeout_s`.
        """
        self._check_rows(header, rows)
        self._wait_for_marks(header)
        with self._applying(header, writes=False):
            self._stores[header.group].fetch(rows, out)

    def snapshot(self, header: Header) -> Iterator[tuple[Int64Array, Float32Array]]:
        """Every touched row of a group, ascending, with its record, a message's worth at a time.

        The header's fence is waited for. No trainer may write meanwhile.

        Raises:
            StoreError: As for `fetch`, also while it goes on.
        """
        self._check_rows(header, np.empty(0, np.int64))
        self._wait_for_marks(header)
        blocks = self._stores[header.group].snapshot(piece_rows(self.groups[header.group]))
        while True:
            with self._applying(header, writes=False):
                block = next(blocks, None)
            if block is None:
                return
            yield block

    def clear(self, header: Header) -> None:
        """Forgets what was written to a group; nothing of it belongs to a checkpoint any longer.

        Raises:
            StoreError: The header is of another epoch or instance, or a write does not end within
                `apply_timeout_s`.
        """
        with self._changed:
            self._check_header(header)
            self._wait_until_idle("rows are cleared")
            self._check_header(header)
            self.base = self._cut = None
            self._stores[header.group].clear()

    def cut(self, epoch: int, name: str, folder: Path) -> Callable[[], list[object]]:
        """Takes the records as they are into the checkpoint `name`; copies nothing yet.

        Returns:
            What writes them into `folder`, while other calls go on, and returns what the manifest
            says of each group's file.

        Raises:
            StoreError: It is another epoch, or a cut is in hand.
        """
        with self._changed:
            self._check_epoch(epoch)
            if self._cut is not None:
                raise self._error(
                    f"checkpoint {name} can't begin while {self._cut} is in hand: end that first"
                )
            self._wait_until_idle(f"checkpoint {name} begins", reads=False)
            self._check_epoch(epoch)
            for store in self._stores:
                store.cut()
            self._cut = name
        return lambda: [store.write_cut(folder) for store in self._stores]

    def committed(self, epoch: int, name: str) -> None:
        """The checkpoint `name` is complete: it is the base from now on.

        Raises:
            StoreError: It is another epoch, or not the cut in hand.
        """
        with self._changed:
            self._check_cut(epoch, name)
            for store in self._stores:
                store.committed()
            self.base, self._cut = name, None

    def abandon(self, epoch: int, name: str) -> None:
        """The checkpoint `name` failed: the next one holds its rows too.

        Raises:
            StoreError: It is another epoch, or not the cut in hand.
        """
        with self._changed:
            self._check_cut(epoch, name)
            for store in self._stores:
                store.abandon()
            self._cut = None

    def close(self) -> None:
        """Ends what waits, and releases the stores. Closing twice is allowed."""
        with self._changed:
            self._is_closed, self.epoch = True, None
            self._changed.notify_all()
        for store in self._stores:
            store.close()

    @contextmanager
    def _applying(self, header: Header, *, writes: bool) -> Iterator[None]:
        """Around what reads or writes records; compares the epoch at that moment."""
        with self._changed:
            self._check_header(header)
            self._num_writes += writes
            self._num_reads += not writes
        try:
            yield
        finally:
            with self._changed:
                self._num_writes -= writes
                self._num_reads -= not writes
                self._changed.notify_all()

    def _wait_for_marks(self, header: Header) -> None:
        fence = (header.steps.overlapped, header.steps.urgent)
        with self._changed:
            self._check_header(header)
            reached = self._changed.wait_for(
                lambda: self.epoch != header.epoch or bool((self._marks >= fence).all()),
                self._wait_timeout_s,
            )
            self._check_header(header)
            if not reached:
                late = np.flatnonzero((self._marks < fence).any(axis=1))
                marks = self._marks[late[0]].tolist()
                raise self._error(
                    f"rank {header.rank} of epoch {header.epoch} waited {self._wait_timeout_s:g} s "
                    f"for rank {late[0]} to write what its overlapped and urgent transfers up to "
                    f"steps {fence[0]} and {fence[1]} evict; it has come to {marks[0]} and "
                    f"{marks[1]}: see why it stands still, and start all trainers again"
                )

    def _wait_until_idle(self, why: str, *, reads: bool = True) -> None:
        """Waits, with the lock, until nothing is being written, nor read."""
        if not self._changed.wait_for(
            lambda: not self._num_writes and not (reads and self._num_reads), self._apply_timeout_s
        ):
            raise self._error(
                f"{self._num_writes} writes and {self._num_reads} reads have not ended within "
                f"{self._apply_timeout_s:g} s, which must be before {why}: restart this server"
            )

    def _refuse_overtaken(self, epoch: int) -> None:
        if self._is_closed:
            raise self._closed()
        if epoch != self._newest_epoch:
            raise self._error(
                f"epoch {epoch} ended while it began, since epoch {self._newest_epoch} has begun"
            )

    def _check_header(self, header: Header) -> None:
        """Refuses, with the lock, what is of another instance or epoch, or of no rank."""
        if self._is_closed:
            raise self._closed()
        if header.instance != self.instance:
            raise self._error(
                f"rank {header.rank} of epoch {header.epoch} speaks to another life of this "
                "server, which was restarted: start all trainers again"
            )
        self._check_epoch(header.epoch, f"rank {header.rank} of ")
        if header.rank >= len(self._marks):
            raise self._error(
                f"epoch {self.epoch} has {len(self._marks)} trainers and no rank {header.rank}"
            )

    def _check_epoch(self, epoch: int, who: str = "") -> None:
        if self._is_closed:
            raise self._closed()
        if epoch != self.epoch:
            served = "no epoch" if self.epoch is None else f"epoch {self.epoch}"
            raise self._error(
                f"{who}epoch {epoch} is not served, {served} is: trainers of another start are at "
                "work, or the server was restarted; start all trainers again"
            )

    def _check_cut(self, epoch: int, name: str) -> None:
        self._check_epoch(epoch)
        if name != self._cut:
            raise self._error(
                f"checkpoint {name} is not in hand, {self._cut or 'none'} is: it was given up"
            )

    def _check_rows(self, header: Header, rows: Int64Array) -> None:
        if header.group >= len(self.groups):
            raise self._error(
                f"rank {header.rank} names group {header.group}, there are {len(self.groups)}: "
                "start servers and trainers with one configuration"
            )
        group = self.groups[header.group]
        bad = _first_foreign(rows, group.num_rows, self.number, self.num_shards)
        if bad < 0:
            return
        row = rows[bad]
        if not 0 <= row < group.num_rows:
            raise self._error(
                f"row {row:,} lies outside {group.name}, whose rows are 0 to {group.num_rows - 1:,}"
            )
        raise self._error(
            f"row {row:,} of {group.name} belongs to shard {shard_of(row, self.num_shards)}: give "
            "trainers the addresses in the order of the shards"
        )

    def _closed(self) -> StoreError:
        return self._error("is closed: start it again, then all trainers")

    def _error(self, what: str) -> StoreError:
        return StoreError(f"shard server {self.number} of {self.num_shards}: {what}")


@jit
def _first_foreign(rows: Int64Array, num_rows: int, shard: int, num_shards: int) -> int:
    """Index of the first row that is out of range or of another shard, or -1."""
    for index in range(len(rows)):
        row = rows[index]
        if row < 0 or row >= num_rows or shard_of(row, num_shards) != shard:
            return index
    return -1
