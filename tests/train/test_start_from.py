"""`bagpipe train --from RUN`: what a run takes of another one, what is fresh, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.train.runs import Listener, newest_files, small_config
from torch.nn.functional import binary_cross_entropy_with_logits

from bagpipe.checkpoint.checkpoints import load_checkpoint
from bagpipe.checkpoint.dense import dense_state_dict, read_dense
from bagpipe.checkpoint.files import FROM, list_checkpoints
from bagpipe.config.run import RunConfig
from bagpipe.distributed.trainers import Trainers
from bagpipe.errors import BagpipeError, CheckpointError, ConfigError
from bagpipe.train.build import Run, build_run
from bagpipe.train.report import SilentReporter
from bagpipe.train.saved import any_split, find_saved, load_model, open_saved
from bagpipe.train.start_from import StartFrom, find_source
from bagpipe.train.torch_batch import TorchBatch
from bagpipe.train.trainer import train
from bagpipe.types import Float32Array

EPOCH = 16  # steps of 32 of the 500 samples
ADAM = {"optimizer": {"kind": "adam", "lr": 0.05}}
DENSE_ADAM = {"kind": "adam", "lr": 0.01}
SIZES = [40, 300, 90]
MORE = [50, 300, 120, 30]


def data_of(sizes: list[int], **extra: Any) -> dict[str, Any]:
    return {
        "kind": "synthetic",
        "num_samples": 500,
        "num_embeddings": sizes,
        "num_dense": 3,
        **extra,
    }


@pytest.fixture(scope="module")
def day1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch, with rows that no batch has touched."""
    folder = tmp_path_factory.mktemp("day1")
    train(small_config(folder, train={"steps": EPOCH}), reporter=SilentReporter())
    return folder


@contextmanager
def started(config: RunConfig, source: Path | None) -> Iterator[tuple[Run, list[str]]]:
    """A run as it is before its first step."""
    trainers, listener = Trainers(), Listener()
    with build_run(config) as run:
        if source is not None:
            saved = find_source(source, config, trainers, listener)
            config.log.folder.mkdir(exist_ok=True)
            StartFrom(saved=saved, run=run, trainers=trainers).load(config.log.folder, listener)
        yield run, listener.said


def records_of(run: Run) -> dict[str, Float32Array]:
    """The record of each row of each table."""
    found = {}
    for group, store in zip(run.embeddings.groups, run.embeddings.stores, strict=True):
        records = np.empty((group.num_rows, group.record_width), np.float32)
        store.fetch(np.arange(group.num_rows), records)
        for table, first in zip(group.tables, group.row_offsets, strict=False):
            found[table.name] = records[first : first + table.num_embeddings]
    return found


def records_in(folder: Path, config: RunConfig) -> dict[str, Float32Array]:
    """The same of a run's last checkpoint."""
    with build_run(config) as run:
        load_checkpoint(find_saved(folder, "last"), run.state)
        return records_of(run)


def losses(folder: Path) -> list[float]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if line["kind"] == "train"]


@pytest.mark.parametrize(
    ("embeddings", "dense"), [({}, None), (ADAM, DENSE_ADAM)], ids=["adagrad", "adam"]
)
def test_with_all_alike_it_trains_as_a_run_that_is_resumed(
    tmp_path: Path, embeddings: dict[str, Any], dense: dict[str, Any] | None
) -> None:
    """Which has Adam's count of updates go on, though steps begin anew."""
    source, resumed, other = (tmp_path / name for name in ("source", "resumed", "other"))

    def config(folder: Path, **settings: Any) -> RunConfig:
        # data of one batch, which every epoch has alike
        return small_config(
            folder,
            data=data_of(SIZES, num_samples=32),
            embeddings=embeddings,
            train={"steps": 5, "optimizer": dense, **settings},
            log={"folder": str(folder), "every_steps": 1},
        )

    train(config(source), reporter=SilentReporter())
    shutil.copytree(source, resumed)
    train(config(resumed, steps=9), reporter=SilentReporter(), resume=True)
    train(config(other, steps=4), reporter=SilentReporter(), start_from=source)
    assert losses(other) == losses(resumed)[5:]
    ends = [newest_files(folder) for folder in (other, resumed)]
    assert [end["step"] for end in ends] == ["4", "9"]
    assert ends[0]["group-0.arrow"] == ends[1]["group-0.arrow"]
    contents = [
        read_dense(list_checkpoints(folder / "checkpoints")[-1] / "dense.pt")
        for folder in (other, resumed)
    ]
    for name, value in contents[0]["model"].items():
        assert torch.equal(value, contents[1]["model"][name])


