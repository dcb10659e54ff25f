"""A saved model's scores and predictions are those of the run that saved it, to the bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tests.train.runs import small_config

import bagpipe
from bagpipe.config.run import RunConfig
from bagpipe.errors import BagpipeError, CheckpointError, ConfigError, DataError
from bagpipe.train.loop import Result
from bagpipe.train.predict import score, write_predictions
from bagpipe.train.report import SilentReporter
from bagpipe.train.saved import load_model, open_saved
from bagpipe.train.scored import open_scored
from bagpipe.train.trainer import train

BATCH_SIZE = 64  # as in the run's evaluations


def trained(folder: Path, **sections: dict[str, Any]) -> tuple[RunConfig, Result]:
    config = small_config(folder, **sections)
    return config, train(config, reporter=SilentReporter())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A run with bags, a best checkpoint and a test split."""
    folder = tmp_path_factory.mktemp("run")
    _, result = trained(
        folder,
        data={"multi_hot": {"C2": [0, 3]}, "num_test_samples": 90},
        train={
            "eval_every_steps": 8,
            "best": {"metric": "log_loss"},
            "metrics": ["auc", "grouped_auc", "calibration"],
            "group_by": "C1",
        },
    )
    return folder, result


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_last_and_the_best_model_score_as_within_the_run(run: tuple[Path, Result]) -> None:
    folder, result = run
    before = files_of(folder)
    told: list[tuple[int, int]] = []
    for which, split, expected in (
        ("last", "validation", result.scores),
        ("best", None, result.test_scores),
    ):
        of = open_saved(folder, which)
        scored = open_scored(of, None, split)
        with load_model(of) as loaded:
            found = score(
                loaded, scored.source, BATCH_SIZE, lambda *progress: told.append(progress)
            )
        assert found == expected if which == "last" else found.as_dict() == expected
        assert None not in found.values.values()
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4), (1, 2), (2, 2)]
    assert files_of(folder) == before


def test_predictions_are_written_in_the_order_of_rows(
    run: tuple[Path, Result], tmp_path: Path
) -> None:
    of = open_saved(run[0] / "checkpoints" / "step-0000000024")
    source = open_scored(of, None, "validation").source
    with load_model(of) as loaded:
        for name, size in (("a", BATCH_SIZE), ("b", 33)):
            assert write_predictions(loaded, source, tmp_path / name, size, lambda *_: None) == 200
    first, second = (pq.read_table(tmp_path / name) for name in "ab")
    assert first.schema.names == ["score", "label"]
    labels = np.concatenate([batch.labels for batch in source.batches(batch_size=50)])
    assert first.column("label").to_pylist() == labels.tolist()
    np.testing.assert_allclose(first.column("score"), second.column("score"), rtol=1e-5)
    assert 0 < min(first.column("score").to_pylist()) < max(first.column("score").to_pylist()) < 1


def test_tables_in_files_are_read_beside_the_runs_own(tmp_path: Path) -> None:
    store = {"kind": "file", "folder": str(tmp_path / "store")}
    _, result = trained(tmp_path / "run", embeddings={"store": store})
    before = files_of(tmp_path / "store")
    of = open_saved(tmp_path / "run")
    with load_model(of) as loaded:
        source = open_scored(of, None, None).source
        assert score(loaded, source, BATCH_SIZE, lambda *_: None) == result.scores
    assert files_of(tmp_path / "store") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "store"]


@pytest.mark.parametrize(
    ("what", "error", "facts"),
    [
        ("nowhere", CheckpointError, ["nowhere", "there is no such folder", "log.folder"]),
        ("file", CheckpointError, ["file", "is a file"]),
        ("empty", CheckpointError, ["empty", "holds no checkpoint", "checkpoint.at_end"]),
        ("own", CheckpointError, ["own", "an own loop", "bagpipe.restore"]),
        ("cut", CheckpointError, ["dense.pt", "is damaged"]),
    ],
)
def test_what_is_no_run_is_refused(
    run: tuple[Path, Result], tmp_path: Path, what: str, error: type[BagpipeError], facts: list[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    if what == "own":
        tables = [
            bagpipe.TableConfig(name="a", num_embeddings=9, embedding_dim=4, feature_names=["a"])
        ]
        own = bagpipe.EmbeddingBagCollection(tables, optimizer=bagpipe.SGD(lr=0.1))
        bagpipe.save(tmp_path / "own", own)
    if what == "cut":
        shutil.copytree(run[0] / "checkpoints", tmp_path / "cut" / "checkpoints")
        for path in (tmp_path / "cut").rglob("dense.pt"):
            path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(error) as caught:
        open_saved(tmp_path / what)
    assert all(fact in str(caught.value) for fact in facts), caught.value


def test_what_a_run_does_not_have_is_told(run: tuple[Path, Result], tmp_path: Path) -> None:
    folder, _ = run
    shutil.copytree(folder / "checkpoints", tmp_path / "plain" / "checkpoints")
    with pytest.raises(CheckpointError, match=r"no best checkpoint: train with train\.best set"):
        open_saved(tmp_path / "plain", "best")
    with pytest.raises(ConfigError, match="--checkpoint newest: must be last or best"):
        open_saved(folder, "newest")
    with pytest.raises(ConfigError, match="batchsize: unknown key"):
        open_saved(folder, overrides=["train.batchsize=3"])
    with pytest.raises(ConfigError, match="--split tests: must be train, validation, test"):
        open_scored(open_saved(folder), None, "tests")
    with pytest.raises(DataError, match="no file at"):
        open_scored(open_saved(folder), tmp_path / "none.parquet", None)
    with pytest.raises(DataError, match="is no folder of prepared data"):
        open_scored(open_saved(folder), tmp_path, None)
