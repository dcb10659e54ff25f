"""How good models with their default settings are, beside plain torch of the same kind.

Both train the same batches in the same order, and are scored on the held-out rows after each epoch.
What counts is the best AUC of the epochs. The arms:

- bagpipe: what a configuration trains that names no optimizer and no start;
- torch: the same dense part, its linear layers as torch starts them, `torch.nn.EmbeddingBag` from
  N(0, 0.01), Adam at 0.001 for all.

A seed says how both start; the batches have the same order with all of them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from bagpipe.config.load import check_config
from bagpipe.config.run import RunConfig
from bagpipe.data import open_source
from bagpipe.data.base import BatchSource, FeatureSpec, Position, count_batches
from bagpipe.train.build import make_model
from bagpipe.train.evaluate import evaluate
from bagpipe.train.logs import LOG_NAME
from bagpipe.train.report import SilentReporter
from bagpipe.train.schedule import RemainingBatches, make_schedule
from bagpipe.train.torch_batch import TorchBatch
from bagpipe.train.trainer import train
from bagpipe.types import Jagged
from benchmarks.measure import Progress, Result
from benchmarks.samples import SAMPLES, prepare_sample

MODELS = ("dlrm", "dcn", "wide_deep", "deepfm")
_NEED_DENSE = ("dlrm", "dcn")
QUICK: dict[str, Any] = {"num_seeds": 2, "num_epochs": 1}


@dataclass(frozen=True, kw_only=True)
class QualityBench:
    """Sizes of the benchmark."""

    data: Path
    """The folder of the samples' files."""
    samples: Sequence[str] = tuple(SAMPLES)
    models: Sequence[str] = MODELS
    num_seeds: int = 5
    num_epochs: int = 3
    embedding_dim: int = 16


@dataclass(frozen=True, kw_only=True)
class _Score:
    """The best evaluation of one training."""

    auc: float
    log_loss: float


def bench_quality(sizes: QualityBench, progress: Progress) -> Result:
    """Trains every model on every sample, from every seed, both ways."""
    table = Table(title="Best validation AUC: mean (deviation of a seed), lowest to highest")
    for column in ("sample", "model", "bagpipe", "torch", "difference", "log-losses"):
        table.add_column(column)
    pairs = [
        (name, model)
        for name in sizes.samples
        for model in sizes.models
        if SAMPLES[name].has_dense or model not in _NEED_DENSE
    ]
    values: dict[str, dict[str, Any]] = {name: {} for name in sizes.samples}
    below = []
    with tempfile.TemporaryDirectory() as folder:
        for name in sizes.samples:
            prepare_sample(name, sizes.data, Path(folder) / name)
        for number, (name, model) in enumerate(pairs):
            arms: dict[str, list[_Score]] = {"bagpipe": [], "torch": []}
            for seed in range(sizes.num_seeds):
                run = Path(folder) / f"{name}-{model}-{seed}"
                config = _config(sizes, name, model, seed, Path(folder) / name, run)
                arms["bagpipe"].append(_train_bagpipe(config))
                arms["torch"].append(_train_torch(config))
                done = number * sizes.num_seeds + seed + 1
                progress(f"{name}, {model}", done, len(pairs) * sizes.num_seeds)
            values[name][model] = {
                arm: [vars(score) for score in scores] for arm, scores in arms.items()
            }
            table.add_row(name, model, *_row(arms["bagpipe"], arms["torch"]))
            if mean(score.auc for score in arms["bagpipe"]) < min(
                score.auc for score in arms["torch"]
            ):
                below.append(f"{model} on {name}")
    note = (
        f"Below the lowest of torch's seeds: {', '.join(below)}"
        if below
        else "No mean of bagpipe's is below the lowest of torch's seeds"
    )
    return Result(name="quality", tables=(table,), values={"scores": values}, notes=(note,))


