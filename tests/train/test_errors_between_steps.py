"""An error between two steps loses nothing: what was trained before it is saved, the error says
where, and a run goes on from there as if nothing had happened.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tests.train.runs import NUM_STEPS, newest_files, small_config

from bagpipe.checkpoint.files import list_checkpoints, step_of
from bagpipe.config.run import RunConfig
from bagpipe.config.tables import make_tables
from bagpipe.data import open_source
from bagpipe.data.base import Batch
from bagpipe.errors import (
    BackgroundError,
    CacheTooSmallError,
    CheckpointError,
    DataError,
    LossError,
    LostError,
)
from bagpipe.feed.stream import Deferred
from bagpipe.optimizers import SGD
from bagpipe.oracle.row_trace import read_trace
from bagpipe.train import loop, saving
from bagpipe.train.report import SilentReporter
from bagpipe.train.schedule import RemainingBatches
from bagpipe.train.trainer import train
from bagpipe.types import group_tables

NUM_GOOD = 7


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    train(small_config(folder), reporter=SilentReporter())
    return folder


def steps_saved(folder: Path) -> list[int]:
    return [step_of(path) for path in list_checkpoints(folder / "checkpoints")]


class BadValue(RemainingBatches):
    """Ends in an error of the data behind a few good batches."""

    num_good: ClassVar[int] = NUM_GOOD

    def __iter__(self) -> Iterator[Deferred[Batch]]:
        yield from islice(super().__iter__(), self.num_good)
        self.fail()

    def fail(self) -> None:
        raise DataError("day_3.parquet, column 'age': a null")


class LostDisk(BadValue):
    def fail(self) -> None:
        raise OSError(5, "the disk is gone")


class Killed(BadValue):
    """The oracle process is, when some of the batches that it has read have been trained."""

    num_good = 20

    def fail(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def goes_on(folder: Path, undisturbed: Path, **sections: dict[str, Any]) -> None:
    train(small_config(folder, **sections), reporter=SilentReporter(), resume=True)
    assert newest_files(folder) == newest_files(undisturbed)


@pytest.mark.parametrize(
    ("batches", "oracle", "raised", "fact"),
    [
        (BadValue, "thread", DataError, "a null"),
        (BadValue, "process", DataError, "a null"),
        (LostDisk, "thread", BackgroundError, "the disk is gone"),
        (Killed, "process", LostError, "exit code -9"),
    ],
)
def test_what_was_trained_before_a_bad_batch_is_saved(
    batches: type[RemainingBatches],
    oracle: str,
    raised: type[Exception],
    fact: str,
    tmp_path: Path,
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = small_config(tmp_path, cache={"oracle": oracle}, checkpoint={"at_end": False})
    with monkeypatch.context() as patch:
        patch.setattr(loop, "RemainingBatches", batches)
        with pytest.raises(raised, match=fact) as caught:
            train(config, reporter=SilentReporter())
    (step,) = steps_saved(tmp_path)
    assert step == NUM_GOOD or (batches is Killed and 0 < step <= Killed.num_good)
    (note,) = caught.value.__notes__
    assert f"{step} steps are saved in {tmp_path}/checkpoints/step-" in note
    assert "--resume goes on from there" in note
    goes_on(tmp_path, undisturbed)


def rows_of_batches(config: RunConfig) -> list[int]:
    """Unique rows of each batch of an epoch."""
    source = open_source(config.data, "train")
    groups = group_tables(make_tables(source.features, config), SGD(lr=1.0))
    sparse = (batch.sparse for batch in source.batches(batch_size=config.train.batch_size))
    trace = read_trace(groups, sparse, max_batches=NUM_STEPS)
    return [len(batch.groups[0].unique_rows) for batch in trace.batches]


def test_a_cache_too_small_for_a_later_batch_loses_nothing_and_the_size_told_is_enough(
    tmp_path: Path, undisturbed: Path
) -> None:
    needs = rows_of_batches(small_config(tmp_path))
    size = max(needs[:3]) + 1
    refused = next(step for step, need in enumerate(needs) if need > size)
    assert 3 <= refused
    assert needs[refused] < max(needs)  # or any error would tell enough
    with pytest.raises(CacheTooSmallError) as caught:
        train(small_config(tmp_path, cache={"size": size}), reporter=SilentReporter())
    assert f"step {refused} uses {needs[refused]} unique rows" in str(caught.value)
    assert f"give the cache at least {max(needs)} rows" in str(caught.value)
    assert steps_saved(tmp_path) == [refused]
    goes_on(tmp_path, undisturbed, cache={"size": caught.value.cache_rows})


def test_before_the_first_step_there_is_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(CacheTooSmallError) as caught:
        train(small_config(tmp_path, cache={"size": 20}), reporter=SilentReporter())
    assert not hasattr(caught.value, "__notes__")
    assert steps_saved(tmp_path) == []
    train(small_config(tmp_path, train={"steps": 1}), reporter=SilentReporter())


def test_a_resumed_run_that_fails_at_once_says_from_where_to_go_on(tmp_path: Path) -> None:
    train(small_config(tmp_path, train={"steps": 4}), reporter=SilentReporter())
    with pytest.raises(CacheTooSmallError) as caught:
        train(small_config(tmp_path, cache={"size": 20}), reporter=SilentReporter(), resume=True)
    assert "4 steps are saved in" in caught.value.__notes__[0]


def test_an_evaluation_that_fails_loses_nothing(
    tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise DataError("validation.parquet, column 'age': a null")

    config = small_config(tmp_path, train={"eval_every_steps": 5})
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", fail)
        with pytest.raises(DataError) as caught:
            train(config, reporter=SilentReporter())
    assert steps_saved(tmp_path) == [5]
    assert "5 steps are saved in" in caught.value.__notes__[0]
    goes_on(tmp_path, undisturbed)


def test_where_saving_fails_too_both_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise CheckpointError("no space left")

    monkeypatch.setattr(loop, "RemainingBatches", BadValue)
    monkeypatch.setattr(saving, "save_checkpoint", fail)
    with pytest.raises(DataError, match="a null") as caught:
        train(small_config(tmp_path), reporter=SilentReporter())
    assert caught.value.__notes__ == [f"the {NUM_GOOD} steps before can't be saved: no space left"]


def test_a_step_that_fails_and_a_loss_that_is_not_finite_are_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diverging = {
        "model": {"top": [8] * 8 + [1]},
        "train": {"optimizer": {"kind": "sgd", "lr": 1e6}},
    }
    with pytest.raises(LossError):
        train(small_config(tmp_path / "loss", **diverging), reporter=SilentReporter())
    assert steps_saved(tmp_path / "loss") == []
    monkeypatch.setattr(loop, "RemainingBatches", BadValue)
    config = small_config(tmp_path / "bad", **diverging, log={"every_steps": 100})
    with pytest.raises(DataError, match="a null") as caught:  # before anybody looked at the loss
        train(config, reporter=SilentReporter())
    assert re.search(r"can't be saved: step \d+: the loss is", caught.value.__notes__[0])
    assert steps_saved(tmp_path / "bad") == []
