"""A run's folder: made, locked for one process, and asked what an earlier run left in it."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from tempfile import NamedTemporaryFile

from bagpipe.checkpoint.epochs import RunFolder, claim_epoch
from bagpipe.checkpoint.files import BEST, FROM, list_checkpoints, step_of
from bagpipe.distributed.trainers import Launcher, Trainers
from bagpipe.errors import ConfigError
from bagpipe.native.files import make_folder
from bagpipe.native.fork import in_child


def make_run_folder(folder: Path) -> TextIOWrapper:
    """Makes the folder, and returns its lock, open. ConfigError: it can't be written."""
    try:
        make_folder(folder / "checkpoints")
        return (folder / "lock").open("w")
    except OSError as error:
        raise ConfigError(
            f"log.folder = {str(folder)!r}: can't be written: {error.strerror}: give another one"
        ) from error


@contextmanager
def claim_run_folder(
    folder: Path,
    say: Callable[[str], None] = lambda _: None,
    *,
    takes_over: bool = False,
    launcher: Launcher | None = None,
) -> Iterator[RunFolder]:
    """Makes the folder, holds it for this process, and claims an epoch in it.

    Unfinished checkpoints are removed; `say` is told which can't be. The operating system lets go
    of the folder when the process ends, however it ends.

    Args:
        folder: the run's.
        say: told what is in nobody's way.
        takes_over: whether a process that trains in it is no reason to refuse. Its epoch ends: its
            shard servers leave it, and it can't change checkpoints any more. It may be stopped, and
            would never let go.
        launcher: what has started this process, if anything that starts it again has.

    Raises:
        ConfigError: the folder can't be written, or another process trains in it.
    """
    lock = make_run_folder(folder)
    in_child(lock, TextIOWrapper.close)  # which would hold it after this process has ended
    with lock:
        try:
            if not takes_over:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"log.folder = {str(folder)!r}: another process trains in it: give another one"
            ) from error
        yield claim_epoch(folder, say, launcher=launcher)


def check_seen_by_all(folder: Path, trainers: Trainers) -> None:
    """Raises ConfigError on all ranks unless each host sees what rank 0 puts into `folder`."""
    if trainers.peers.hosts.num_hosts == 1:
        return
    with ExitStack() as stack:

        def put() -> str | None:
            return (
                Path(stack.enter_context(NamedTemporaryFile(dir=folder, prefix=".seen-")).name).name
                if trainers.is_first
                else None
            )

        def look() -> None:
            if not (folder / name).exists():
                raise ConfigError(
                    f"log.folder = {str(folder)!r}: this host does not see what rank 0 writes "
                    "there: give one on a file system "
                    "that all hosts share"
                )

        name = trainers.all_do("a file in log.folder", put, ConfigError)[0]
        trainers.all_do("a look at log.folder", look, ConfigError)


def check_no_earlier_run(folder: Path) -> None:
    """Raises ConfigError where a run's folder holds checkpoints."""
    left = list_checkpoints(folder / "checkpoints")
    if left:
        raise ConfigError(
            f"log.folder = {str(folder)!r}: holds checkpoints of an earlier run, up to "
            f"step {step_of(left[-1]):,}: "
            "go on with it (--resume), remove them (--overwrite), or give another folder"
        )


def start_afresh(run: RunFolder, *, overwrite: bool) -> None:
    """Makes sure that a new run mixes with no older one.

    With `overwrite` the checkpoints of an earlier run are removed.

    Raises:
        ConfigError: there are some, and `overwrite` is not set, or they can't be removed.
    """
    if not overwrite:
        check_no_earlier_run(run.path)
    for name in (BEST, FROM):
        with suppress(OSError):
            (run.path / name).unlink()
    for path in list_checkpoints(run.checkpoints):
        try:
            shutil.rmtree(run.take_away(path))
        except OSError as error:
            raise ConfigError(
                f"{error.filename or path}: of an earlier run, can't be removed: "
                f"{error.strerror or error}: remove {path}, or give another log.folder"
            ) from error


def told_before(folder: Path) -> str | None:
    """From where the run in a folder has started, as a sentence; None: from nothing."""
    try:
        told = json.loads((folder / FROM).read_text(encoding="utf-8"))
        return f"this run started from step {told['from_step']:,} of {told['checkpoint']}"
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return f"this run started from another one; {folder / FROM} can't be read"
