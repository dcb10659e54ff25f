"""Predictions of a saved model, batch by batch, at the pace of training.

Rows come ahead of their batch by the plans of `bagpipe.lookahead`, as in training, but nothing is
updated. An evaluation within a run computes the same logits, to the bit: rows are summed in the
same order, and the dense part sees batches of the same size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from bagpipe.data.base import Batch, BatchSource, count_batches
from bagpipe.embeddings.lookahead import lookahead
from bagpipe.embeddings.pooled import PooledEmbeddings
from bagpipe.errors import DataError
from bagpipe.feed.stream import Deferred
from bagpipe.native.files import replaced
from bagpipe.train.evaluate import check_groups, ids_of
from bagpipe.train.metrics import LabelScores, Scores
from bagpipe.train.saved import LoadedModel
from bagpipe.train.torch_batch import TorchBatch

OnBatch = Callable[[int, int], None]
"""Told how many of all batches are done."""


@dataclass(frozen=True, kw_only=True)
class AllBatches:
    """Every sample of a source once, in its order; can be sent to another process."""

    source: BatchSource
    batch_size: int

    def __iter__(self) -> Iterator[Deferred[Batch]]:
        for read in self.source.reads(batch_size=self.batch_size):
            yield Deferred(read)

    def __len__(self) -> int:
        return count_batches(self.source.num_samples, self.batch_size)


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """What is predicted of a batch, with what its data say; float32 on the CPU."""

    logits: Tensor  # (B,), or (B, L) of L labels
    labels: Tensor  # likewise
    weights: Tensor | None  # (B,)


def predictions(
    loaded: LoadedModel, source: BatchSource, batch_size: int, on_batch: OnBatch
) -> Iterator[Predicted]:
    """Yields what is predicted of each batch.

    Args:
        loaded: what predicts.
        source: what is predicted, in its order.
        batch_size: samples that are predicted together.
        on_batch: told of progress.

    Raises:
        DataError: a sample can't be read.
        CacheTooSmallError: a batch needs more rows than the cache has.
    """
    config, embeddings, device = loaded.of.config, loaded.embeddings, loaded.device
    batches = AllBatches(source=source, batch_size=batch_size)
    # the run's cache is for its batches; a larger one gets what is free
    cache = config.cache.size if batch_size <= config.train.batch_size else "auto"
    stream = lookahead(
        batches,
        embeddings,
        cache=cache,
        lookahead=config.cache.lookahead,
        lookahead_memory=config.cache.lookahead_memory,
        prefetch_depth=config.cache.prefetch_depth,
        dedup_threads=config.cache.threads,
        oracle=config.cache.oracle_of("process" if device.type == "cuda" else "thread"),
        hand_out=Batch.without_ids,
        move=TorchBatch.moved,
    )
    with stream:
        for number, batch in enumerate(stream, 1):
            # copies: scores keep them, and a stream uses a batch's memory for later ones
            weights = batch.weights
            yield Predicted(
                logits=_logits(loaded, batch),
                labels=batch.labels.to("cpu", copy=True),
                weights=None if weights is None else weights.to("cpu", copy=True),
            )
            on_batch(number, len(batches))


def _logits(loaded: LoadedModel, batch: TorchBatch) -> Tensor:
    embeddings, device = loaded.embeddings, loaded.device
    is_bf16 = loaded.of.config.train.precision == "bf16"
    features = [group.features for group in embeddings.groups]
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=is_bf16):
        pooled = PooledEmbeddings(features, embeddings.lookup(batch.sparse))
        return loaded.model.dense_part(batch.dense.to(device), pooled.values()).float().cpu()


def score(loaded: LoadedModel, source: BatchSource, batch_size: int, on_batch: OnBatch) -> Scores:
    """How well the model predicts the labels of a source, by the run's metrics; see `predictions`.

    Raises:
        ConfigError: the source has not the feature that grouped_auc groups by.
    """
    config = loaded.of.config
    group_by = config.train.group_by if "grouped_auc" in config.metrics else None
    scores = LabelScores(source.label_names, config.metrics)
    for predicted, groups in zip(
        predictions(loaded, source, batch_size, on_batch),
        _groups(source, batch_size, group_by),
        strict=False,
    ):
        scores.update(predicted.logits, predicted.labels, groups, predicted.weights)
    return scores.compute()


def _groups(source: BatchSource, batch_size: int, group_by: str | None) -> Iterator[Tensor | None]:
    """The groups of each batch's samples, read once more, since a planned batch has no ids."""
    if group_by is None:
        yield from repeat(None)
        return
    check_groups(source, group_by)
    for read in source.reads(batch_size=batch_size):
        yield ids_of(read().sparse, group_by)


def write_predictions(
    loaded: LoadedModel,
    source: BatchSource,
    path: Path,
    batch_size: int,
    on_batch: OnBatch,
    *,
    has_labels: bool = True,
) -> int:
    """Writes a Parquet file with a row for each sample, in the source's order.

    Its columns are `score` float32, the probability, and `label` float32 where there are labels. Of
    several labels they are `score_NAME` of each, and then `label_NAME`.

    Returns:
        How many rows there are.

    Raises:
        DataError: the file can't be written, and is as it was before, or a sample can't be read.
    """
    names = score_columns(loaded.of.label_names, has_labels=has_labels)
    schema = pa.schema([(name, pa.float32()) for name in names])
    num_rows = 0
    with (
        replaced(path, DataError) as temporary,
        pq.ParquetWriter(temporary, schema) as writer,
    ):
        for batch in predictions(loaded, source, batch_size, on_batch):
            table = torch.column_stack([probabilities(batch.logits), batch.labels])
            columns = [pa.array(column.numpy()) for column in table.T[: len(names)]]
            writer.write_batch(pa.record_batch(columns, schema=schema))
            num_rows += len(batch.logits)
    return num_rows


def score_columns(label_names: Sequence[str], *, has_labels: bool) -> list[str]:
    """The columns of a file of predictions."""
    kinds = ["score", "label"] if has_labels else ["score"]
    if len(label_names) == 1:
        return kinds
    return [f"{kind}_{name}" for kind in kinds for name in label_names]


def probabilities(logits: Tensor) -> Tensor:
    """What is told of logits, float32 of the same shape; `bagpipe.serving` tells the same."""
    return torch.sigmoid(logits)
