"""The start of a run: what can be refused without a claim, the claim, the checkpoint to go on from.

A claim of the run's folder ends the epoch of who trains there. So what can be refused before, is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from bagpipe.checkpoint.checkpoints import (
    SavedRun,
    check_resumable,
    environment,
    find_checkpoint,
    read_checkpoint,
)
from bagpipe.checkpoint.epochs import RunFolder, check_launcher
from bagpipe.checkpoint.files import FROM, list_checkpoints
from bagpipe.checkpoint.run_folder import (
    check_no_earlier_run,
    check_seen_by_all,
    claim_run_folder,
    make_run_folder,
    start_afresh,
    told_before,
)
from bagpipe.config.run import RunConfig
from bagpipe.distributed.trainers import Launcher, Trainers
from bagpipe.errors import BagpipeError, CheckpointError, ConfigError
from bagpipe.train.report import Reporter
from bagpipe.train.settings import describe_run


@dataclass(frozen=True, kw_only=True)
class Start:
    """A start that has claimed the run's folder."""

    folder: RunFolder
    saved: SavedRun | None
    """From which it goes on; None: from nothing."""


@dataclass(kw_only=True)
class Starting:
    """One start of all trainers; all ranks must call what it offers."""

    config: RunConfig
    trainers: Trainers
    reporter: Reporter
    resume: bool
    overwrite: bool
    is_from_another: bool = False
    """Whether it starts from another run where it has no checkpoint of its own."""
    takes_over: bool
    """Whether who trains in the folder now is no reason to refuse, since servers leave them."""
    launcher: Launcher | None = None
    """What has started the trainers, if anything that starts them again has."""
    _folder: RunFolder | None = None

    def check(self) -> None:
        """Refuses what can be refused before a claim, which would end who trains there now.

        Raises:
            ConfigError: The folder can't be written or is not seen by all, or it holds an earlier
                run that this one is neither to resume nor to overwrite.
            CheckpointError: The newest checkpoint is of another configuration.
            TakenOverError: Another start has taken the run over from the launcher.
        """
        folder = self.config.log.folder

        def look() -> None:
            if not self.trainers.is_first:
                return
            make_run_folder(folder).close()
            check_launcher(folder, self.launcher)
            if not (self.resume or self.overwrite):
                check_no_earlier_run(folder)
            for path in reversed(list_checkpoints(folder / "checkpoints") if self.resume else ()):
                try:
                    newest = read_checkpoint(path)
                except CheckpointError:  # damaged: told when one is chosen
                    continue
                check_resumable(newest, describe_run(self.config))
                break

        self.trainers.all_do("a look at log.folder", look, ConfigError)
        check_seen_by_all(folder, self.trainers)

    def has_checkpoints(self) -> bool:
        """Whether the folder has checkpoints, from which a start may go on."""

        def look() -> bool | None:
            checkpoints = self.config.log.folder / "checkpoints"
            return bool(list_checkpoints(checkpoints)) if self.trainers.is_first else None

        return bool(self.trainers.all_do("a look at the run's checkpoints", look)[0])

    @contextmanager
    def claimed(self) -> Iterator[Start]:
        """Claims the folder, and chooses the checkpoint; ends all older epochs.

        Raises:
            ConfigError, CheckpointError: As for `check`, and for `train`.
        """
        with ExitStack() as stack:
            self._folder = folder = self._claim(stack)
            if not self.takes_over:
                check_seen_by_all(folder.path, self.trainers)
            saved = self._choose(folder) if self.resume else None
            if saved is None and not self.overwrite:
                self.start_afresh(folder)
            yield Start(folder=folder, saved=saved)

    def start_afresh(self, folder: RunFolder) -> None:
        """Refuses an earlier run's checkpoints, or where it may, removes them."""

        def start() -> None:
            if self.trainers.is_first:
                start_afresh(folder, overwrite=self.overwrite)

        self.trainers.all_do("a fresh start", start, ConfigError)

    @contextmanager
    def takeover_told(self) -> Iterator[None]:
        """Whatever fails inside since a newer start has taken the run over, is told as that.

        Raises:
            TakenOverError: So it is.
        """
        try:
            yield
        except BagpipeError as error:
            if self._folder is not None:
                self._folder.check_held(error)
            raise

    def _claim(self, stack: ExitStack) -> RunFolder:
        folder = self.config.log.folder

        def claim() -> int | None:
            if not self.trainers.is_first:
                return None
            claimed = claim_run_folder(
                folder, self.reporter.say, takes_over=self.takes_over, launcher=self.launcher
            )
            return stack.enter_context(claimed).epoch

        epoch = self.trainers.all_do("rank 0 to claim the run's folder", claim, ConfigError)[0]
        return RunFolder(path=folder, epoch=epoch)

    def _choose(self, folder: RunFolder) -> SavedRun | None:
        """The newest valid checkpoint, the same on all ranks; tells how this run differs."""
        checkpoints, say = folder.checkpoints, self.reporter.say

        def find() -> str | None:
            if not self.trainers.is_first:
                return None
            found = find_checkpoint(
                checkpoints, on_damaged=lambda error: say(f"skipped a checkpoint: {error}")
            )
            if found is None and not self.is_from_another and (folder.path / FROM).exists():
                raise CheckpointError(
                    f"{checkpoints}: holds no checkpoint yet, and {told_before(folder.path)}: give "
                    "--from again, or --overwrite to start from nothing"
                )
            return None if found is None else found.path.name

        name = self.trainers.all_do("a checkpoint to resume from", find)[0]
        if name is None:
            how = "as --from says" if self.is_from_another else "afresh"
            say(f"{checkpoints} holds no checkpoint to resume from: starting {how}")
            return None
        saved = read_checkpoint(checkpoints / name)  # rank 0 has compared all files
        for difference in check_resumable(saved, describe_run(self.config)):
            say(f"resuming with another {difference}")
        for name, value in environment().items():
            if (before := saved.environment.get(name)) != value:
                say(
                    f"resuming with another {name}: {before!r} -> {value!r} (the last bits of the "
                    "results may differ)"
                )
        return saved