def test_the_first_loss_is_that_of_the_model_that_was_saved(tmp_path: Path, day1: Path) -> None:
    folder = tmp_path / "day2"
    log = {"folder": str(folder), "every_steps": 1}
    config = small_config(folder, train={"steps": 1}, log=log)
    train(config, reporter=SilentReporter(), start_from=day1)
    with load_model(open_saved(day1)) as loaded:
        batch = TorchBatch.of(next(any_split(config).batches(batch_size=32)))
        with torch.no_grad():
            logits = loaded.model(batch.dense, batch.sparse)
    assert losses(folder) == [binary_cross_entropy_with_logits(logits, batch.labels).item()]


def test_tables_may_grow_and_come_new(tmp_path: Path, day1: Path) -> None:
    config = small_config(tmp_path / "day2", data=data_of(MORE))
    before = records_in(day1, small_config(day1))
    with started(config, None) as (run, _):
        fresh, fresh_dense = records_of(run), dense_state_dict(run.model)
    with started(config, day1) as (run, said):
        now, dense = records_of(run), dense_state_dict(run.model)
        assert run.embeddings.step == 0
    assert now.keys() == {"C1", "C2", "C3", "C4"}
    for name, records in before.items():  # rows that were never touched, too
        np.testing.assert_array_equal(now[name][: len(records)], records)
        np.testing.assert_array_equal(now[name][len(records) :], fresh[name][len(records) :])
    np.testing.assert_array_equal(now["C4"], fresh["C4"])
    saved = read_dense(find_saved(day1, "last").path / "dense.pt")["model"]
    other = [name for name in dense if saved[name].shape != dense[name].shape]
    assert len(other) == 1  # of the layer that sees the interactions
    for name, value in dense.items():
        assert torch.equal(value, fresh_dense[name] if name in other else saved[name])
    text = "\n".join(said)
    assert "new rows: C1 10, C3 30" in text
    assert "new tables, with their rows: C4 30" in text
    assert f"dense part with its optimizer state, but for {other[0]}, which are fresh" in text
    train(config, reporter=SilentReporter(), start_from=day1)


def test_another_seed_init_optimizer_and_rate_leave_weights_as_they_were(
    tmp_path: Path, day1: Path
) -> None:
    config = small_config(
        tmp_path / "day2",
        embeddings=ADAM | {"init": {"kind": "uniform", "low": 0.5, "high": 0.6}},
        train={"seed": 5, "optimizer": DENSE_ADAM},
    )
    before = records_in(day1, small_config(day1))
    with started(config, day1) as (run, said):
        for name, records in records_of(run).items():
            np.testing.assert_array_equal(records[:, :4], before[name][:, :4])
            assert not records[:, 4:].any()
        assert run.optimizer.param_groups[0]["lr"] == 0.01
        assert not run.optimizer.state
        assert run.embeddings.num_skipped == [0]
    assert "tables with fresh optimizer state, as the optimizer is another: C1, C2, C3" in said
    assert "dense part with fresh optimizer state" in said


def test_rates_are_its_own(tmp_path: Path, day1: Path) -> None:
    adagrad = {"kind": "adagrad", "lr": 0.5}
    config = small_config(
        tmp_path / "day2",
        embeddings={"optimizer": {"kind": "rowwise_adagrad", "lr": 0.3}},
        train={"optimizer": adagrad},
    )
    with started(config, day1) as (run, said):
        assert run.optimizer.param_groups[0]["lr"] == 0.5
        assert run.embeddings.lr == 0.3
        (state, *_) = run.optimizer.state.values()
        assert state["step"] == EPOCH
    assert "tables with their optimizer state: C1, C2, C3" in said


