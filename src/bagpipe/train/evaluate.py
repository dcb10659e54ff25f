"""Held-out evaluation of click prediction.

The model reads records without training them, and nothing of the run changes.

With several trainers, each predicts every so many-th batch. Rank 0 scores all predictions in the
order of the batches. The scores are therefore the same to the bit for any number of trainers, as
long as their devices compute the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice, zip_longest

import torch
from torch import Tensor, nn

from bagpipe.config.metrics import DEFAULT_METRICS, Metric
from bagpipe.data.base import BatchSource, count_batches
from bagpipe.distributed.alone import ALONE, Peers
from bagpipe.errors import ConfigError
from bagpipe.train.dense_step import Precision
from bagpipe.train.metrics import LabelScores, Scores
from bagpipe.train.objective import check_logits
from bagpipe.train.torch_batch import TorchBatch
from bagpipe.types import Jagged


def evaluate(
    model: nn.Module,
    source: BatchSource,
    *,
    batch_size: int,
    device: torch.device,
    precision: Precision,
    metrics: Sequence[Metric] = DEFAULT_METRICS,
    group_by: str | None = None,
    peers: Peers = ALONE,
    on_batch: Callable[[int, int], None] = lambda number, num_batches: None,
) -> Scores | None:
    """How well `model` predicts the labels of `source`.

    The model is put into evaluation mode, and afterwards back into the mode that it was in.

    Args:
        model: from dense features and ids to logits (B,), or (B, L) of L labels.
        source: every sample of it is scored once.
        batch_size: samples that are predicted together.
        device: where the model computes.
        precision: of the dense part.
        metrics: what to tell, in this order.
        group_by: the feature with one id a sample by which grouped_auc groups.
        peers: the other trainers, by default none; all must call this together.
        on_batch: told how many of all batches are done, and at the end that all are.

    Returns:
        The scores on rank 0, None on other ranks. With several trainers rank 0 keeps 16 bytes a
        sample and label more than a single trainer, and 8 a sample with weights; with groups twice
        that and 16.

    Raises:
        ConfigError: there is no such feature to group by, or its bags have any number of ids; or
            the model makes no logit for each label.
    """
    if group_by is not None:
        check_groups(source, group_by)
    num_samples = source.num_samples
    num_batches = count_batches(num_samples, batch_size)
    sizes = [min(batch_size, num_samples - at) for at in range(0, num_samples, batch_size)]
    num_labels, has_weights = len(source.label_names), source.has_weights

    def own_predictions() -> Iterator[Tensor]:
        reads = source.reads(batch_size=batch_size)
        for number, read in enumerate(islice(reads, peers.rank, None, peers.num_trainers), 1):
            batch = TorchBatch.of(read())
            logits = model(batch.dense.to(device), batch.sparse).float().cpu()
            check_logits(logits, batch.labels, source.label_names)
            on_batch(min(number * peers.num_trainers, num_batches - 1), num_batches)
            yield _as_columns(logits, batch, num_labels, group_by)

    was_training = model.training
    model.eval()
    try:
        with (
            torch.no_grad(),
            torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"),
        ):
            by_rank = peers.gather(
                "predictions",
                own_predictions(),
                [sizes[each :: peers.num_trainers] for each in range(peers.num_trainers)],
            )
            scores = LabelScores(source.label_names, metrics)
            for predicted in chain.from_iterable(zip_longest(*by_rank)):
                if predicted is not None:  # the last ranks may have a batch less
                    values = predicted[:, : 2 * num_labels + has_weights].float()
                    scores.update(
                        values[:, :num_labels].contiguous(),
                        values[:, num_labels : 2 * num_labels].contiguous(),
                        None if group_by is None else predicted[:, -1],
                        values[:, -1] if has_weights else None,
                    )
        on_batch(num_batches, num_batches)
        return scores.compute() if peers.rank == 0 else None
    finally:
        model.train(was_training)


def _as_columns(logits: Tensor, batch: TorchBatch, num_labels: int, group_by: str | None) -> Tensor:
    """Logits, labels, and where there are any weights and groups, as (B, columns) on the CPU.

    They are float32, and with groups float64, since float32 has no room for their ids.
    """
    shape = (batch.batch_size, num_labels)
    columns = [logits.view(shape), batch.labels.view(shape)]
    if batch.weights is not None:
        columns.append(batch.weights.unsqueeze(1))
    if group_by is not None:
        columns = [column.double() for column in columns]
        columns.append(ids_of(batch.sparse, group_by).double().unsqueeze(1))
    return torch.cat(columns, dim=1)


def check_groups(source: BatchSource, group_by: str) -> None:
    """Raises ConfigError where samples can't be grouped by a feature."""
    features = {feature.name: feature for feature in source.features}
    if group_by not in features:
        raise ConfigError(
            f"train.group_by = {group_by!r}: the run reads no feature of that name; there are "
            f"{', '.join(features)}"
        )
    if features[group_by].multi_hot:
        raise ConfigError(
            f"train.group_by = {group_by!r}: its bags may hold any number of ids; group by a "
            "feature with one id a sample"
        )


def ids_of(sparse: Jagged, feature: str) -> Tensor:
    """The one id of each sample of a feature, (B,)."""
    first, size = sparse.keys.index(feature) * sparse.batch_size, sparse.batch_size
    if sparse.offsets is None:
        return torch.from_numpy(sparse.values[first : first + size])
    return torch.from_numpy(sparse.values[sparse.offsets[first : first + size]])
