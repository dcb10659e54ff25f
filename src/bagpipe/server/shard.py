"""One shard of every group, and who may read and write it: a shard server without its network.

An *epoch* is one start of all trainers. `begin` opens it: it waits for what is being applied, then
puts the stores back to the checkpoint from which the trainers start. `Serving` keeps whom a shard
serves and how far ranks have written; its lock guards the state here, too. Copying is done outside
of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bagpipe.server.requests import Requests
from bagpipe.server.serving import APPLY_TIMEOUT_S, WAIT_TIMEOUT_S, Serving
from bagpipe.server.wire import Header, piece_rows
from bagpipe.store.base import NO_STEPS
from bagpipe.store.cuts import CutStore
from bagpipe.store.record_files import RecordFile
from bagpipe.types import Float32Array, Group, Int64Array


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint from which an epoch starts, as its manifest tells of it."""

    name: str
    """The name of its cut, such as "3.1"."""
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
        self.serving = Serving(
            f"shard server {number} of {num_shards}",
            wait_timeout_s=wait_timeout_s,
            apply_timeout_s=apply_timeout_s,
        )
        self.base: str | None = None
        """The cut whose records the stores hold, except for rows written since; None: not known."""
        self.staging = ""
        """Where it is reached by shared memory, if it is."""
        self.requests = Requests()
        self._stores = tuple(stores)
        self._beginning = threading.Lock()
        self._cut: str | None = None  # in hand
        self._newest_cut = 0  # of the epoch, of which anything was heard

    @property
    def epoch(self) -> int | None:
        """The epoch that is served, None: none, or one is beginning."""
        return self.serving.epoch

    @property
    def instance(self) -> str:
        """Tells this life of the server from the one before a restart."""
        return self.serving.instance

    def group(self, header: Header) -> Group:
        """The group that a message names. StoreError: there is none of its number."""
        if header.group >= len(self.groups):
            raise self.serving.error(
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
        serving = self.serving
        serving.end_before(epoch, num_ranks, run)
        check = partial(serving.check_newest, epoch)
        with self._beginning:  # one before it that is still at work gives up
            with serving.lock:
                serving.wait_until_idle(f"epoch {epoch} begins", of_epoch=epoch)
                self.base = self._cut = None
            for index, store in enumerate(self._stores):
                if checkpoint is None:
                    store.put_back(Path(), ())
                else:
                    store.put_back(checkpoint.folder, checkpoint.files[index], check)
            with serving.lock:
                self.base = None if checkpoint is None else checkpoint.name
                check()
                self._newest_cut = 0
                serving.open(epoch, num_ranks)
        return serving.instance

    def claim_writes(self, header: Header) -> None:
        """Says that a stream for a rank's writes begins: an epoch has one for each rank.

        The writes of a stream that broke may be lost, so there is no second one.

        Raises:
            StoreError: There has been one, or the header is of another epoch or instance.
        """
        self.serving.claim_writes(header)

    def write(self, header: Header, rows: Int64Array, records: Float32Array) -> None:
        """Writes records (n, record_width) to rows (n,), then notes the header's mark.

        Raises:
            StoreError: A row is not this shard's, or the header is of another epoch, instance or
                group; nothing was written.
        """
        with self.requests.counted("write", len(rows), records.nbytes):
            self.group(header)
            with self.serving.applying(header, writes=True):
                self._stores[header.group].write(rows, records)
            self.mark(header)

    def mark(self, header: Header) -> None:
        """Notes how far a rank has written; of marks of one kind the newest counts.

        Raises:
            StoreError: The header is of another epoch or instance.
        """
        self.serving.mark(header)

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
        if header.steps != NO_STEPS:
            with self.requests.counted("wait"):
                self.serving.wait_for_marks(header)

    def read(self, header: Header, rows: Int64Array, out: Float32Array) -> None:
        """As `fetch`, for a header whose fence was waited for."""
        with self.requests.counted("fetch", len(rows), out.nbytes):
            self.group(header)
            with self.serving.applying(header, writes=False):
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
            with self.serving.applying(header, writes=False):
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
        with self.serving.lock:
            self.serving.check_header(header)
            self.serving.wait_until_idle("rows are cleared")
            self.serving.check_header(header)
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
        with self.serving.lock:
            self.serving.check_epoch(epoch)
            if number <= self._newest_cut:
                raise self.serving.error(
                    f"cut {name} comes late, {epoch}.{self._newest_cut} was known: leave it out"
                )
            self._know_cut(epoch, number)
            self._abandon()
            self.serving.wait_until_idle(f"cut {name}", reads=False)
            self.serving.check_epoch(epoch)
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
        with self.serving.lock:
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
        with self.serving.lock:
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
        self.serving.close()
        for store in self._stores:
            store.close()

    def _know_cut(self, epoch: int, number: int) -> None:
        """Notes, with the lock, that a cut was heard of: calls may come late."""
        self.serving.check_epoch(epoch)
        self._newest_cut = max(self._newest_cut, number)

    def _abandon(self) -> None:
        for store in self._stores:
            store.abandon()
        self._cut = None
