"""A resumed run trains the batches that are left, each once and in its place, wherever in an epoch
it was stopped: data in another order each epoch, against what the order says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.train.runs import newest_files, small_config

from bagpipe.checkpoint.files import list_checkpoints
from bagpipe.config.data import PrepareConfig
from bagpipe.config.run import RunConfig
from bagpipe.data.prepare import prepare
from bagpipe.data.prepared import PreparedSource
from bagpipe.store.manifest import read_manifest
from bagpipe.train.dense_step import DenseStep
from bagpipe.train.report import SilentReporter
from bagpipe.train.trainer import train

NUM_ROWS, BATCH_SIZE, NUM_EPOCHS = 44, 10, 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows whose dense feature is their number."""
    folder = tmp_path_factory.mktemp("resume")
    rows = np.arange(NUM_ROWS)
    table = pa.table({"y": rows % 2, "x": rows.astype(np.float32), "a": rows % 7, "b": rows})
    pq.write_table(table, folder / "raw.parquet")
    settings = {
        "output": folder / "data",
        "source": {
            "kind": "parquet",
            "files": [str(folder / "raw.parquet")],
            "label": {"column": "y"},
            "dense": ["x"],
            "sparse": [{"column": "a"}, {"column": "b"}],
        },
        "dense_transform": "none",
        "vocabulary": {"kind": "dictionary"},
        "split": {"validation_share": 0.0},
        "rows_per_batch": 4,
    }
    prepare(PrepareConfig.model_validate(settings))
    return folder / "data"


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The numbers of the rows of each batch, as they are trained."""
    batches: list[list[int]] = []
    real = DenseStep.__call__

    def call(self: DenseStep, dense: Any, *others: Any, **options: Any) -> Any:
        batches.append(dense[:, 0].int().tolist())
        return real(self, dense, *others, **options)

    monkeypatch.setattr(DenseStep, "__call__", call)
    return batches


def config_of(folder: Path, data: Path, drop_last: bool, **settings: Any) -> RunConfig:
    return small_config(
        folder,
        data={"kind": "prepared", "folder": str(data), "shuffle": True, "seed": 3},
        # so small that dense features of up to 43 do not diverge
        embeddings={"optimizer": {"kind": "sgd", "lr": 0.001}},
        train={
            "batch_size": BATCH_SIZE,
            "device": "cpu",
            "drop_last": drop_last,
            "optimizer": {"kind": "sgd", "lr": 0.0001},
            "steps": None,
            **settings,
        },
        cache={"size": 30, "lookahead": 3},
    )


def in_order(data: Path, drop_last: bool) -> list[list[int]]:
    """What is to be trained, read epoch by epoch."""
    source = PreparedSource(data, "train", shuffle=True, seed=3)
    return [
        batch.dense[:, 0].astype(int).tolist()
        for epoch in range(NUM_EPOCHS)
        for batch in source.batches(batch_size=BATCH_SIZE, epoch=epoch, drop_last=drop_last)
    ]


@pytest.mark.parametrize(("drop_last", "num_batches"), [(False, 5), (True, 4)])
def test_stopped_at_any_step_it_goes_on_with_the_next_batch(
    tmp_path: Path, data: Path, trained: list[list[int]], drop_last: bool, num_batches: int
) -> None:
    expected = in_order(data, drop_last)
    assert len(expected) == NUM_EPOCHS * num_batches
    assert expected[:num_batches] != expected[num_batches : 2 * num_batches]
    whole = config_of(tmp_path / "whole", data, drop_last, epochs=NUM_EPOCHS)
    train(whole, reporter=SilentReporter())
    assert trained == expected
    for stop in range(1, len(expected)):
        folder = tmp_path / str(stop)
        train(config_of(folder, data, drop_last, steps=stop), reporter=SilentReporter())
        (checkpoint,) = list_checkpoints(folder / "checkpoints")
        epoch, batch = divmod(stop, num_batches)
        assert read_manifest(checkpoint)["position"] == {"epoch": epoch, "batch": batch}
        trained.clear()
        resumed = config_of(folder, data, drop_last, epochs=NUM_EPOCHS)
        train(resumed, reporter=SilentReporter(), resume=True)
        assert trained == expected[stop:], f"stopped after {stop} steps"
        assert newest_files(folder) == newest_files(tmp_path / "whole")


@pytest.mark.parametrize("drop_last", [False, True])
def test_one_epoch_more_each_time(
    tmp_path: Path, data: Path, trained: list[list[int]], drop_last: bool
) -> None:
    """Each run is finished, and the next goes on where an epoch ends and another begins."""
    for epochs in range(1, NUM_EPOCHS + 1):
        config = config_of(tmp_path, data, drop_last, epochs=epochs)
        train(config, reporter=SilentReporter(), resume=epochs > 1)
    assert trained == in_order(data, drop_last)


def test_an_oracle_process_goes_on_at_an_epochs_end_too(
    tmp_path: Path, data: Path, trained: list[list[int]]
) -> None:
    train(config_of(tmp_path, data, False, steps=5), reporter=SilentReporter())
    config = config_of(tmp_path, data, False, epochs=NUM_EPOCHS)
    cache = config.cache.model_copy(update={"oracle": "process"})
    train(config.model_copy(update={"cache": cache}), reporter=SilentReporter(), resume=True)
    assert trained == in_order(data, False)
