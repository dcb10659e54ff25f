"""Epochs in a run's folder: each start of all trainers claims a number, and ends all older ones.

    epochs/
      7/claim.json     who claimed it, when, of which run; stays, so that no number is used twice
      7/ended/         what was `cuts`: renamed away by a later epoch
      8/claim.json
      8/cuts/          the only place in which epoch 8 writes what is to become a checkpoint

An older epoch's processes may still run, stopped or cut off. All that they could do to the run's
checkpoints is a rename from or into their own `cuts`, and that folder is gone. So a claim needs no
lock, which a stopped process would hold for ever, and which not every network file system has. See
docs/protocol.md.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bagpipe.distributed.trainers import Launcher
from bagpipe.errors import CheckpointError, TakenOverError
from bagpipe.native.files import make_folder, remedy, sync_folder

_CLAIM, _CUTS, _ENDED = "claim.json", "cuts", "ended"
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
_NUMBER = re.compile(r"[1-9][0-9]{0,17}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """A run's folder, as an epoch has claimed it."""

    path: Path
    epoch: int

    @property
    def checkpoints(self) -> Path:
        """The folder of all checkpoints."""
        return self.path / "checkpoints"

    @property
    def cuts(self) -> Path:
        """Where this epoch writes what is to become a checkpoint."""
        return self.path / "epochs" / str(self.epoch) / _CUTS

    @property
    def identity(self) -> str:
        """Tells this run from others, whatever their folders are called."""
        return name_of_run(self.path) or ""

    def check_held(self, cause: Exception | None = None) -> None:
        """Raises TakenOverError, of that cause, where a newer start has ended this epoch.

        It costs a look at one folder.
        """
        if self.cuts.is_dir():
            return
        epochs = self.path / "epochs"
        try:
            newest = max(_numbers(epochs), default=0)
        except OSError:
            return
        if newest > self.epoch:
            raise TakenOverError(
                f"epoch {self.epoch} of the run in {self.path} has ended: epoch {newest}"
                f"{_who_claimed(epochs / str(newest))} has taken the run over and goes on from its "
                "newest checkpoint. Leave it the folder: end what would start these trainers again"
            ) from cause

    def take_away(self, checkpoint: Path) -> Path:
        """Renames a checkpoint out of the way, so that nobody finds a half removed one.

        Returns:
            Where it is now, to be removed.

        Raises:
            FileNotFoundError: A later epoch has begun.
        """
        doomed = self.cuts / f"old-{checkpoint.name}-{secrets.token_hex(4)}"
        checkpoint.rename(doomed)
        return doomed


def claim_epoch(
    path: Path,
    say: Callable[[str], None] = lambda _: None,
    *,
    launcher: Launcher | None = None,
) -> RunFolder:
    """Claims the next epoch of the run in a folder, and ends all older ones.

    What they had begun to write is removed; `say` is told what can't be, which is in nobody's way.
    The claim names the `launcher`, if there is one.

    Raises:
        CheckpointError: The folder can't be written.
    """
    epochs = path / "epochs"
    try:
        make_folder(epochs)
        number = _claim(epochs, launcher)
        _end_before(epochs, number, say)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or epochs}: a start of the run can't be noted there: "
            f"{error.strerror or error}. {remedy(error)}, or give the run another folder"
        ) from error
    return RunFolder(path=path, epoch=number)


def check_launcher(path: Path, launcher: Launcher | None) -> None:
    """Refuses a launcher's restart where another start has taken the run over from it.

    Two launchers would otherwise take the run from each other for ever.

    Raises:
        TakenOverError: So it is.
    """
    epochs = path / "epochs"
    if launcher is None or not launcher.is_restart or not epochs.is_dir():
        return
    claims = {number: _claim_of(epochs / str(number)) for number in _numbers(epochs)}
    own = [number for number, claim in claims.items() if claim.get("launcher") == launcher.name]
    if own and own[-1] < max(claims):
        raise TakenOverError(
            f"epoch {max(claims)}{_who_claimed(epochs / str(max(claims)))} has taken the run in "
            f"{path} over from epoch {own[-1]} of this launcher, which may not take it back by "
            "itself: end it, or start a new one that does"
        )


def _claim(epochs: Path, launcher: Launcher | None) -> int:
    """Puts a folder in place whole, under the lowest number above all that are there."""
    claimed = epochs / f".new-{secrets.token_hex(8)}"
    (claimed / _CUTS).mkdir(parents=True)
    run = name_of_run(epochs.parent)
    claim = {
        "run": run or f"{epochs.resolve().parent.name[:100]}-{secrets.token_hex(8)}",
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "time_s": time.time(),
        "launcher": None if launcher is None else launcher.name,
    }
    with (claimed / _CLAIM).open("w") as file:
        json.dump(claim, file)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(claimed)
    number = max(_numbers(epochs), default=0)  # also of what is no epoch's
    while True:
        number += 1
        try:
            claimed.rename(epochs / str(number))
        except OSError as error:
            if error.errno not in _TAKEN:  # by another start, at this moment
                raise
        else:
            sync_folder(epochs)
            return number


def _end_before(epochs: Path, number: int, say: Callable[[str], None]) -> None:
    """Takes all older epochs their folder of cuts, durably, then removes what was in there."""
    for older in _numbers(epochs):
        if older >= number:
            break
        folder = epochs / str(older)
        try:
            (folder / _CUTS).rename(folder / _ENDED)
        except (FileNotFoundError, NotADirectoryError):
            continue  # ended before, or no epoch's
        sync_folder(folder)
    for each in _numbers(epochs):
        left = epochs / str(each) / _ENDED
        try:
            shutil.rmtree(left)
        except (FileNotFoundError, NotADirectoryError):
            pass  # removed before, or no epoch's
        except OSError as error:
            say(
                f"{left}: is no longer needed, but can't be removed: {error.strerror or error}; "
                "the run goes on"
            )


def _numbers(epochs: Path) -> list[int]:
    """Those that are taken, ascending; what else is there is left alone."""
    return sorted(int(path.name) for path in epochs.iterdir() if _NUMBER.fullmatch(path.name))


def name_of_run(path: Path) -> str | None:
    """The name of the run in a folder, which its oldest claim tells; None: there is no claim."""
    epochs = path / "epochs"
    for number in _numbers(epochs) if epochs.is_dir() else ():
        claim = _claim_of(epochs / str(number))
        if "run" in claim:
            return str(claim["run"])
    return None


def _who_claimed(epoch: Path) -> str:
    claim = _claim_of(epoch)
    return (
        f" of process {claim['pid']} on host {claim['host']}"
        if {"host", "pid"} <= claim.keys()
        else ""
    )


def _claim_of(epoch: Path) -> dict[str, Any]:
    """What an epoch's claim says; nothing where it was removed by hand, or is none of ours."""
    try:
        claim = json.loads((epoch / _CLAIM).read_text())
    except (OSError, ValueError):
        return {}
    return claim if isinstance(claim, dict) else {}
