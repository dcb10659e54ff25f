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
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bagpipe.errors import StoreError
from bagpipe.server.requests import Requests
from bagpipe.server.wire import Header, piece_rows
from bagpipe.store.cuts import CutStore
from bagpipe.store.record_files import RecordFile
from bagpipe.topology import MAX_TRAINERS
from bagpipe.types import Float32Array, Group, Int64Array

WAIT_TIMEOUT_S = 600.0
"""How long a fetch waits for the marks of all ranks, by default."""
APPLY_TIMEOUT_S = 120.0
"""How long `begin` and `clear` wait for what is being applied, by default."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint from which an epoch starts, as its manifest tells of it."""

    name: str
    """Of its cut, such as "3.1"."""
    folder: Path
    files: tuple[tuple[RecordFile, ...], ...]
    """The record files of each group, in order."""


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
        """The cut whose records the stores hold but for rows written since; None: not known."""
        self.run = ""
        """The run whose tables it holds."""
        self.staging = ""
        """Where it is reached by shared memory, if it is."""
        self.requests = Requests()
        self._stores = tuple(stores)
        self._wait_timeout_s, self._apply_timeout_s = wait_timeout_s, apply_timeout_s
        self._changed = threading.Condition()
        self._beginning = threading.Lock()
        self._newest_epoch = -1
        self._marks = np.empty((0, 2), np.int64)  # by rank: overlapped, urgent
        self._writing_ranks: set[int] = set()
        self._num_reads = self._num_writes = 0  # that are being applied
        self._cut: str | None = None  # in hand
        self._newest_cut = 0  # of the epoch, of which anything was heard
        self._is_closed = False

    def group(self, header: Header) -> Group:
        """The group that a message names. StoreError: there is none of its number."""
        if header.group >= len(self.groups):
            raise self._error(
                f"rank {header.rank} names group {header.group}, there are {len(self.groups)}: "
                "start servers and trainers with one configuration"
            )
        return self.groups[header.group]

    def begin(
        self, epoch: int, num_ranks: int, checkpoint: Checkpoint | None = None, *, run: str = ""
    ) -> str:
        """Ends the epoch before, puts the records back to `checkpoint` and opens a new epoch.

        A late call, of an epoch that is not above all before it, is refused. So is a second call
        for an epoch whose first one failed: each start of trainers has a number of its own.

        Args:
            epoch: The number of the start.
            num_ranks: How many trainers there are.
            checkpoint: From which they start, None: from nothing.
            run: Which run it is; a server serves one in its life, since each counts its own epochs.

        Returns:
            The instance, which every message must name.

        Raises:
            StoreError: It is refused, or a write does not end within `apply_timeout_s`.
            CheckpointError: The checkpoint can't be read; the shard then serves nobody.
        """
        with self._changed:
            self._take_epoch(epoch, num_ranks, run)
        with self._beginning:  # a newer epoch waits for the one before it
            with self._changed:
                self._refuse_overtaken(epoch)
                self._wait_until_idle(f"epoch {epoch} begins")
                self.base = self._cut = None
            for index, store in enumerate(self._stores):
                if checkpoint is None:
                    store.put_back(Path(), ())
                else:
                    store.put_back(checkpoint.folder, checkpoint.files[index])
            with self._changed:
                self.base = None if checkpoint is None else checkpoint.name
                self._refuse_overtaken(epoch)
                self._marks = np.full((num_ranks, 2), -1, np.int64)
                self._writing_ranks, self._newest_cut = set(), 0
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
        with self.requests.counted("write", len(rows), records.nbytes):
            self.group(header)
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
        self.wait(header)
        self.read(header, rows, out)

    def wait(self, header: Header) -> None:
        """Waits until all ranks have reached the header's fence. StoreError: as for `fetch`."""
        fence = (header.steps.overlapped, header.steps.urgent)
        if fence != (-1, -1):
            with self.requests.counted("wait"):
                self._wait_for_marks(header, fence)

    def read(self, header: Header, rows: Int64Array, out: Float32Array) -> None:
        """As `fetch`, for a header whose fence was waited for."""
        with self.requests.counted("fetch", len(rows), out.nbytes):
            self.group(header)
            with self._applying(header, writes=False):
                self._stores[header.group].fetch(rows, out)

    def snapshot(self, header: Header) -> Iterator[tuple[Int64Array, Float32Array]]:
        """Every touched row of a group, ascending, with its record, a message's worth at a time.

        The header's fence is waited for. No trainer may write meanwhile.

        Raises:
            StoreError: As for `fetch`, also while it goes on.
        """
        most_rows = piece_rows(self.group(header))
        self.wait(header)
        blocks = self._stores[header.group].snapshot(most_rows)
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
        self.group(header)
        with self._changed:
            self._check_header(header)
            self._wait_until_idle("rows are cleared")
            self._check_header(header)
            self.base = self._cut = None
            self._stores[header.group].clear()

    def cut(
        self, epoch: int, number: int, *, is_whole: bool = False
    ) -> Callable[[Path], tuple[RecordFile, ...]]:
        """Takes the records as they are into the cut `epoch.number`; copies nothing yet.

        A cut that is still in hand is abandoned. No write of before the cut may be under way, nor
        may trainers go on before this has returned.

        Args:
            epoch: The one that is served.
            number: Counts the epoch's cuts.
            is_whole: Whether all rows ever written are wanted, since the base's files are gone.

        Returns:
            What writes them into a folder, once, while other calls go on. It returns what the
            manifest is to say of each group's file.

        Raises:
            StoreError: It is another epoch, or a cut of this number or a later one was known.
        """
        name = f"{epoch}.{number}"
        with self._changed:
            self._check_epoch(epoch)
            if number <= self._newest_cut:
                raise self._error(
                    f"cut {name} comes late, {epoch}.{self._newest_cut} was known: leave it out"
                )
            self._know_cut(epoch, number)
            self._abandon()
            self._wait_until_idle(f"cut {name}", reads=False)
            self._check_epoch(epoch)
            writers = [store.begin_cut(is_whole=is_whole) for store in self._stores]
            self._cut = name

        def write(folder: Path) -> tuple[RecordFile, ...]:
            shard = f"shard-{self.number}-of-{self.num_shards}"
            return tuple(
                write_cut(folder / f"group-{index}.{shard}.cut-{name}.arrow")
                for index, write_cut in enumerate(writers)
            )

        return write

    def committed(self, epoch: int, number: int) -> bool:
        """The checkpoint of the cut `epoch.number` is in place: it is the base from now on.

        Returns:
            Whether it was in hand. Where not, the next cut holds its rows, too.

        Raises:
            StoreError: It is another epoch, or the cut is not written.
        """
        with self._changed:
            self._know_cut(epoch, number)
            if self._cut != f"{epoch}.{number}":
                return False
            for store in self._stores:
                store.committed()
            self.base, self._cut = self._cut, None
            return True

    def abandon(self, epoch: int, number: int) -> None:
        """The cut `epoch.number` failed: the next one holds its rows, too.

        Raises:
            StoreError: It is another epoch.
        """
        with self._changed:
            self._know_cut(epoch, number)
            if self._cut == f"{epoch}.{number}":
                self._abandon()

    def count_written(self) -> list[tuple[int, int]]:
        """How many rows of each group were ever written, and since the base.

        Raises:
            StoreError: It is closed.
        """
        return [store.count() for store in self._stores]

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

    def _wait_for_marks(self, header: Header, fence: tuple[int, int]) -> None:
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

    def _know_cut(self, epoch: int, number: int) -> None:
        """Notes, with the lock, that a cut was heard of: calls may come late."""
        self._check_epoch(epoch)
        self._newest_cut = max(self._newest_cut, number)

    def _abandon(self) -> None:
        for store in self._stores:
            store.abandon()
        self._cut = None

    def _wait_until_idle(self, why: str, *, reads: bool = True) -> None:
        """Waits, with the lock, until nothing is being written, nor read."""
        if not self._changed.wait_for(
            lambda: not self._num_writes and not (reads and self._num_reads), self._apply_timeout_s
        ):
            raise self._error(
                f"{self._num_writes} writes and {self._num_reads} reads have not ended within "
                f"{self._apply_timeout_s:g} s, which must be before {why}: restart this server"
            )

    def _take_epoch(self, epoch: int, num_ranks: int, run: str) -> None:
        """Ends, with the lock, the epoch before, if a newer one may begin."""
        if self._is_closed:
            raise self._closed()
        if not 1 <= num_ranks <= MAX_TRAINERS:
            raise self._error(f"an epoch of {num_ranks} trainers, must be from 1 to {MAX_TRAINERS}")
        if self._newest_epoch >= 0 and run != self.run:
            raise self._error(
                f"holds the tables of run {self.run!r}, not of {run!r}: restart it, or give each "
                "run servers of its own"
            )
        if epoch <= self._newest_epoch:
            raise self._error(
                f"epoch {epoch} can't begin, since epoch {self._newest_epoch} has: newer "
                "trainers have taken the run over; start these again"
            )
        self._newest_epoch, self.run, self.epoch = epoch, run, None
        self._changed.notify_all()  # what waits for marks fails

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

    def _closed(self) -> StoreError:
        return self._error("is closed: start it again, then all trainers")

    def _error(self, what: str) -> StoreError:
        return StoreError(f"shard server {self.number} of {self.num_shards}: {what}")
