"""A saved model predicts on a GPU: as within its run to the bit, and as on a CPU but for sums."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tests.train.runs import small_config

from bagpipe.config.run import RunConfig
from bagpipe.train.predict import score, write_predictions
from bagpipe.train.report import SilentReporter
from bagpipe.train.saved import load_model, open_saved
from bagpipe.train.scored import open_scored
from bagpipe.train.trainer import train

pytestmark = pytest.mark.gpu

BATCH_SIZE = 64  # as in the run's evaluations


def gpu_config(folder: Path, precision: str = "fp32") -> RunConfig:
    return small_config(
        folder,
        data={"multi_hot": {"C2": [0, 3]}},
        train={"device": "cuda", "precision": precision},
    )


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_scores_on_a_gpu_are_those_within_the_run(tmp_path: Path, precision: str) -> None:
    result = train(gpu_config(tmp_path, precision), reporter=SilentReporter())
    of = open_saved(tmp_path)
    before = torch.get_float32_matmul_precision()
    with load_model(of) as loaded:
        assert loaded.device.type == "cuda"
        assert all(parameter.is_cuda for parameter in loaded.model.parameters())
        source = open_scored(of, None, None).source
        assert score(loaded, source, BATCH_SIZE, lambda *_: None) == result.scores
    assert torch.get_float32_matmul_precision() == before


def test_predictions_of_a_gpu_run_are_close_on_a_cpu(tmp_path: Path) -> None:
    train(gpu_config(tmp_path), reporter=SilentReporter())
    scores = {}
    for device, oracle, size in (
        ("cuda", "process", BATCH_SIZE),
        ("cuda", "thread", BATCH_SIZE),
        ("cuda", "process", 200),  # more than a training batch, so another cache
        ("cpu", "thread", BATCH_SIZE),
    ):
        of = open_saved(tmp_path, overrides=[f"train.device={device}", f"cache.oracle={oracle}"])
        with load_model(of) as loaded:
            source = open_scored(of, None, None).source
            write_predictions(loaded, source, tmp_path / "s.parquet", size, lambda *_: None)
        table = pq.read_table(tmp_path / "s.parquet")
        scores[device, oracle, size] = table.column("score").to_numpy()
        expected = np.concatenate([each.labels for each in source.batches(batch_size=64)])
        assert (table.column("label").to_numpy() == expected).all()
    in_process = scores["cuda", "process", BATCH_SIZE]
    assert (scores["cuda", "thread", BATCH_SIZE] == in_process).all()
    for other in (scores["cuda", "process", 200], scores["cpu", "thread", BATCH_SIZE]):
        np.testing.assert_allclose(other, in_process, rtol=1e-4)