def test_it_says_where_it_comes_from_and_goes_on_by_itself(tmp_path: Path, day1: Path) -> None:
    folder = tmp_path / "day2"
    config = small_config(folder, train={"steps": 2}, checkpoint={"at_end": False})
    listener = Listener()
    train(config, reporter=listener, start_from=day1)
    source = find_saved(day1, "last").path
    assert f"starts from step {EPOCH} of {source}" in listener.said
    told = json.loads((folder / FROM).read_text())
    assert (told["checkpoint"], told["from_step"]) == (str(source), EPOCH)
    assert told["tables"]["C2"] == {
        "num_rows": 300,
        "num_new_rows": 0,
        "has_optimizer_state": True,
    }
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    (event,) = [event for event in events if event["kind"] == "from"]
    assert (event["checkpoint"], event["step"], event["from_step"]) == (str(source), 0, EPOCH)
    # nothing is saved yet: alone it would start from nothing
    with pytest.raises(
        CheckpointError,
        match=rf"no checkpoint yet, and this run started from step "
        rf"{EPOCH} of .*: give --from again, or --overwrite",
    ):
        train(config, reporter=SilentReporter(), resume=True)
    saving = small_config(folder, train={"steps": 2})
    train(saving, reporter=SilentReporter(), resume=True, start_from=day1)
    more = small_config(folder, train={"steps": 3})
    gone = tmp_path / "gone"  # which is not needed any more
    train(more, reporter=(listener := Listener()), resume=True, start_from=gone)
    assert any(text.startswith("resumed from step 2") for text in listener.said)
    assert f"this run started from step {EPOCH} of {source}" in listener.said
    train(saving, reporter=SilentReporter(), overwrite=True)
    assert not (folder / FROM).exists()


def test_what_can_not_be_is_refused_and_removes_nothing(tmp_path: Path, day1: Path) -> None:
    folder = tmp_path / "day2"
    train(small_config(folder, train={"steps": 1}), reporter=SilentReporter())
    before = newest_files(folder)
    wide = {"embedding_dim": 8}
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"embeddings": wide, "model": {"bottom": [8, 8]}},
            "table 'C1' has embedding_dim 4 there and 8 here",
        ),
        ({"embeddings": {"data_type": "bf16"}}, "'C1' has data_type 'fp32' there and 'bf16' here"),
        ({"data": data_of(SIZES[:2])}, "table 'C3' is there, and not here"),
        ({"data": data_of([39, 300, 90])}, "table 'C1' has 40 rows there and 39 here, which has"),
        (
            {"model": {"kind": "dcn", "bottom": [8, 4], "top": [8, 1]}},
            "'dlrm' there and 'dcn' here",
        ),
        ({"model": {"bottom": [9, 4]}}, "holds another model: "),
    ]
    for sections, message in cases:
        config = small_config(folder, **sections)
        with pytest.raises(CheckpointError) as told:
            train(config, reporter=SilentReporter(), overwrite=True, start_from=day1)
        text = str(told.value)
        assert message in text
        assert str(day1) in text
        assert "Set these as they are there, or start without --from" in text
    assert newest_files(folder) == before


def test_what_is_no_other_run_is_refused(tmp_path: Path, day1: Path) -> None:
    config = small_config(tmp_path / "day2")
    own = small_config(day1)
    cases: list[tuple[RunConfig, Path, type[BagpipeError], str]] = [
        (own, day1, ConfigError, "is in the run's own folder, log.folder"),
        (own, find_saved(day1, "last").path, ConfigError, "--resume goes on with it"),
        (config, tmp_path / "none", CheckpointError, "there is no such folder"),
        (config, tmp_path, CheckpointError, "holds no checkpoint"),
    ]
    for settings, source, kind, message in cases:
        with pytest.raises(kind, match=message):
            train(settings, reporter=SilentReporter(), start_from=source)
    damaged = tmp_path / "damaged"
    shutil.copytree(day1, damaged)
    (path,) = list_checkpoints(damaged / "checkpoints")
    (path / "group-0.arrow").write_bytes(b"x" * (path / "group-0.arrow").stat().st_size)
    with pytest.raises(CheckpointError, match=r"group-0\.arrow: is damaged"):
        train(config, reporter=SilentReporter(), start_from=damaged)
    assert not list_checkpoints(tmp_path / "day2" / "checkpoints")
