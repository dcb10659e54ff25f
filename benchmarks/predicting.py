"""How fast a saved model predicts, beside its training.

A DLRM of Criteo's 26 tables and 13 numbers, on rows of a Parquet file. Arms:

- train: a pass over the prepared rows, in steps of `batch_size`;
- prepared: `bagpipe predict` on the same prepared rows;
- raw: `bagpipe predict` on the Parquet file, whose values it looks up in the run's dictionaries.

Arms take turns. What counts are the samples between the first and the last batch of a turn, so
starts are left out.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table

from bagpipe.config.load import check_config
from bagpipe.config.run import PrepareFile, RunConfig
from bagpipe.data.criteo import CARDINALITIES
from bagpipe.data.prepare import prepare
from bagpipe.data.synthetic import SyntheticSource
from bagpipe.train.predict import write_predictions
from bagpipe.train.report import SilentReporter
from bagpipe.train.saved import load_model, open_saved
from bagpipe.train.scored import open_scored
from bagpipe.train.trainer import train
from benchmarks.measure import Progress, Result

QUICK: dict[str, Any] = {
    "max_rows": 100,
    "num_samples": 4096,
    "batch_size": 512,
    "eval_batch_size": 1024,
    "num_rounds": 1,
}
_NUM_DENSE = 13


@dataclass(frozen=True, kw_only=True)
class PredictBench:
    """Sizes of the benchmark."""

    max_rows: int = 1_000_000
    num_samples: int = 400_000
    batch_size: int = 2048
    eval_batch_size: int = 8192
    """The default of `train.eval_batch_size`, in which `bagpipe predict` predicts."""
    embedding_dim: int = 16
    num_rounds: int = 5


class _Clock(SilentReporter):
    """Notes when the first and the last batch of a turn are done."""

    def __init__(self) -> None:
        self._times: list[float] = []
        self._done: list[int] = []

    def advance(self, step: int) -> None:
        """Notes the end of a step."""
        self.note(step)

    def note(self, num_done: int) -> None:
        """Notes that so many batches are done."""
        self._times.append(time.perf_counter())
        self._done.append(num_done)

    def examples_per_s(self, num_samples: int, batch_size: int) -> float:
        """Of all batches but the first."""
        first = self._done[0] * batch_size
        return (num_samples - first) / (self._times[-1] - self._times[0])


def bench_predict(sizes: PredictBench, progress: Progress) -> Result:
    """Trains and predicts in turns."""
    rates: dict[str, list[float]] = {"train": [], "prepared": [], "raw": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_rows(sizes, folder / "rows.parquet", progress)
        _prepare(folder)
        for number in range(sizes.num_rounds):
            run = folder / f"run-{number}"
            clock = _Clock()
            train(_config(sizes, folder / "prepared", run), reporter=clock)
            rates["train"].append(clock.examples_per_s(sizes.num_samples, sizes.batch_size))
            for arm, data in (("prepared", None), ("raw", folder / "rows.parquet")):
                rates[arm].append(_predict(sizes, run, data, folder / "scores.parquet"))
            progress("turns", number + 1, sizes.num_rounds)
    shares = {
        arm: [rate / of for rate, of in zip(rates[arm], rates["train"], strict=True)]
        for arm in ("prepared", "raw")
    }
    table = Table(title="Samples a second, and their share of training's in the same turn")
    for column in ("arm", "median", "each turn", "share", "each turn"):
        table.add_column(column)
    for arm, found in rates.items():
        share = shares.get(arm, [])
        table.add_row(
            arm,
            f"{median(found):,.0f}",
            ", ".join(f"{rate:,.0f}" for rate in found),
            f"{median(share):.2f}" if share else "",
            ", ".join(f"{each:.2f}" for each in share),
        )
    values = {"examples_per_s": rates, "shares": shares}
    return Result(name="predict", tables=(table,), values=values)


def _write_rows(sizes: PredictBench, path: Path, progress: Progress) -> None:
    """Rows whose values follow a Zipf distribution, as a Parquet file."""
    limits = [min(size, sizes.max_rows) for size in CARDINALITIES["kaggle"]]
    source = SyntheticSource(limits, split="train", num_samples=sizes.num_samples, skew=1.1)
    writer: pq.ParquetWriter | None = None
    done = 0
    for batch in source.batches(batch_size=sizes.eval_batch_size):
        ids = batch.sparse.values.reshape(len(limits), -1)
        columns = {"clicked": batch.labels.astype(bool)}
        columns |= {f"I{at}": batch.dense[:, at] for at in range(_NUM_DENSE)}
        columns |= {f"C{at}": ids[at] for at in range(len(limits))}
        table = pa.table(columns)
        writer = pq.ParquetWriter(path, table.schema) if writer is None else writer
        writer.write_table(table)
        done += batch.batch_size
        progress("writing rows", done, sizes.num_samples)
    assert writer is not None
    writer.close()


def _prepare(folder: Path) -> None:
    settings = {
        "prepare": {
            "output": str(folder / "prepared"),
            "vocabulary": {"kind": "dictionary"},
            "split": {"by": "share", "validation_share": 0.0},
            "source": {
                "kind": "parquet",
                "files": [str(folder / "rows.parquet")],
                "label": {"column": "clicked"},
                "dense": [f"I{at}" for at in range(_NUM_DENSE)],
                "sparse": [{"column": f"C{at}"} for at in range(len(CARDINALITIES["kaggle"]))],
            },
        }
    }
    prepare(check_config(PrepareFile, settings, source="the benchmark").prepare)


def _config(sizes: PredictBench, prepared: Path, run: Path) -> RunConfig:
    dim = sizes.embedding_dim
    settings = {
        "data": {"kind": "prepared", "folder": str(prepared)},
        "embeddings": {"embedding_dim": dim},
        "model": {"bottom": [64, 32, dim], "top": [128, 64, 1]},
        "train": {
            "batch_size": sizes.batch_size,
            "eval_batch_size": sizes.eval_batch_size,
            "device": "cpu",
        },
        "log": {"folder": str(run), "tensorboard": False},
    }
    return check_config(RunConfig, settings, source="the benchmark")


def _predict(sizes: PredictBench, run: Path, data: Path | None, output: Path) -> float:
    """Samples a second."""
    of = open_saved(run)
    scored = open_scored(of, data, "train" if data is None else None)
    clock = _Clock()
    batch_size = sizes.eval_batch_size
    with load_model(of) as loaded:
        write_predictions(
            loaded, scored.source, output, batch_size, lambda done, total: clock.note(done)
        )
    return clock.examples_per_s(sizes.num_samples, batch_size)