def _config(
    sizes: QualityBench, name: str, model: str, seed: int, prepared: Path, run: Path
) -> RunConfig:
    dim, batch_size = sizes.embedding_dim, SAMPLES[name].batch_size
    bottom = {"bottom": [64, 32, dim]} if model in _NEED_DENSE else {}
    data = {"kind": "prepared", "folder": str(prepared), "shuffle": True, "verify": False}
    settings: dict[str, Any] = {
        "data": data,
        "embeddings": {"embedding_dim": dim},
        "model": {"kind": model, "top": [64, 32, 1], **bottom},
        "train": {
            "batch_size": batch_size,
            "epochs": sizes.num_epochs,
            "seed": seed,
            "device": "cpu",
        },
        "checkpoint": {"at_end": False},
        "log": {"folder": str(run), "tensorboard": False},
    }
    config = check_config(RunConfig, settings, source="the benchmark")
    source = open_source(config.data, "train")
    settings["train"]["eval_every_steps"] = count_batches(source.num_samples, batch_size)
    return check_config(RunConfig, settings, source="the benchmark")


def _train_bagpipe(config: RunConfig) -> _Score:
    train(config, reporter=SilentReporter())
    lines = (config.log.folder / LOG_NAME).read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return _best(
        [
            _Score(auc=record["auc"], log_loss=record["log_loss"])
            for record in records
            if record["kind"] == "evaluation"
        ]
    )


def _train_torch(config: RunConfig) -> _Score:
    source, validation = open_source(config.data, "train"), open_source(config.data, "validation")
    torch.manual_seed(config.train.seed)
    tables = _Tables(source.features, config.embeddings.embedding_dim)
    model = make_model(config.model, tables, source.num_dense, num_labels=1)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    schedule = make_schedule(config.train, source.num_samples)
    batches = RemainingBatches(source=source, schedule=schedule, start=Position())
    scores = []
    for step, deferred in enumerate(batches, 1):
        batch = TorchBatch.of(deferred.read())
        logits = model(batch.dense, batch.sparse)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % schedule.num_batches == 0:
            scores.append(_score(model, validation, config))
    return _best(scores)


def _score(model: nn.Module, validation: BatchSource, config: RunConfig) -> _Score:
    found = evaluate(
        model,
        validation,
        batch_size=config.train.eval_batch_size,
        device=torch.device("cpu"),
        precision="fp32",
    )
    assert found is not None
    told = found.as_dict()
    return _Score(auc=told["auc"], log_loss=told["log_loss"])


class _Tables(nn.Module):
    """Plain tables in memory that take what Bagpipe's readers yield."""

    def __init__(self, features: Sequence[FeatureSpec], dim: int) -> None:
        super().__init__()
        names = [feature.name for feature in features]
        self.groups = (SimpleNamespace(features=names, embedding_dim=dim),)  # tells a model sizes
        tables = [nn.EmbeddingBag(each.num_embeddings, dim, mode="sum") for each in features]
        for table in tables:
            nn.init.normal_(table.weight, std=0.01)
        self.tables = nn.ModuleList(tables)

    def forward(self, sparse: Jagged) -> Any:
        """Pooled embeddings of all features, as a model reads them."""
        size, values = sparse.batch_size, torch.from_numpy(sparse.values)
        every = range(len(self.tables) * size + 1)
        bounds = torch.tensor(every) if sparse.offsets is None else torch.from_numpy(sparse.offsets)
        pooled: list[Tensor] = []
        for number, table in enumerate(self.tables):
            offsets = bounds[number * size : (number + 1) * size + 1]
            ids = values[offsets[0] : offsets[-1]]
            pooled.append(table(ids, (offsets[:-1] - offsets[0]).to(ids.dtype)))
        return SimpleNamespace(values=lambda: torch.cat(pooled, dim=1))


def _best(scores: Sequence[_Score]) -> _Score:
    return max(scores, key=lambda score: score.auc)


def _row(ours: Sequence[_Score], theirs: Sequence[_Score]) -> Iterator[str]:
    """Both arms' AUC, the difference of the means, and both arms' log-loss."""
    aucs = [[score.auc for score in scores] for scores in (ours, theirs)]
    for each in aucs:
        yield f"{mean(each):.4f} ({stdev(each):.4f})\n{min(each):.4f} to {max(each):.4f}"
    yield f"{mean(aucs[0]) - mean(aucs[1]):+.4f}"
    log_losses = [mean(score.log_loss for score in scores) for scores in (ours, theirs)]
    yield "{:.4f}, {:.4f}".format(*log_losses)
