"""Initial records: the generator's published answers, independence of order, distributions."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.soon import SOON_S

from bagpipe.optimizers import SGD, Adagrad, Adam, Optimizer, RowWiseAdagrad
from bagpipe.store.init import RowInitializer, fill_part, philox
from bagpipe.types import Float32Array, Group, Initializer, Normal, TableConfig, Uniform


def make_group(
    *initializers: Initializer,
    num_rows: int = 4_000,
    dim: int = 10,
    optimizer: Optimizer | None = None,
) -> Group:
    tables = tuple(
        TableConfig(
            name=f"t{index}",
            num_embeddings=num_rows,
            embedding_dim=dim,
            feature_names=[f"t{index}"],
            init=init,
        )
        for index, init in enumerate(initializers)
    )
    return Group(index=0, tables=tables, optimizer=optimizer or SGD(lr=0.1))


def fill(group: Group, rows: np.ndarray, seed: int = 1) -> Float32Array:
    out = np.full((len(rows), group.record_width), np.nan, np.float32)
    RowInitializer(group, seed).fill(rows, out)
    return out


MIXED = make_group(Uniform(low=-0.5, high=0.25), Normal(mean=2.0, std=3.0))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    """They are the philox4x32 10 lines of `kat_vectors` in Random123, its authors' library."""
    low, high = (np.uint64(counter[at] | counter[at + 1] << 32) for at in (0, 2))
    assert philox(np.uint64(key[0] | key[1] << 32), low, high) == expected


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.integers(0, MIXED.num_rows - 1), min_size=1, max_size=60),
    cut=st.integers(0, 60),
)
def test_a_record_depends_on_its_row_only(rows: list[int], cut: int) -> None:
    everything = fill(MIXED, np.arange(MIXED.num_rows))
    chosen = np.array(rows, np.int64)
    parts = [fill(MIXED, part) for part in (chosen[:cut], chosen[cut:])]
    np.testing.assert_array_equal(np.concatenate(parts), everything[chosen])


def test_threads_that_share_an_initializer_get_the_same_records() -> None:
    initializer = RowInitializer(MIXED, 1)
    rows = np.arange(MIXED.num_rows)

    def work(part: np.ndarray) -> Float32Array:
        out = np.empty((len(part), MIXED.record_width), np.float32)
        initializer.fill(part, out)
        return out

    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(work, np.array_split(rows, 13), timeout=SOON_S))
    np.testing.assert_array_equal(np.concatenate(parts), fill(MIXED, rows))


def test_only_wanted_rows_are_filled() -> None:
    rows = np.array([5, 4_100, 7])
    out = np.full((3, MIXED.record_width), 77, np.float32)
    fill_part(rows, np.array([True, False, True]), RowInitializer(MIXED, 1).parameters, out)
    assert (out[1] == 77).all()
    np.testing.assert_array_equal(out[[0, 2]], fill(MIXED, rows[[0, 2]]))


def test_seeds_rows_and_columns_differ() -> None:
    weights = fill(MIXED, np.arange(4_000))
    assert len(np.unique(weights)) > 0.99 * weights.size
    assert not (weights == fill(MIXED, np.arange(4_000), seed=2)).all(axis=1).any()
    np.testing.assert_array_equal(
        fill(MIXED, np.arange(9), seed=-1), fill(MIXED, np.arange(9), seed=2**64 - 1)
    )
    assert not np.array_equal(
        fill(MIXED, np.arange(9), seed=3), fill(MIXED, np.arange(9), seed=3 + 2**32)
    )


def test_groups_of_one_seed_differ() -> None:
    """A model gives all its groups one seed, and a group must not repeat another's columns."""
    first = fill(MIXED, np.arange(4_000))
    second = fill(dataclasses.replace(MIXED, index=1), np.arange(4_000))
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 5 / np.sqrt(first.size)


