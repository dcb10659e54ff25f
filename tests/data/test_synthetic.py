"""The synthetic stream: purity, shapes, the planted model, and Zipf frequencies."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bagpipe.config.data import SyntheticData
from bagpipe.data import open_source
from bagpipe.data.base import Batch
from bagpipe.data.criteo import CARDINALITIES
from bagpipe.data.hashing import stream
from bagpipe.data.synthetic import SyntheticSource
from bagpipe.data.zipf import HEAD_RANKS, UInt32Array, Zipf, draw_rank
from bagpipe.errors import ConfigError
from bagpipe.native.jit import jit
from bagpipe.types import Int32Array

SIZES = [1000, 3, 1, 50]
BAGS = {"C1": (0, 3), "C4": (2, 2)}


def source(split: str = "train", **extra: object) -> SyntheticSource:
    return SyntheticSource(
        SIZES, **{"split": split, "num_samples": 100, "bag_lengths": BAGS, "seed": 3, **extra}
    )  # type: ignore[arg-type]


def samples(batches: list[Batch]) -> list[tuple[object, ...]]:
    """Each sample as a comparable value."""
    found = []
    for batch in batches:
        n, sparse = batch.batch_size, batch.sparse
        offsets = np.arange(len(sparse.values) + 1) if sparse.offsets is None else sparse.offsets
        for b in range(n):
            bags = [
                tuple(sparse.values[offsets[f * n + b] : offsets[f * n + b + 1]].tolist())
                for f in range(len(sparse.keys))
            ]
            found.append((float(batch.labels[b]), tuple(batch.dense[b].tolist()), *bags))
    return found


@settings(max_examples=25, deadline=None)
@given(batch_size=st.integers(1, 120), start=st.integers(0, 4), drop_last=st.booleans())
def test_samples_do_not_depend_on_batches(batch_size: int, start: int, drop_last: bool) -> None:
    whole = samples(list(source().batches(batch_size=100)))
    last = 100 - 100 % batch_size if drop_last else 100
    batches = list(
        source().batches(batch_size=batch_size, start=start, epoch=1, drop_last=drop_last)
    )
    assert samples(batches) == whole[start * batch_size : last]


def test_bags_ids_and_offsets() -> None:
    made = source(num_samples=5000)
    (batch,) = made.batches(batch_size=5000)
    assert batch.sparse.offsets is not None
    lengths = np.diff(batch.sparse.offsets).reshape(4, -1)
    assert np.unique(lengths[0]).tolist() == [0, 1, 2, 3]
    assert [np.unique(row).tolist() for row in lengths[1:]] == [[1], [1], [2]]
    assert [feature.multi_hot for feature in made.features] == [True, False, False, True]
    cuts = batch.sparse.offsets[::5000]
    for f, size in enumerate(SIZES):
        ids = batch.sparse.values[cuts[f] : cuts[f + 1]]
        assert ids.min() >= 0
        assert ids.max() < size
    assert batch.sparse.values.dtype == np.int32
    assert batch.dense.shape == (5000, 13)
    single = next(source(bag_lengths=None).batches(batch_size=10))
    assert single.sparse.offsets is None
    assert single.sparse.values.shape == (40,)


def test_splits_and_seeds_differ() -> None:
    train, validation = (
        samples(list(source().batches(batch_size=100))),
        samples(list(source("validation").batches(batch_size=100))),
    )
    assert not set(train) & set(validation)
    assert not set(train) & set(samples(list(source(seed=4).batches(batch_size=100))))
    longer = samples(list(source(num_samples=150).batches(batch_size=150)))
    assert longer[:100] == train


@pytest.mark.parametrize("seed", [0, 1])
def test_planted_labels_have_the_promised_rate_and_auc(seed: int) -> None:
    made = SyntheticSource(
        CARDINALITIES["kaggle"], split="validation", num_samples=40_000, seed=seed
    )
    (batch,) = made.batches(batch_size=40_000)
    assert abs(batch.labels.mean() - 0.25) < 0.02
    ranks = np.empty(40_000)
    ranks[np.argsort(made.probabilities(0, 40_000))] = np.arange(1, 40_001)
    clicks = batch.labels.sum()
    auc = (ranks[batch.labels == 1].sum() - clicks * (clicks + 1) / 2) / (
        clicks * (40_000 - clicks)
    )
    assert 0.78 < auc < 0.82


@jit
def draw_many(
    count: int, thresholds: UInt32Array, aliases: Int32Array, tail: np.ndarray
) -> Int32Array:  # type: ignore[type-arg]
    ranks = np.empty(count, np.int32)
    for i in range(count):
        ranks[i] = draw_rank(stream(np.uint64(7), np.uint64(i)), thresholds, aliases, tail)
    return ranks


@pytest.mark.parametrize("exponent", [0.0, 0.8, 1.0, 1.1, 2.5])
@pytest.mark.parametrize("num_ranks", [1, 2, HEAD_RANKS, HEAD_RANKS + 1, 50_000])
def test_zipf_draws_have_zipf_frequencies(num_ranks: int, exponent: float) -> None:
    """Pearson's chi-squared over the ranks expected often enough, and the rest as one."""
    zipf = Zipf.make(num_ranks, exponent)
    ranks = draw_many(1_000_000, zipf.thresholds, zipf.aliases, zipf.tail)
    counts = np.bincount(ranks, minlength=num_ranks)
    assert len(counts) == num_ranks
    expected = np.arange(1, num_ranks + 1) ** -exponent
    expected *= len(ranks) / expected.sum()
    often = expected >= 10
    observed = np.append(counts[often], counts[~often].sum())
    expected = np.append(expected[often], max(expected[~often].sum(), 1e-9))
    chi_squared = float((np.square(observed - expected) / np.maximum(expected, 1)).sum())
    freedom = max(len(observed) - 1, 1)
    assert chi_squared < freedom + 5 * np.sqrt(2 * freedom)


def test_ranks_are_spread_over_the_table_one_to_one() -> None:
    made = SyntheticSource([997], split="train", num_samples=60_000, skew=0.0)
    (batch,) = made.batches(batch_size=60_000)
    assert len(np.unique(batch.sparse.values)) == 997
    skewed = next(
        SyntheticSource([100_000], split="train", num_samples=5000, skew=1.2).batches(
            batch_size=5000
        )
    ).sparse.values
    ids, counts = np.unique(skewed, return_counts=True)
    hottest = np.sort(ids[np.argsort(counts)[-10:]])
    assert np.diff(hottest).min() > 1


def test_a_feature_that_does_not_exist() -> None:
    with pytest.raises(
        ConfigError, match="multi_hot names feature 'C9'; the features are C1 to C4"
    ):
        source(bag_lengths={"C9": (1, 2)})


def test_opened_by_its_configuration() -> None:
    config = SyntheticData(
        kind="synthetic",
        max_num_embeddings=100,
        num_validation_samples=30,
        multi_hot={"C2": 2, "C3": (0, 1)},
    )
    opened = open_source(config, "validation")
    assert (opened.num_samples, opened.num_dense, len(opened.features)) == (30, 13, 26)
    assert max(feature.num_embeddings for feature in opened.features) == 100
    assert [feature.name for feature in opened.features if feature.multi_hot] == ["C2", "C3"]
    assert open_source(config, "train").num_samples == 1_000_000
