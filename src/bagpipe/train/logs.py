"""A run's records as files: JSON lines in log.jsonl, and what TensorBoard charts of them.

Every record has a `kind` ("start", "train", "evaluation", "checkpoint", "end") and a `step`.
TensorBoard charts the numbers of "train" and "evaluation", which come again and again. From "start"
it gets the configuration, as hyper-parameters and as text. A resumed run first drops the records of
steps that it will train again, so that the log reads as that of an undisturbed run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from bagpipe.config.metrics import score_name
from bagpipe.errors import ConfigError
from bagpipe.native.files import replaced

LOG_NAME = "log.jsonl"
CHARTED = ("train", "evaluation")
"""Kinds of records whose numbers make curves."""


class RunLog:
    """Writes records; a context manager, which closes its files.

    Args:
        folder: the run's folder, which exists.
        step: the step that the run resumes from: records of later steps are dropped. None: a fresh
            run, all are.
        tensorboard: whether to write for TensorBoard too, into `folder`/tensorboard.
        on_failure: told once when a record can't be written, as on a full disk; the run is worth
            more than its log.

    Raises:
        ConfigError: the files can't be made, or an earlier log not be cut.
    """

    def __init__(
        self,
        folder: Path,
        *,
        step: int | None,
        tensorboard: bool,
        on_failure: Callable[[str], None] = lambda _: None,
    ) -> None:
        path = folder / LOG_NAME
        self._on_failure: Callable[[str], None] | None = on_failure
        try:
            _drop_records_after(path, -1 if step is None else step)
            self._board = (
                SummaryWriter(str(folder / "tensorboard"), purge_step=(step or 0) + 1)
                if tensorboard
                else None
            )
            self._file = path.open("a", buffering=1, encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"{error.filename or path}: can't be written: {error.strerror or error}: make "
                "room, or give another log.folder"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._failures_told(), self._file:
            if self._board is not None:
                self._board.close()

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Adds a record; TensorBoard gets what it can chart, as `kind`/name."""
        with self._failures_told():
            self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            if self._board is None:
                return
            if kind in CHARTED:
                for name, value in values.items():
                    if isinstance(value, int | float):
                        self._board.add_scalar(f"{kind}/{name}", value, step)
            elif kind == "start" and "config" in values:
                labels = values.get("labels", ("label",))
                _write_settings(self._board, values["config"], labels, step)

    @contextmanager
    def _failures_told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self._on_failure is not None:
                self._on_failure(
                    f"{self._file.name}: can't be written: {error.strerror}; the run goes on "
                    "without some of its log"
                )
                self._on_failure = None


class NoLog:
    """Writes nothing, for trainers other than the first."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Does nothing."""

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Does nothing."""


def _write_settings(
    board: SummaryWriter, config: Mapping[str, Any], labels: Sequence[str], step: int
) -> None:
    """Writes a configuration as TensorBoard's hyper-parameters and as text.

    `SummaryWriter.add_hparams` would make a run of its own for them, with charts of one point.
    """
    flat = dict(_flat(config))
    # of scores only the names count here: their values are in the charts of these names
    metrics = config.get("train", {}).get("metrics", ())
    scores = [score_name(metric, label, labels) for label in labels for metric in metrics]
    charts = ["train/loss", *(f"evaluation/{score}" for score in scores)]
    summaries = hparams(flat, dict.fromkeys(charts, 0.0))
    for summary in summaries:
        board.file_writer.add_summary(summary, step)  # type: ignore[attr-defined]
    board.add_text("config", f"```json\n{json.dumps(config, indent=2)}\n```", step)


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each setting under its name in the file, such as train.batch_size."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None:
            plain = isinstance(value, bool | int | float | str)
            yield f"{prefix}{name}", value if plain else json.dumps(value)


def _drop_records_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [
        line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step
    ]
    with replaced(path) as replacement:
        replacement.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def _step_of(line: str) -> float:
    """The step of a record; infinity for the half of one that a killed process leaves."""
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        return float("inf")
