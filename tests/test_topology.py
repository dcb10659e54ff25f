"""Rows and their shards: even for any number, and for few those that there have always been."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from tests import reference

from bagpipe.topology import NUM_SHARDS, by_shard, lines_of_shard, shard_of, shards_of
from bagpipe.types import Int64Array


@cache
def uneven_rows() -> Int64Array:
    """Rows that are spread unevenly over the table, as those of several tables in use."""
    return np.unique((10**9 * np.random.default_rng(2).random(2_000_000) ** 4).astype(np.int64))


@pytest.mark.parametrize("num_shards", [1, 2, 4, 8])
def test_few_shards_join_neighbours_of_the_oracles(num_shards: int) -> None:
    rows = np.random.default_rng(1).integers(0, 10**12, 5_000)
    expected = [reference.shard_of(row) * num_shards // NUM_SHARDS for row in rows.tolist()]
    assert shards_of(rows, num_shards).tolist() == expected
    assert [shard_of(row, num_shards) for row in rows.tolist()] == expected


@pytest.mark.parametrize("num_shards", [1, 2, 3, 4, 5, 7, 8, 12, 31, 64])
def test_any_number_of_shards_is_even_within_two_percent(num_shards: int) -> None:
    num_rows = 1_000_000
    counts = np.bincount(shards_of(np.arange(num_rows), num_shards), minlength=num_shards)
    assert len(counts) == num_shards
    np.testing.assert_allclose(counts, num_rows / num_shards, rtol=0.02)
    rows = uneven_rows()
    counts = np.bincount(shards_of(rows, num_shards))
    np.testing.assert_allclose(counts, len(rows) / num_shards, rtol=0.02)


@pytest.mark.parametrize("num_shards", [3, 5, 7, 12])
def test_a_row_has_the_upper_half_of_its_hash_times_the_number_of_shards(num_shards: int) -> None:
    rows = np.random.default_rng(3).integers(0, 2**40, 5_000)
    hashes = [(row // 16) * 0x9E3779B97F4A7C15 % 2**64 for row in rows.tolist()]
    assert shards_of(rows, num_shards).tolist() == [
        (value >> 32) * num_shards >> 32 for value in hashes
    ]


@pytest.mark.parametrize("num_shards", [1, 2, 3, 12])
@pytest.mark.parametrize("num_rows", [0, 1, 17, 5_000])
def test_grouping_keeps_the_order_within_a_shard(num_rows: int, num_shards: int) -> None:
    rows = np.random.default_rng(4).integers(0, 10**9, num_rows)
    order, counts = by_shard(rows, num_shards)
    shards = shards_of(rows, num_shards)
    np.testing.assert_array_equal(order, np.argsort(shards, kind="stable"))
    np.testing.assert_array_equal(counts, np.bincount(shards, minlength=num_shards))


@pytest.mark.parametrize("num_shards", [1, 3, 8])
def test_each_line_is_numbered_by_the_one_shard_that_has_it(num_shards: int) -> None:
    num_rows = 10_001
    lines = [lines_of_shard(num_rows, shard, num_shards) for shard in range(num_shards)]
    shards = shards_of(np.arange(num_rows), num_shards)
    for shard, (places, num_own) in enumerate(lines):
        own = places >= 0
        assert places[own].tolist() == list(range(num_own))
        np.testing.assert_array_equal(np.repeat(own, 16)[:num_rows], shards == shard)
