"""Which batches a run trains, from any position on."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest

from bagpipe.config.run import RunConfig, TrainConfig
from bagpipe.config.tables import make_tables
from bagpipe.data.base import Batch, FeatureSpec, Position, count_batches
from bagpipe.errors import ConfigError
from bagpipe.train.schedule import RemainingBatches, Schedule, make_schedule
from bagpipe.train.torch_batch import TorchBatch
from bagpipe.types import Int64Array, Jagged


class CountingSource:
    """Each sample's dense feature is its number, plus 1000 an epoch."""

    features = (FeatureSpec(name="f", table="t", num_embeddings=3),)
    num_dense = 1

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples

    def batches(
        self, *, batch_size: int, epoch: int = 0, start: int = 0, drop_last: bool = False
    ) -> Iterator[Batch]:
        for read in self.reads(
            batch_size=batch_size, epoch=epoch, start=start, drop_last=drop_last
        ):
            yield read()

    def reads(
        self, *, batch_size: int, epoch: int = 0, start: int = 0, drop_last: bool = False
    ) -> Iterator[Callable[[], Batch]]:
        for index in range(start, count_batches(self.num_samples, batch_size, drop_last=drop_last)):
            numbers = (
                np.arange(index * batch_size, min((index + 1) * batch_size, self.num_samples))
                + 1000 * epoch
            )
            yield partial(counted_batch, numbers)


def counted_batch(numbers: Int64Array) -> Batch:
    sparse = Jagged(keys=("f",), values=np.zeros(len(numbers), np.int64), batch_size=len(numbers))
    return Batch(
        dense=numbers.astype(np.float32)[:, None],
        sparse=sparse,
        labels=np.zeros(len(numbers), np.float32),
    )


def firsts(schedule: Schedule, source: CountingSource, start: Position) -> list[float]:
    batches = RemainingBatches(source=source, schedule=schedule, start=start)
    return [float(batch.read().dense[0, 0]) for batch in pickle.loads(pickle.dumps(batches))]


@pytest.mark.parametrize(("steps", "drop_last"), [(5, False), (7, False), (7, True), (1, False)])
def test_any_position_continues_the_same_sequence(steps: int, drop_last: bool) -> None:
    source = CountingSource(10)
    schedule = make_schedule(
        TrainConfig(batch_size=4, steps=steps, drop_last=drop_last), source.num_samples
    )
    whole = firsts(schedule, source, Position())
    assert len(whole) == steps
    for step in range(steps + 1):
        assert firsts(schedule, source, schedule.position_after(step)) == whole[step:]


def test_epochs_make_steps() -> None:
    assert make_schedule(TrainConfig(batch_size=4, epochs=3), 10).num_steps == 9
    assert make_schedule(TrainConfig(batch_size=4, epochs=3, drop_last=True), 10).num_steps == 6
    assert make_schedule(TrainConfig(batch_size=4), 10).num_steps == 3


def test_no_batch_at_all_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="batch_size = 16 with drop_last leaves no batch of the 10"
    ):
        make_schedule(TrainConfig(batch_size=16, drop_last=True), 10)


def test_torch_batches_share_the_memory_of_numpy_ones() -> None:
    (batch,) = CountingSource(4).batches(batch_size=4)
    shared = TorchBatch.of(batch)
    batch.dense[0, 0] = 77.0
    assert shared.dense[0, 0] == 77.0
    assert shared.sparse is batch.sparse


def test_features_of_one_table_share_it() -> None:
    features = [
        FeatureSpec(name=name, table=table, num_embeddings=9)
        for name, table in (("a", "x"), ("b", "y"), ("c", "x"))
    ]
    settings = {
        "data": {"kind": "synthetic"},
        "log": {"folder": "runs/x"},
        "embeddings": {"embedding_dim": 8},
        "model": {"kind": "wide_deep"},
    }
    tables = make_tables(features, RunConfig.model_validate(settings))
    assert [(table.name, table.feature_names) for table in tables] == [
        ("x", ("a", "c")),
        ("y", ("b",)),
    ]
    assert {table.embedding_dim for table in tables} == {8}