def test_uniform_has_its_range_and_moments() -> None:
    weights = fill(make_group(Uniform(low=-0.5, high=0.25)), np.arange(4_000)).astype(np.float64)
    assert -0.5 <= weights.min() < -0.4999
    assert 0.2499 < weights.max() < 0.25
    assert abs(weights.mean() + 0.125) < 5 * 0.75 / np.sqrt(12 * weights.size)
    assert abs(weights.std() - 0.75 / np.sqrt(12)) < 0.003
    assert np.abs(np.histogram(weights, 16)[0] / (weights.size / 16) - 1).max() < 0.1


@settings(max_examples=40, deadline=None)
@given(low=st.floats(-4, 4, width=64), width=st.floats(1e-9, 4, width=64))
def test_uniform_never_leaves_its_interval(low: float, width: float) -> None:
    """Narrow intervals are where rounding to float32 would."""
    high = low + width
    weights = fill(make_group(Uniform(low=low, high=high), num_rows=300), np.arange(300)).astype(
        np.float64
    )
    least = np.float32(low)
    least = least if float(least) >= low else np.nextafter(least, np.float32(np.inf))
    if float(least) >= high:
        assert (weights == float(np.float32(low))).all()  # the interval holds no float32
    else:
        assert low <= weights.min()
        assert weights.max() < high


def test_uniform_of_no_width_is_a_constant() -> None:
    assert (fill(make_group(Uniform(low=0.0, high=0.0)), np.arange(50)) == 0.0).all()


def test_normal_has_its_moments_and_tails() -> None:
    draws = (
        fill(make_group(Normal(mean=2.0, std=3.0)), np.arange(4_000)).astype(np.float64) - 2.0
    ) / 3.0
    assert abs(draws.mean()) < 5 / np.sqrt(draws.size)
    assert abs(draws.var() - 1) < 5 * np.sqrt(2 / draws.size)
    assert abs((draws**4).mean() - 3) < 0.3
    assert np.isfinite(draws).all()
    assert 3.5 < np.abs(draws).max() < 6.7  # sqrt(2 ln 2**32) is the largest possible


def test_columns_and_neighbouring_rows_are_uncorrelated() -> None:
    for init in (Uniform(low=-1.0, high=1.0), Normal()):
        weights = fill(make_group(init), np.arange(4_000))
        columns = np.corrcoef(weights.T) - np.eye(weights.shape[1])
        assert np.abs(columns).max() < 5 / np.sqrt(len(weights))
        assert abs(np.corrcoef(weights[:-1].ravel(), weights[1:].ravel())[0, 1]) < 5 / np.sqrt(
            weights.size
        )


def test_each_table_has_its_own_distribution() -> None:
    weights = fill(
        make_group(Uniform(low=10, high=11), Uniform(low=-11, high=-10), num_rows=3), np.arange(6)
    )
    assert ((weights[:3] >= 10) & (weights[:3] < 11)).all()
    assert ((weights[3:] >= -11) & (weights[3:] < -10)).all()


def test_the_default_is_uniform_by_the_size_of_the_table() -> None:
    weights = fill(make_group(Uniform(low=-0.1, high=0.1), num_rows=100), np.arange(100))
    table = TableConfig(name="a", num_embeddings=100, embedding_dim=10, feature_names=["a"])
    np.testing.assert_array_equal(
        weights, fill(Group(index=0, tables=(table,), optimizer=SGD(lr=0.1)), np.arange(100))
    )


@pytest.mark.parametrize(
    ("optimizer", "state"),
    [
        (SGD(lr=0.1), []),
        (RowWiseAdagrad(lr=0.1, initial_accumulator_value=0.5), [0.5]),
        (Adagrad(lr=0.1, initial_accumulator_value=0.75), [0.75] * 6),
        (Adam(lr=0.1), [0.0] * 12),
    ],
)
def test_optimizer_state_follows_the_weights(optimizer: Optimizer, state: list[float]) -> None:
    records = fill(make_group(Uniform(low=1.0, high=2.0), dim=6, optimizer=optimizer), np.arange(5))
    assert (records[:, :6] >= 1.0).all()
    np.testing.assert_array_equal(records[:, 6:], [state] * 5)
