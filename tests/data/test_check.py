"""Every fault that `check_batch` names, and good batches that pass."""

from __future__ import annotations

import numpy as np
import pytest

from bagpipe.data.base import Batch, FeatureSpec
from bagpipe.data.check import check_batch
from bagpipe.errors import DataError
from bagpipe.types import Jagged

FEATURES = [
    FeatureSpec(name="f", table="t", num_embeddings=10),
    FeatureSpec(name="g", table="u", num_embeddings=3),
]


def make(
    values: list[int],
    offsets: list[int] | None = None,
    keys: tuple[str, ...] = ("f", "g"),
    dense: float = 0,
    label: float = 0,
) -> Batch:
    jagged_offsets = None if offsets is None else np.array(offsets, np.int32)
    sparse = Jagged(
        keys=keys, values=np.array(values, np.int32), batch_size=2, offsets=jagged_offsets
    )
    dense_values = np.array([[0, 0], [0, dense]], np.float32)
    return Batch(dense=dense_values, sparse=sparse, labels=np.array([0, label], np.float32))


def check(batch: Batch) -> None:
    check_batch(batch, FEATURES, where="batch 7 of train", dense_names=("x", "y"))


def test_good_batches_pass() -> None:
    check(make([9, 0, 2, 0]))
    check(make([9, 0, 2], [0, 2, 2, 2, 3]))
    check(make([], [0, 0, 0, 0, 0]))
    check(make([2, 0, 9, 0], keys=("g", "f")))


@pytest.mark.parametrize(
    ("batch", "facts"),
    [
        (make([9, 10, 2, 0]), ["'f' of sample 1", "id 10", "'t'", "0 to 9"]),
        (make([9, 0, 2, 3]), ["'g' of sample 1", "id 3", "'u'", "0 to 2"]),
        (make([-1, 0, 2, 0]), ["'f' of sample 0", "id -1"]),
        (make([0, 1, 2, 3], [0, 1, 1, 1, 4]), ["'g' of sample 1", "id 3"]),
        (make([0, 0, 3], [0, 0, 2, 3, 3]), ["'g' of sample 0", "id 3"]),
        (make([0, 0, 0, 0], keys=("f", "h")), ["feature 'h' has no table", "f, g"]),
        (make([0, 0, 0]), ["3 ids for 2 features x 2 samples"]),
        (make([0, 0], [0, 1, 2]), ["must be 5 non-decreasing numbers from 0 to 2, are 3 from"]),
        (make([0, 0], [0, 1, 0, 1, 2]), ["must be 5 non-decreasing numbers from 0 to 2"]),
        (make([0, 0], [0, 1, 1, 1, 1]), ["from 0 to 2, are 5 from [0] to [1]"]),
        (make([0] * 4, dense=np.nan), ["dense feature 'y' of sample 1 is nan"]),
        (make([0] * 4, dense=np.inf), ["dense feature 'y' of sample 1 is inf"]),
        (make([0] * 4, label=np.nan), ["label of sample 1 is nan"]),
    ],
)
def test_faults_are_named(batch: Batch, facts: list[str]) -> None:
    with pytest.raises(DataError) as raised:
        check(batch)
    for fact in ["batch 7 of train", *facts]:
        assert fact in str(raised.value)
