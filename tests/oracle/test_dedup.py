"""De-duplication against the naive reading of a batch, the gradient schedule by its definition."""

from __future__ import annotations

from itertools import chain, pairwise
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import reference, strategies

from bagpipe.errors import DataError
from bagpipe.optimizers import SGD
from bagpipe.oracle.dedup import DedupedGroup, _dedup, dedup
from bagpipe.plan import MAX_PIECE_LENGTH
from bagpipe.types import Group, Jagged, TableConfig, group_tables


def bags_of_pieces(deduped: DedupedGroup) -> list[list[tuple[int, float]]]:
    """The output rows of each piece, with their weights."""
    offsets = deduped.piece_offsets
    weights = np.ones(len(deduped.bags)) if deduped.bag_weights is None else deduped.bag_weights
    bags = list(zip(deduped.bags.tolist(), weights.tolist(), strict=True))
    return [bags[begin:end] for begin, end in pairwise(offsets.tolist())]


def check_schedule(group: Group, batch: Jagged, deduped: DedupedGroup) -> None:
    """Checks that every bag feeds its row exactly once, with its weight and in lookup order.

    Pieces must have bounded length.
    """
    expected: dict[int, list[tuple[int, float]]] = {}
    weights = reference.lookup_weights(group, batch)
    assert deduped.lookup_weights is None or deduped.lookup_weights.tolist() == weights
    for (row, feature, sample), weight in zip(
        reference.lookups(group, batch), weights, strict=True
    ):
        expected.setdefault(row, []).append((sample * len(group.features) + feature, float(weight)))
    pieces = bags_of_pieces(deduped)
    further = dict(
        zip(deduped.long_uniques.tolist(), pairwise(deduped.long_offsets.tolist()), strict=True)
    )
    num_uniques = len(deduped.unique_rows)
    for unique, row in enumerate(deduped.unique_rows.tolist()):
        begin, end = further.get(unique, (0, 0))
        parts = [pieces[unique], *pieces[num_uniques + begin : num_uniques + end]]
        assert list(chain.from_iterable(parts)) == expected.pop(row)
        assert all(len(part) == MAX_PIECE_LENGTH for part in parts[:-1])
        assert 1 <= len(parts[-1]) <= MAX_PIECE_LENGTH
    assert not expected
    assert num_uniques + deduped.long_offsets[-1] == len(pieces)


@given(strategies.group_traces())
@settings(max_examples=strategies.examples(75), deadline=None)
def test_matches_the_naive_reading(trace: tuple[Group, list[Jagged]]) -> None:
    group, batches = trace
    for batch in batches:
        deduped = dedup(group, batch)
        rows = [row for row, _, _ in reference.lookups(group, batch)]
        assert deduped.unique_rows.tolist() == reference.unique_rows(group, batch)
        assert deduped.unique_rows[deduped.inverse].tolist() == rows
        check_schedule(group, batch, deduped)


@given(st.integers(1, 1000), st.sampled_from([1, 3, 100_000]), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_long_rows_are_cut_into_pieces(batch_size: int, num_embeddings: int, seed: int) -> None:
    (group,) = group_tables(
        [
            TableConfig(
                name="t", num_embeddings=num_embeddings, embedding_dim=4, feature_names=["a", "b"]
            )
        ],
        SGD(lr=0.1),
    )
    values = (
        np.random.default_rng(seed).integers(0, num_embeddings, 2 * batch_size).astype(np.int32)
    )
    batch = Jagged(keys=("a", "b"), values=values, batch_size=batch_size)
    check_schedule(group, batch, dedup(group, batch))


TABLES = [
    TableConfig(name="user", num_embeddings=10, embedding_dim=4, feature_names=["user"]),
    TableConfig(
        name="item", num_embeddings=100, embedding_dim=4, feature_names=["item"], pooling="mean"
    ),
]


@pytest.mark.parametrize("bad", [-1, 10, 2**31 - 1])
def test_an_id_outside_its_table_is_named(bad: int) -> None:
    (group,) = group_tables(TABLES, SGD(lr=0.1))
    batch = Jagged(keys=("user", "item"), values=np.array([3, bad, 0, 0]), batch_size=2)
    with pytest.raises(
        DataError,
        match=rf"feature 'user': id {bad} \(lookup 1 .*table 'user', whose ids are 0 to 9",
    ):
        dedup(group, batch)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint64])
