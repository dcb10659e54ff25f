"""Checkpoints of a run whose records are with shard servers.

They are taken between two steps, then written while training goes on.

    all ranks   flush, and meet
    rank 0      tells servers to take a cut; dense state is kept in memory
    all ranks   meet again, and go on
    servers     write the records of rows written since the checkpoint before
    rank 0      a thread waits for that, adds dense state, links and manifest, renames: the commit

One cut is in hand at a time. See docs/protocol.md for why each step is where it is.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from bagpipe.checkpoint.checkpoints import (
    Moment,
    SavedRun,
    State,
    read_checkpoint,
    take_moment,
)
from bagpipe.checkpoint.cuts import add_cut
from bagpipe.checkpoint.epochs import RunFolder
from bagpipe.checkpoint.files import CheckpointWriter, prune
from bagpipe.data.base import Position
from bagpipe.distributed.trainers import Trainers
from bagpipe.errors import BagpipeError, CheckpointError, StoreError
from bagpipe.store.record_files import RecordFile
from bagpipe.types import Group


class CutServers(Protocol):
    """What cuts need of `bagpipe.server.client.ShardServers`."""

    def cut(
        self, number: int, folder: Path, *, is_whole: bool = False
    ) -> Callable[[], list[tuple[RecordFile, ...]]]:
        """Takes a cut on all servers; what is returned waits for its files, by group.

        `folder` is relative to the run's.
        """

    def committed(self, number: int) -> object:
        """The cut is a checkpoint."""

    def abandon(self, number: int) -> None:
        """The cut has failed; no server is waited for."""


@dataclass(frozen=True, kw_only=True)
class EndedCut:
    """How a cut ended."""

    step: int
    path: Path
    """The checkpoint, where there is no `error`."""
    elapsed_s: float
    error: Exception | None = None


@dataclass(frozen=True, kw_only=True)
class _Taken:
    """A cut in hand."""

    number: int
    started: float
    writer: CheckpointWriter
    wait: Callable[[], list[tuple[RecordFile, ...]]]
    moment: Moment
    groups: Sequence[Group]
    spared: int | None
    """The step of a checkpoint that is kept whatever its age."""


class Cuts:
    """The checkpoints of one epoch, as each of its ranks sees them; rank 0 writes them."""

    def __init__(
        self,
        run: RunFolder,
        servers: CutServers,
        base: SavedRun | None,
        *,
        keep: int,
        trainers: Trainers,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`base` is the checkpoint from which the epoch started."""
        self._run, self._servers = run, servers
        self._keep, self._trainers, self._say = keep, trainers, say
        self._number = 0
        self._base = base
        self._thread: threading.Thread | None = None
        self._written: deque[EndedCut] = deque()  # the thread adds to it at any moment

    def is_busy(self) -> bool:
        """Whether a cut is in hand. All ranks must ask; rank 0 knows."""

        def look() -> bool:
            return self._thread is not None and self._thread.is_alive()

        return bool(self._trainers.all_do("whether a checkpoint is being written", look)[0])

    def begin(
        self,
        state: State,
        position: Position,
        config: Mapping[str, Any],
        *,
        spared: int | None = None,
    ) -> None:
        """Takes a cut of the step that `state` is at. All ranks must call it, with none in hand.

        When it returns training may go on.

        Raises:
            CheckpointError: It can't be taken, which all ranks raise. The run is as before, and the
                next cut has its rows.
            StoreError: This rank can't write its rows.
        """
        state.embeddings.flush()
        self._trainers.wait("all ranks to write their rows")
        self._number += 1
        self._trainers.all_do(
            f"cut {self._run.epoch}.{self._number}",
            lambda: self._take(state, position, config, spared),
        )

    def finish(self) -> None:
        """Waits for the cut in hand, if there is one. Rank 0 alone has any."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def ended(self) -> list[EndedCut]:
        """The cuts that ended since the last call, in order; rank 0 alone has any."""
        return [self._written.popleft() for _ in range(len(self._written))]

    def _take(
        self, state: State, position: Position, config: Mapping[str, Any], spared: int | None
    ) -> None:
        if not self._trainers.is_first:
            return
        self.finish()
        number, started = self._number, time.perf_counter()
        with ExitStack() as stack:
            stack.push(partial(self._abandon_after, number))  # also where the rename fails
            writer = stack.enter_context(
                CheckpointWriter(self._run, state.embeddings.step, str(number))
            )
            taken = _Taken(
                number=number,
                started=started,
                writer=writer,
                wait=self._cut_servers(number, writer.folder.relative_to(self._run.path)),
                moment=take_moment(state, position, config),
                groups=state.embeddings.groups,
                spared=spared,
            )
            writing = stack.pop_all()
        self._thread = threading.Thread(
            target=self._write, args=(taken, writing), name="bagpipe-checkpoint"
        )
        self._thread.start()

    def _cut_servers(self, number: int, folder: Path) -> Callable[[], list[tuple[RecordFile, ...]]]:
        # a user may have removed the base, whose files would be linked
        is_whole = self._base is not None and not all(
            (self._base.path / file.name).exists()
            for files in self._base.record_files
            for file in files
        )
        try:
            return self._servers.cut(number, folder, is_whole=is_whole)
        except StoreError as error:  # of this cut: all ranks go on without it
            raise CheckpointError(str(error)) from error

    def _write(self, taken: _Taken, writing: ExitStack) -> None:
        """Runs on a thread of its own. Nothing may be lost by an error here: it is told."""
        try:
            with writing:
                written = list(zip(*taken.wait(), strict=True))  # by server
                name = f"{self._run.epoch}.{taken.number}"
                add_cut(taken.writer, name, taken.moment, taken.groups, written, self._base)
            self._base = read_checkpoint(taken.writer.path)
        except Exception as error:
            self._note(taken, error)
            return
        with suppress(BagpipeError):  # then the next cut has more rows than it must
            self._servers.committed(taken.number)
        prune(
            self._run,
            newest=taken.moment.step,
            keep=self._keep,
            say=self._say,
            spared=taken.spared,
        )
        self._note(taken)

    def _abandon_after(self, number: int, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._servers.abandon(number)

    def _note(self, taken: _Taken, error: Exception | None = None) -> None:
        elapsed_s = time.perf_counter() - taken.started
        self._written.append(
            EndedCut(
                step=taken.moment.step, path=taken.writer.path, elapsed_s=elapsed_s, error=error
            )
        )
