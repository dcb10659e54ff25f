"""What a mistake in the package's own shard and cut store would look like: the model finds it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.model.cases import first_wrong
from tests.model.real import SteppedStore, real_shard
from tests.model.rules import ALL, Rules

from bagpipe.server.shard import Checkpoint, Shard
from bagpipe.server.wire import Header
from bagpipe.store.array import TOUCHED
from bagpipe.store.flags import DUE, fold
from bagpipe.store.record_files import RecordFile
from bagpipe.types import Float32Array, Int64Array

MOST_CASES = 200


class AnyEpoch(Shard):
    """Takes messages of every epoch."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.serving.check_epoch = lambda *_: None  # type: ignore[method-assign]


class UncheckedWrites(Shard):
    """Relies on the check at arrival."""

    def write(self, header: Header, rows: Int64Array, records: Float32Array) -> None:
        self._stores[header.group].write(rows, records)
        self._note(header)

    def mark(self, header: Header) -> None:
        self._note(header)

    def _note(self, header: Header) -> None:
        marks = self.serving._marks
        if header.rank < len(marks):
            steps = header.steps.overlapped, header.steps.urgent
            np.maximum(marks[header.rank], steps, out=marks[header.rank])


class KeptMarks(Shard):
    def begin(
        self, epoch: int, num_ranks: int, checkpoint: Checkpoint | None = None, *, run: str = ""
    ) -> str:
        before = self.serving._marks
        instance = super().begin(epoch, num_ranks, checkpoint, run=run)
        same = min(num_ranks, len(before))
        marks = self.serving._marks
        marks[:same] = np.maximum(marks[:same], before[:same])
        return instance


class NoOldValues(SteppedStore):
    def write(self, rows: Int64Array, records: Float32Array) -> None:
        self._store.write(rows, records)


class StaysWritten(SteppedStore):
    """Rows first written since the base keep their records when they are put back."""

    def _load(self, *arguments: Any) -> int:
        num_written = super()._load(*arguments)
        self._store.flags[self._store.flags == DUE] = TOUCHED
        return num_written

    def put_back(
        self,
        folder: Path,
        files: Iterable[RecordFile],
        check: Callable[[], None] = lambda: None,
    ) -> int:
        """Without files, too, which are not loaded."""
        flags = self._store.flags.copy()
        files = tuple(files)
        num_written = super().put_back(folder, files, check)
        if not files:
            self._store.flags[flags != 0] = TOUCHED
        return num_written


class ForgottenRows(SteppedStore):
    """Rows of a cut that failed are in no later one."""

    def abandon(self) -> None:
        with self._gate.alone():
            if self._cut is not None:
                fold(self._store.flags, TOUCHED)
                self._settle(self.base)


@pytest.mark.parametrize(
    ("planted", "rules"),
    [
        (AnyEpoch, ALL),
        (UncheckedWrites, replace(ALL, checked_when_applied=False)),
        (KeptMarks, ALL),
        (NoOldValues, ALL),
        (StaysWritten, ALL),
        (ForgottenRows, ALL),
    ],
)
def test_a_planted_mistake_is_found(
    planted: type[Shard] | type[SteppedStore], rules: Rules, tmp_path: Path
) -> None:
    is_shard = issubclass(planted, Shard)
    for seed in range(MOST_CASES):
        folder = tmp_path / str(seed)
        folder.mkdir()
        make_shard = real_shard(
            folder,
            store_type=SteppedStore if is_shard else planted,
            shard_type=planted if is_shard else Shard,
        )
        seeds = range(seed, seed + 1)
        if first_wrong(seeds, rules, make_shard=make_shard, num_traces=10) is not None:
            return
    pytest.fail(f"{planted.__name__} was not found in {MOST_CASES} cases")
