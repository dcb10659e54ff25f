"""The folders of own loops: which checkpoints there are a loop's own, and who may save to them.

A loop goes on with the checkpoints that it saved or was restored from. Those of others in the same
folder it neither overwrites nor removes unasked.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from bagpipe.checkpoint.checkpoints import find_checkpoint, open_checkpoint
from bagpipe.checkpoint.epochs import RunFolder, claim_epoch
from bagpipe.checkpoint.files import list_checkpoints, step_of
from bagpipe.distributed.trainers import Trainers
from bagpipe.errors import ConfigError
from bagpipe.store.manifest import MANIFEST


@dataclass(frozen=True, kw_only=True)
class _Known:
    """What embeddings have to do with a run's folder."""

    newest_step: int
    """The step of the newest checkpoint there that they go on from, or that they saved."""
    run: RunFolder | None = None
    """As this process has claimed it, if it has."""


_runs: WeakKeyDictionary[Any, dict[Path, _Known]] = WeakKeyDictionary()
"""By embeddings."""


def note_saved(run: RunFolder, embeddings: object, step: int) -> None:
    """Takes it that `embeddings` have saved a checkpoint of `step` to a folder."""
    _runs.setdefault(embeddings, {})[run.path] = _Known(newest_step=step, run=run)


def note_restored(checkpoint: Path, embeddings: object, *, of_run: Path) -> None:
    """Takes it that `embeddings` go on from a checkpoint.

    If they were given the run's folder, and not the checkpoint's, all that is there is theirs.
    """
    run = checkpoint.parent.parent
    own = list_checkpoints(run / "checkpoints") if of_run == run else [checkpoint]
    newest_step = max(step_of(each) for each in own)
    _runs.setdefault(embeddings, {})[run] = _Known(newest_step=newest_step)


def claim_own(
    place: Path, embeddings: object, trainers: Trainers, *, overwrite: bool
) -> tuple[RunFolder, list[Path]]:
    """Has rank 0 claim a folder, once for all that these embeddings save there.

    Returns:
        The folder, and the checkpoints of others that are to go.

    Raises:
        ConfigError: there are some, and `overwrite` is not set.
        CheckpointError: the folder can't be written.
    """
    known = _runs.get(embeddings, {}).get(place)

    def claim() -> tuple[int, list[str]] | None:
        if not trainers.is_first:
            return None
        # a folder that the user has removed is claimed again
        if known is not None and known.run is not None and known.run.cuts.parent.exists():
            return known.run.epoch, []
        others = [
            path
            for path in list_checkpoints(place / "checkpoints")
            if known is None or step_of(path) > known.newest_step
        ]
        if others and not overwrite:
            raise ConfigError(
                f"{place}: holds checkpoints of another run, up to step {step_of(others[-1]):,}, "
                "which these embeddings were not restored from: restore them first, give another "
                "folder, or overwrite=True"
            )
        return claim_epoch(place, warn).epoch, [str(path) for path in others]

    epoch, others = trainers.all_do("rank 0 to claim the folder", claim, ConfigError)[0]
    return RunFolder(path=place, epoch=epoch), [Path(other) for other in others]


def find_own(place: Path) -> Path | None:
    """The checkpoint to restore, all of whose files have been compared; None: there is none.

    Args:
        place: a run's folder, whose newest valid checkpoint is taken, or a checkpoint's.

    Raises:
        CheckpointError: all that are there are damaged.
    """
    if (place / MANIFEST).exists():
        return open_checkpoint(place).path
    if place.parent.name == "checkpoints" and place.is_dir():  # half of one, which says so
        return open_checkpoint(place).path
    found = find_checkpoint(
        place / "checkpoints", on_damaged=lambda error: warn(f"skipped a checkpoint: {error}")
    )
    return None if found is None else found.path


def warn(text: str) -> None:
    """Says what a loop goes on in spite of."""
    warnings.warn(text, RuntimeWarning, stacklevel=3)
