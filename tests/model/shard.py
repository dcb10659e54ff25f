"""A shard server: one shard's records without any network, and the process that serves it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from tests.model.folder import Cut, Folder, Name, Records
from tests.model.rules import Rules
from tests.model.sim import Failed, Future, Process, Sim, Work
from tests.model.traces import INITIAL, SHARDS

from bagpipe.store.base import NO_STEPS, Steps
from bagpipe.store.record_files import RecordFile

Reply = Callable[[Any, str], None]
CUT_PIECE_ROWS = 4
CUTS_TO_WHOLE = 4  # every so many cuts write all rows


@dataclass(frozen=True, kw_only=True)
class Header:
    """What each message of a rank says."""

    epoch: int
    instance: Any
    rank: int
    steps: Steps = NO_STEPS  # a write's mark, a fetch's fence


@dataclass
class CutInHand:
    """A cut that a shard is writing: what it still needs, as of the cut."""

    name: Name
    rows: list[int]  # still to be written
    since: set[int] = field(default_factory=set)  # rows written since the cut
    old: Records = field(default_factory=dict)  # of rows in `rows` that have been overwritten
    is_written: bool = False


class AnyShard(Protocol):
    """What a server asks of its shard: this page's, or the package's own."""

    number: int

    def begin(
        self, epoch: int, num_ranks: int, checkpoint: Cut | None, *, is_readable: bool
    ) -> Any: ...
    def check(self, header: Header) -> None: ...
    def claim_writes(self, header: Header) -> None: ...
    def write(self, header: Header, rows: list[int], values: list[int]) -> None: ...
    def is_met(self, header: Header) -> bool: ...
    def fetch(self, header: Header, rows: list[int]) -> list[int]: ...
    def cut(self, epoch: int, name: Name) -> None: ...
    def next_piece(self, name: Name) -> Records: ...
    def record_files(self, name: Name) -> tuple[RecordFile, ...]: ...
    def committed(self, epoch: int, name: Name, base: Any) -> None: ...
    def abandon(self, epoch: int, name: Name) -> None: ...


class Shard:
    """One shard's state; it fails where the caller is not of its epoch or comes out of order."""

    def __init__(self, *, number: int, num_shards: int, instance: int, rules: Rules) -> None:
        self.number, self._num_shards = number, num_shards
        self.instance, self._rules = instance, rules
        self.epoch: int | None = None
        self.base: Any = None  # what names the checkpoint; unknown before the first `begin`
        self._knows_base = False
        self._records: Records = {}
        self._since_base: set[int] = set()
        self._cut: CutInHand | None = None
        self._newest_epoch = self._newest_cut = 0
        self._marks: dict[int, Steps] = {}
        self._writing: set[int] = set()  # ranks that have claimed their stream

    def begin(
        self, epoch: int, num_ranks: int, checkpoint: Cut | None, *, is_readable: bool
    ) -> int:
        """Puts the shard back to the checkpoint; `is_readable` says whether that can be."""
        is_again = epoch == self._newest_epoch and not self._rules.own_number
        if epoch <= self._newest_epoch and not is_again:
            raise Failed(f"begin({epoch}): the shard has heard of epoch {self._newest_epoch}")
        self._newest_epoch, self.epoch, self._newest_cut = epoch, None, 0
        self._end_cut()
        marks = {} if self._rules.marks_forgotten else self._marks
        self._marks = {rank: marks.get(rank, NO_STEPS) for rank in range(num_ranks)}
        self._writing = set()
        if checkpoint is None:
            base, found = None, {}
        else:
            base = checkpoint.name if self._rules.cuts_by_name else checkpoint.step
            records, shards = checkpoint.records(), SHARDS[self._num_shards]
            found = {row: value for row, value in records.items() if shards[row] == self.number}
            if not is_readable:
                self._knows_base, self._records = False, {}
                raise Failed("the checkpoint can't be read")
        self._put_back(found, is_base=self._knows_base and base == self.base)
        self.base, self._knows_base, self._since_base = base, True, set()
        self.epoch = epoch
        return self.instance

    def _put_back(self, found: Records, *, is_base: bool) -> None:
        if not is_base:
            self._records = dict(found)
            return
        for row in self._since_base:
            if row in found:
                self._records[row] = found[row]
            elif self._rules.unwritten_again:
                del self._records[row]

    def check(self, header: Header) -> None:
        """Raises Failed for another epoch or instance."""
        if self.epoch is None or (self._rules.epoch_in_messages and header.epoch != self.epoch):
            raise Failed(f"epoch {header.epoch}: the shard is at epoch {self.epoch}")
        if header.instance != self.instance:
            raise Failed(f"epoch {header.epoch}: the shard has been restarted")
        if header.rank not in self._marks:
            raise Failed(f"rank {header.rank}: is not of epoch {self.epoch}")

    def claim_writes(self, header: Header) -> None:
        """A rank's write stream begins; there is no second one in an epoch."""
        self.check(header)
        if header.rank in self._writing:
            raise Failed(f"rank {header.rank} has had its write stream")
        self._writing.add(header.rank)

    def write(self, header: Header, rows: list[int], values: list[int]) -> None:
        """Applies a write, and the mark that rides on it; without rows it is a mark alone."""
        for row, value in zip(rows, values, strict=True):
            self._keep_old(row)
            (self._since_base if self._cut is None else self._cut.since).add(row)
            self._records[row] = value
        newest = self._marks[header.rank]
        self._marks[header.rank] = Steps(
            overlapped=max(newest.overlapped, header.steps.overlapped),
            urgent=max(newest.urgent, header.steps.urgent),
        )

    def is_met(self, header: Header) -> bool:
        """Whether a fetch may be answered."""
        fence = header.steps
        if not self._rules.fences:
            return True
        marks = self._marks
        half = (len(marks) + 1) // 2
        return all(
            marks[rank].overlapped >= fence.overlapped and marks[rank].urgent >= fence.urgent
            for rank in marks
            if self._rules.fences_of_all or rank // half == header.rank // half
        )

    def fetch(self, header: Header, rows: list[int]) -> list[int]:
        return [self._records.get(row, INITIAL) for row in rows]

    def cut(self, epoch: int, name: Name) -> None:
        """Begins a cut; `next_piece` writes it."""
        self._check_epoch(epoch)
        if name[1] <= self._newest_cut:
            raise Failed(f"cut {name}: the shard has heard of {self._newest_cut}")
        self._newest_cut = name[1]
        self._end_cut()
        is_whole = name[1] % CUTS_TO_WHOLE == 0
        self._cut = CutInHand(name, sorted(self._records if is_whole else self._since_base))

    def next_piece(self, name: Name) -> Records:
        """Some records of the cut in hand, and then none."""
        cut = self._cut
        if cut is None or cut.name != name:
            raise Failed(f"cut {name}: is not in hand")
        piece, cut.rows = cut.rows[:CUT_PIECE_ROWS], cut.rows[CUT_PIECE_ROWS:]
        cut.is_written = not cut.rows
        return {row: cut.old.pop(row, self._records[row]) for row in piece}

    def record_files(self, name: Name) -> tuple[RecordFile, ...]:
        """No real ones."""
        return ()

    def committed(self, epoch: int, name: Name, base: Any) -> None:
        """The cut has become the base."""
        self._check_epoch(epoch)
        self._newest_cut = max(self._newest_cut, name[1])
        cut = self._cut
        if cut is not None and cut.name == name and cut.is_written:
            self.base, self._since_base, self._cut = base, cut.since, None

    def abandon(self, epoch: int, name: Name) -> None:
        self._check_epoch(epoch)
        self._newest_cut = max(self._newest_cut, name[1])
        if self._cut is not None and self._cut.name == name:
            self._end_cut()

    def _check_epoch(self, epoch: int) -> None:
        if self.epoch is None or (self._rules.epoch_in_messages and epoch != self.epoch):
            raise Failed(f"epoch {epoch}: the shard is at epoch {self.epoch}")

    def _end_cut(self) -> None:
        if self._cut is not None:
            if self._rules.failed_rows_kept:
                self._since_base |= self._cut.since
            else:
                self._since_base = self._cut.since
            self._cut = None

    def _keep_old(self, row: int) -> None:
        cut = self._cut
        if cut is not None and row in cut.rows and row not in cut.old and self._rules.old_values:
            cut.old[row] = self._records[row]


