"""A run's records as files: one JSON object a line in log.jsonl, and the same numbers for TensorBoard.

Every record has a `kind` ("start", "train", "evaluation", "checkpoint", "end") and a `step`. A resumed run first drops the
records of steps that it will train again, so that the log reads as that of an undisturbed run.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch.utils.tensorboard import SummaryWriter

LOG_NAME = "log.jsonl"


class RunLog:
    """Writes records; a context manager, which closes its files.

    Args:
        folder: the run's folder, which exists.
        step: the step that the run resumes from: records of later steps are dropped. None: a fresh run, all are.
        tensorboard: whether to write for TensorBoard too, into `folder`/tensorboard.
    """

    def __init__(self, folder: Path, *, step: int | None, tensorboard: bool) -> None:
        path = folder / LOG_NAME
        _drop_records_after(path, -1 if step is None else step)
        self._file = path.open("a", buffering=1, encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=(step or 0) + 1) if tensorboard else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Adds a record; its numbers become TensorBoard scalars named `kind`/name."""
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        if self._board is None:
            return
        for name, value in values.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self._board.add_scalar(f"{kind}/{name}", value, step)


def _drop_records_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
    replacement = path.with_suffix(".jsonl.tmp")
    replacement.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    replacement.replace(path)


def _step_of(line: str) -> float:
    """The step of a record; infinity for the half of one that a killed process leaves."""
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        return float("inf")