def test_the_first_of_many_bad_ids_is_named_wherever_it_stands(dtype: type) -> None:
    (group,) = group_tables(TABLES, SGD(lr=0.1))
    values = np.random.default_rng(3).integers(0, 10, 2000).astype(dtype)
    values[[700, 701, 1500]] = 2**31 - 1, 55, 100
    with pytest.raises(DataError, match=r"feature 'user': id 2147483647 \(lookup 700 "):
        dedup(group, Jagged(keys=("user", "item"), values=values, batch_size=1000))


def test_ids_of_any_kind_are_right_and_need_no_compilation_of_their_own() -> None:
    (group,) = group_tables(TABLES, SGD(lr=0.1))
    rows = np.random.default_rng(3).integers(0, 10, 8)
    read_only = rows.astype(np.int32)
    read_only.flags.writeable = False

    def unique_rows(values: npt.NDArray[np.integer]) -> list[int]:
        batch = Jagged(keys=("user", "item"), values=values, batch_size=4)
        return dedup(group, batch).unique_rows.tolist()

    expected = unique_rows(rows)
    assert unique_rows(rows.astype(np.int32)) == expected
    compiled = list(cast(Any, _dedup).signatures)
    for values in (rows.astype(np.uint8), rows.astype(np.uint64), np.repeat(rows, 2)[::2]):
        assert unique_rows(values) == expected
    assert unique_rows(read_only) == expected
    assert list(cast(Any, _dedup).signatures) == compiled
    with pytest.raises(DataError, match=rf"id {2**64 - 1} "):
        unique_rows(np.full(8, 2**64 - 1, np.uint64))


def test_a_missing_feature_is_named() -> None:
    (group,) = group_tables(TABLES, SGD(lr=0.1))
    with pytest.raises(DataError, match=r"no feature 'item'.*it has user"):
        dedup(group, Jagged(keys=("user",), values=np.array([3]), batch_size=1))


@pytest.mark.parametrize("offsets", [[0, 1, 2], [0, 2, 1, 2, 2], [1, 1, 1, 1, 2], [0, 1, 1, 1, 3]])
def test_inconsistent_offsets_are_refused(offsets: list[int]) -> None:
    (group,) = group_tables(TABLES, SGD(lr=0.1))
    batch = Jagged(
        keys=("user", "item"), values=np.array([3, 4]), batch_size=2, offsets=np.array(offsets)
    )
    with pytest.raises(DataError, match="offsets must be 5 non-decreasing numbers from 0 to 2"):
        dedup(group, batch)


def test_too_few_ids_without_offsets_are_refused() -> None:
    (group,) = group_tables(TABLES, SGD(lr=0.1))
    with pytest.raises(DataError, match="has 3 ids for 2 features x 2 samples"):
        dedup(group, Jagged(keys=("user", "item"), values=np.array([3, 4, 5]), batch_size=2))


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (np.array([1.7, 0.4]), "1-D float64"),
        (np.array([True, False]), "1-D bool"),
        (np.array([[1], [2]]), "2-D int64"),
        (np.array([1, 2], dtype=">i8"), "1-D >i8"),
        ([1.5, 2.0], "1-D float64"),
    ],
)
def test_ids_that_are_no_integers_are_refused(values: np.ndarray, found: str) -> None:
    (group,) = group_tables(TABLES[:1], SGD(lr=0.1))
    with pytest.raises(DataError, match=f"ids must be a 1-D array of integers, are {found}"):
        dedup(group, Jagged(keys=("user",), values=values, batch_size=2))


def test_unsigned_offsets_that_go_down_are_refused() -> None:
    (group,) = group_tables(TABLES, SGD(lr=0.1))
    batch = Jagged(
        keys=("user", "item"),
        values=np.zeros(4, np.int64),
        batch_size=1,
        offsets=np.array([0, 9, 4], np.uint64),
    )
    with pytest.raises(DataError, match="non-decreasing"):
        dedup(group, batch)


def test_a_feature_named_twice_is_refused() -> None:
    (group,) = group_tables(TABLES[:1], SGD(lr=0.1))
    with pytest.raises(DataError, match="names a feature twice: user, user"):
        dedup(group, Jagged(keys=("user", "user"), values=np.zeros(2, np.int64), batch_size=1))


def test_mean_pooling_scales_by_bag_length_and_sum_does_not() -> None:
    (group,) = group_tables(TABLES, SGD(lr=0.1))
    batch = Jagged(
        keys=("item", "user"),
        values=np.array([5, 6, 7, 8, 1, 1]),
        batch_size=2,
        offsets=np.array([0, 4, 4, 5, 6]),
    )
    scales = dedup(group, batch).bag_scales
    assert scales is not None
    # (sample, feature): user, item
    np.testing.assert_array_equal(scales.reshape(2, 2), [[1.0, 0.25], [1.0, 1.0]])
