"""How long a request to an exported model takes, beside plain torch.

The model is a DLRM of Criteo's 26 tables and 13 numbers. Arms:

- dicts: `bagpipe.serving`, from a list of dicts to probabilities;
- arrow: the same rows as an Arrow record batch;
- torch: ids and numbers are tensors already, tables in memory, the dense part as it is written.

Arms take turns request by request, each on rows of its own.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from rich.table import Table

import bagpipe.serving
from bagpipe.config.load import check_config
from bagpipe.config.run import RunConfig
from bagpipe.data.criteo import CARDINALITIES
from bagpipe.train.export import export
from bagpipe.train.report import SilentReporter
from bagpipe.train.saved import LoadedModel, load_model, open_saved
from bagpipe.train.trainer import train
from benchmarks.measure import Progress, Result

QUICK: dict[str, Any] = {"max_rows": 100, "num_requests": 3}
BATCH_SIZES = (1, 256)
_NUM_WARMUPS = 5
_Arm = Callable[[int], Any]


@dataclass(frozen=True, kw_only=True)
class ServingBench:
    """Sizes of the benchmark."""

    max_rows: int = 200_000
    embedding_dim: int = 16
    num_requests: int = 1000


def bench_serving(sizes: ServingBench, progress: Progress) -> Result:
    """Trains two steps, exports, and asks."""
    with tempfile.TemporaryDirectory() as folder:
        run, exported = Path(folder) / "run", Path(folder) / "exported"
        train(_config(sizes, run), reporter=SilentReporter())
        of = open_saved(run)
        export(of, exported, arrow=False)
        model = bagpipe.serving.load(exported)
        with load_model(of) as loaded:
            values = {size: _measure(sizes, model, loaded, size, progress) for size in BATCH_SIZES}
    table = Table(title="A request, ms: p50, p99")
    for name in ("rows", *values[BATCH_SIZES[0]]):
        table.add_column(name)
    for size, arms in values.items():
        shown = [f"{arm['p50_ms']:.2f}, {arm['p99_ms']:.2f}" for arm in arms.values()]
        table.add_row(str(size), *shown)
    return Result(name="serving", tables=(table,), values={"requests": values})


def _config(sizes: ServingBench, folder: Path) -> RunConfig:
    dim = sizes.embedding_dim
    settings = {
        "data": {
            "kind": "synthetic",
            "num_samples": 4096,
            "num_embeddings": "kaggle",
            "max_num_embeddings": sizes.max_rows,
        },
        "embeddings": {"embedding_dim": dim},
        "model": {"bottom": [64, 32, dim], "top": [128, 64, 1]},
        "train": {"batch_size": 2048, "device": "cpu"},
        "log": {"folder": str(folder), "tensorboard": False},
    }
    return check_config(RunConfig, settings, source="the benchmark")


def _measure(
    sizes: ServingBench,
    model: bagpipe.serving.ServedModel,
    loaded: LoadedModel,
    batch_size: int,
    progress: Progress,
) -> dict[str, dict[str, float]]:
    """The percentiles of each arm."""
    features = loaded.embeddings.groups[0].features
    limits = [min(size, sizes.max_rows) for size in CARDINALITIES["kaggle"][: len(features)]]
    random = np.random.default_rng(0)
    num_requests = _NUM_WARMUPS + sizes.num_requests
    ids = random.integers(0, limits, (num_requests, batch_size, len(limits)))
    dense = random.random((num_requests, batch_size, 13), np.float32)
    names = [*(f"I{number}" for number in range(1, 14)), *features]
    rows = [
        [
            dict(zip(names, [*numbers, *of_row], strict=True))
            for numbers, of_row in zip(dense[request].tolist(), ids[request].tolist(), strict=True)
        ]
        for request in range(num_requests)
    ]
    batches = [pa.RecordBatch.from_pylist(each) for each in rows]
    torch_ids, torch_dense = torch.from_numpy(ids), torch.from_numpy(dense)
    tables = [loaded.embeddings.tables()[name][:] for name in features]
    arms: dict[str, _Arm] = {
        "dicts": lambda request: model.predict(rows[request]),
        "arrow": lambda request: model.predict(batches[request]),
        "torch": lambda request: _plain_torch(
            loaded, tables, torch_dense[request], torch_ids[request]
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for request in range(num_requests):
        for name, arm in arms.items():
            began = time.perf_counter()
            arm(request)
            seconds[name].append(time.perf_counter() - began)
        progress(f"{batch_size} rows", request + 1, num_requests)
    return {name: _percentiles(found[_NUM_WARMUPS:]) for name, found in seconds.items()}


def _plain_torch(
    loaded: LoadedModel, tables: Sequence[torch.Tensor], dense: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    with torch.inference_mode():
        pooled = torch.cat([table[ids[:, place]] for place, table in enumerate(tables)], dim=1)
        return torch.sigmoid(loaded.model.dense_part(dense, pooled))


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    p50, p99 = (1e3 * float(value) for value in np.percentile(seconds, [50, 99]))
    return {"p50_ms": p50, "p99_ms": p99, "count": len(seconds)}