class Server(Process):
    """The process: applies what arrives, some of it later, and keeps fetches that must wait."""

    def __init__(self, sim: Sim, name: str, folder: Folder, shard: AnyShard, rules: Rules) -> None:
        super().__init__(sim, name)
        self.shard, self._folder, self._rules = shard, folder, rules
        self._waiting: list[tuple[Header, list[int], Reply]] = []
        self._busy_until: dict[int, float] = {}  # by write stream
        self._broken: set[int] = set()  # write streams
        self._slow = sim.rng.choice((0.0, 0.02, 0.1))  # the share of writes that take long
        self._written: dict[Name, Future] = {}

    def receive(self, name: str, arguments: tuple[Any, ...], reply: Reply) -> None:
        """A message; every failure is an answer."""
        self._answer(reply, lambda: getattr(self, f"_{name}")(reply, *arguments))

    def _answer(self, reply: Reply, work: Callable[[], None]) -> None:
        try:
            work()
        except Failed as error:
            reply(None, str(error) or "refused")

    def _begin(self, reply: Reply, epoch: int, num_ranks: int, checkpoint: Cut | None) -> None:
        is_readable = self.name not in self._folder.unreadable_for
        try:
            instance = self.shard.begin(epoch, num_ranks, checkpoint, is_readable=is_readable)
        finally:
            self._try_waiting()
        self.sim.point("begun")
        reply(instance, "")

    def _write(
        self, reply: Reply, header: Header, stream: int, rows: list[int], values: list[int]
    ) -> None:
        """Takes a while, behind the writes that came before it on its stream."""
        if not self._rules.checked_when_applied:
            self.shard.check(header)
        mean = 20.0 if self.sim.rng.random() < self._slow else 0.2
        end = max(self._busy_until.get(stream, 0.0), self.sim.now) + self.sim.delay(mean)
        is_first = stream not in self._busy_until
        self._busy_until[stream] = end

        def apply() -> None:
            try:
                self._apply(header, stream, rows, values, is_first=is_first)
                reply(None, "")
            except Failed as error:
                self._broken.add(stream)
                reply(None, str(error))
            self._try_waiting()

        self.after(end - self.sim.now, apply)

    def _apply(
        self, header: Header, stream: int, rows: list[int], values: list[int], *, is_first: bool
    ) -> None:
        """A write that fails ends its stream."""
        if stream in self._broken:
            raise Failed("the stream has ended")
        if self._rules.checked_when_applied:
            self.shard.check(header)
        if is_first and self._rules.one_write_stream:
            self.shard.claim_writes(header)
        self.shard.write(header, rows, values)
        self.sim.point("written")

    def _fetch(self, reply: Reply, header: Header, rows: list[int]) -> None:
        self.shard.check(header)
        self._waiting.append((header, rows, reply))
        self._try_waiting()

    def _try_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        for header, rows, reply in waiting:
            self._answer(reply, lambda item=(header, rows, reply): self._try(*item))

    def _try(self, header: Header, rows: list[int], reply: Reply) -> None:
        self.shard.check(header)
        if self.shard.is_met(header):
            reply(self.shard.fetch(header, rows), "")
        else:
            self._waiting.append((header, rows, reply))

    def _cut(self, reply: Reply, epoch: int, name: Name) -> None:
        self.shard.cut(epoch, name)
        self.sim.point("taken")
        written = self._written[name] = Future()
        self.spawn(self._write_cut(name, written))
        reply(None, "")

    def _cut_written(self, reply: Reply, name: Name) -> None:
        """Answers once the files of a cut are on the disk."""
        if name not in self._written:
            raise Failed(f"cut {name}: the server does not know it")
        self._written[name].then(lambda future: reply(None, future.error))

    def _write_cut(self, name: Name, written: Future) -> Work:
        try:
            yield self.sim.delay()
            file: Records = {}
            cut = self._folder.find(name)
            cut.files.append(file)
            while piece := self.shard.next_piece(name):
                self._folder.check_disk(self.name)
                file.update(piece)
                self.sim.point("piece")
                yield self.sim.delay()
            cut.written += self.shard.record_files(name)
            written.set()
        except Failed as error:
            written.fail(str(error))

    def _committed(self, reply: Reply, epoch: int, name: Name, base: Any) -> None:
        self.shard.committed(epoch, name, base)
        reply(None, "")

    def _abandon(self, reply: Reply, epoch: int, name: Name) -> None:
        self.shard.abandon(epoch, name)
        reply(None, "")
