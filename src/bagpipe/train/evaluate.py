"""Held-out evaluation: the model reads records without training them, and nothing of the run
changes.

Several trainers predict every so many-th batch each. Rank 0 scores what all have predicted, batch
by batch in their order, so that the scores are the same, to the bit, for any number of trainers
whose devices compute the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, islice, zip_longest

import torch
from torch import Tensor, nn

from bagpipe.data.base import BatchSource, count_batches
from bagpipe.distributed.communicator import Communicator
from bagpipe.train.batches import TorchBatch
from bagpipe.train.dense_step import Precision
from bagpipe.train.metrics import BinaryScores, Scores


def evaluate(
    model: nn.Module,
    source: BatchSource,
    *,
    batch_size: int,
    device: torch.device,
    precision: Precision,
    communicator: Communicator | None = None,
    on_batch: Callable[[int, int], None] = lambda number, num_batches: None,
    on_no_batch: Callable[[], None] = lambda: None,
) -> Scores | None:
    """How well `model` predicts the labels of all of `source`, in evaluation mode; the mode is put
    back afterwards.

    With a `communicator` all trainers must call it, and ranks other than 0 get None; rank 0 keeps
    16 bytes a sample more than a single trainer. `on_batch` is told about how many of all batches
    are done, and at the end that all are. `on_no_batch` is called in place of the last batch where
    other ranks have one more, so that all can read together.
    """
    rank, num_trainers = (
        (0, 1) if communicator is None else (communicator.rank, communicator.num_trainers)
    )
    num_batches = count_batches(source.num_samples, batch_size)

    def predictions() -> Iterator[Tensor]:
        """Logits and labels (B, 2) of each of this rank's batches, float32 on the CPU."""
        for number, read in enumerate(
            islice(source.reads(batch_size=batch_size), rank, None, num_trainers), 1
        ):
            batch = TorchBatch.of(read())
            logits = model(batch.dense.to(device), batch.sparse).float().cpu()
            on_batch(min(number * num_trainers, num_batches - 1), num_batches)
            yield torch.stack([logits, batch.labels], dim=1)
        if 0 < num_batches % num_trainers <= rank:
            on_no_batch()

    was_training = model.training
    model.eval()
    try:
        with (
            torch.no_grad(),
            torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"),
        ):
            own = predictions()
            by_rank = (
                [own]
                if communicator is None
                else _gather(own, source.num_samples, batch_size, communicator)
            )
            scores = BinaryScores()
            for predicted in chain.from_iterable(zip_longest(*by_rank)):
                if predicted is not None:  # the last ranks may have a batch less
                    scores.update(predicted[:, 0], predicted[:, 1])
        on_batch(num_batches, num_batches)
        return scores.compute() if rank == 0 else None
    finally:
        model.train(was_training)


def _gather(
    predictions: Iterator[Tensor], num_samples: int, batch_size: int, communicator: Communicator
) -> list[Iterator[Tensor]]:
    """The predictions of all ranks, by rank, on rank 0; no batches elsewhere."""
    sizes = [min(batch_size, num_samples - begin) for begin in range(0, num_samples, batch_size)]
    by_rank = [
        sizes[rank :: communicator.num_trainers] for rank in range(communicator.num_trainers)
    ]
    own = torch.cat([torch.empty(0, 2), *predictions])
    gathered = communicator.gather("predictions", own, [sum(each) for each in by_rank])
    return [iter(torch.split(rows, each)) for rows, each in zip(gathered, by_rank, strict=False)]
