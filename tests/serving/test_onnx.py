"""`dense.onnx` computes what `dense.pt2` does, in onnxruntime; skipped where that is not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.serving.test_serving import MULTI_HOT, rows_of
from tests.train.runs import small_config

import bagpipe.serving
from bagpipe.serving.requests import as_record_batch
from bagpipe.train.export import export
from bagpipe.train.report import SilentReporter
from bagpipe.train.saved import open_saved
from bagpipe.train.scored import open_scored
from bagpipe.train.trainer import train

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

MODELS: dict[str, dict[str, dict[str, Any]]] = {
    "dlrm": {},
    "dcn": {"model": {"kind": "dcn", "bottom": [8, 4], "top": [8, 1], "cross_rank": 4}},
    "deepfm": {"model": {"kind": "deepfm", "top": [8, 1], "dropout": 0.2, "batch_norm": True}},
    "wide_deep": {"model": {"kind": "wide_deep", "top": [8, 1]}},
    "bf16": {"train": {"precision": "bf16"}},
}


@pytest.mark.parametrize("name", MODELS)
def test_onnx_tells_the_scores_of_served_rows(name: str, tmp_path: Path) -> None:
    sections = {"train": {}} | MULTI_HOT | MODELS[name]
    sections["train"] = {"steps": 6, **sections["train"]}
    train(small_config(tmp_path / "run", **sections), reporter=SilentReporter())
    of = open_saved(tmp_path / "run")
    export(of, tmp_path / "model", arrow=False, onnx=True)
    model = bagpipe.serving.load(tmp_path / "model")
    session = onnxruntime.InferenceSession(str(tmp_path / "model" / "dense.onnx"))
    assert [given.name for given in session.get_inputs()] == ["dense", "pooled"]
    assert [given.shape[0] for given in session.get_inputs()] == ["batch", "batch"]
    batch = next(open_scored(of, None, None).source.batches(batch_size=64))
    for rows in (rows_of(batch), rows_of(batch)[:1]):
        encoded = model._inputs.encode_arrow(as_record_batch(rows, model.columns.names), "rows")
        given = {"dense": encoded.dense, "pooled": model._tables.pool(encoded)}
        (logits,) = session.run(["logits"], given)
        assert logits.shape == (len(rows),)
        scores = torch.sigmoid(torch.from_numpy(logits)).numpy()
        expected = model.predict(rows)
        assert np.abs(scores - expected).max() < (1e-2 if name == "bf16" else 1e-5)
