"""Checkpoints as a run's loop asks for them: where records are decides how they are written.

With shard servers a checkpoint is a cut, written while training goes on; the loop is told when it
has ended. Otherwise training waits for it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from bagpipe.checkpoint.checkpoints import SavedRun, save_checkpoint
from bagpipe.checkpoint.epochs import RunFolder
from bagpipe.distributed.trainers import Trainers
from bagpipe.errors import CheckpointError
from bagpipe.train.build import Run
from bagpipe.train.cuts import Cuts
from bagpipe.train.logs import NoLog, RunLog
from bagpipe.train.report import Reporter


@dataclass(kw_only=True)
class Saving:
    """Saves a run, and knows its newest checkpoint. All ranks must call what it offers."""

    parts: Run
    folder: RunFolder
    trainers: Trainers
    log: RunLog | NoLog
    reporter: Reporter
    cuts: Cuts | None = None
    """The cuts of the shard servers, if the run has any."""
    newest: Path | None = None
    newest_step: int = -1
    _begun_step: int = field(init=False, default=-1)
    _due_from_s: float = field(init=False)
    _reason: str = field(init=False, default="")  # of the last failure

    def __post_init__(self) -> None:
        self._due_from_s = time.monotonic()

    def is_due(self) -> bool:
        """Whether `checkpoint.every_s` have passed since it was, or since the last checkpoint."""
        every_s = self.parts.config.checkpoint.every_s
        if every_s is None or time.monotonic() - self._due_from_s < every_s:
            return False
        self._due_from_s = time.monotonic()
        return True

    def resumed_from(self, saved: SavedRun) -> None:
        """Says that the run goes on from a checkpoint, which need not be saved again."""
        self.newest, self.newest_step, self._begun_step = saved.path, saved.step, saved.step

    def try_to_save(self) -> None:
        """Saves, or begins to; a failure is told, and the run goes on."""
        step = self.parts.embeddings.step
        try:
            if self.cuts is not None and self.cuts.is_busy():
                self._failed(step, "the one before is still being written")
                return
            self._begin()
        except CheckpointError as error:
            self._failed(step, str(error))

    def save(self) -> None:
        """Saves, and returns once the checkpoint is in place.

        Raises:
            CheckpointError: It can't be written; earlier ones are as they were.
        """
        self.finish()
        if self.newest_step == self.parts.embeddings.step:
            return
        self._begin()
        if self.cuts is not None:
            self._finish()
            if self.newest_step != self.parts.embeddings.step:
                raise CheckpointError(self._reason)

    def try_to_save_now(self) -> bool:
        """As `save`; a failure is told, and the run goes on. Returns whether it is in place."""
        try:
            self.save()
        except CheckpointError as error:
            self._failed(self.parts.embeddings.step, str(error))
            return False
        return True

    def finish(self) -> None:
        """Waits for the checkpoint that is being written, if there is one."""
        if self.cuts is not None:
            self._finish()

    def close(self) -> None:
        """Waits for it however the run has ended, and for no other rank."""
        if self.cuts is not None:
            self.cuts.finish()
            self.note_ended()

    def note_ended(self) -> None:
        """Notes cuts that have ended since the last call."""
        for ended in () if self.cuts is None else self.cuts.ended():
            if ended.error is None:
                self._saved(ended.step, ended.path, ended.elapsed_s)
            else:
                self._failed(ended.step, str(ended.error))
                self._begun_step = self.newest_step

    def _begin(self) -> None:
        parts, started = self.parts, time.perf_counter()
        step = parts.embeddings.step
        if step == self._begun_step:
            return
        self._due_from_s = time.monotonic()
        parts.dense_step.count_replays()
        position = parts.schedule.position_after(step)
        if self.cuts is not None:
            self.cuts.begin(parts.state, position, parts.settings, spared=parts.best.step)
            self._begun_step = step
            return
        path = save_checkpoint(
            self.folder,
            state=parts.state,
            position=position,
            config=parts.settings,
            keep=parts.config.checkpoint.keep,
            spared=parts.best.step,
            trainers=self.trainers,
            say=self.reporter.say,
        )
        self._begun_step = step
        self._saved(step, path, time.perf_counter() - started)

    def _finish(self) -> None:
        """Waits for the cut in hand, on all ranks."""
        assert self.cuts is not None
        cuts = self.cuts

        def finish() -> tuple[int, str | None, str]:
            cuts.finish()
            self.note_ended()
            newest = None if self.newest is None else str(self.newest)
            return self.newest_step, newest, self._reason

        step, newest, self._reason = self.trainers.all_do("a checkpoint to be written", finish)[0]
        self.newest_step = self._begun_step = step
        self.newest = None if newest is None else Path(newest)

    def _saved(self, step: int, path: Path, elapsed_s: float) -> None:
        self.newest, self.newest_step = path, step
        self.log.write("checkpoint", step, path=str(path), elapsed_s=elapsed_s)

    def _failed(self, step: int, reason: str) -> None:
        self._reason = reason
        self.log.write("checkpoint_failed", step, reason=reason)
        self.reporter.say(f"step {step:,}: no checkpoint, the run goes on without it: {reason}")
