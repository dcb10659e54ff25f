"""16-bit weights: rounding to the nearest is torch's; rounding by chance is right on average."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bagpipe.native.jit import jit
from bagpipe.optimizers import SGD, Adagrad
from bagpipe.store import MemoryStore
from bagpipe.store.half import CODES, by_chance, nearest, widen
from bagpipe.types import DataType, Group, Normal, TableConfig, group_tables

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
EDGES = np.array(
    [
        0,
        -0.0,
        np.inf,
        -np.inf,
        np.nan,
        65504,
        65519.99,
        65520,
        2**-14,
        2**-24,
        2**-25,
        -(2**-25),
        1.5 * 2**-24,
        3.4e38,
        1e-45,
    ],
    np.float32,
)


@jit
def all_nearest(values: np.ndarray, code: int) -> np.ndarray:
    out = np.empty(len(values), np.uint16)
    for index in range(len(values)):
        out[index] = np.uint16(nearest(values[index], code))
    return out


@jit
def all_widened(halves: np.ndarray, code: int) -> np.ndarray:
    out = np.empty(len(halves), np.float32)
    for index in range(len(halves)):
        out[index] = widen(np.uint32(halves[index]), code)
    return out


@jit
def by_every_chance(value: np.float32, code: int) -> np.ndarray:
    out = np.empty(65536, np.uint16)
    for chance in range(65536):
        out[chance] = np.uint16(by_chance(value, np.int64(chance), code))
    return out


def as_torch(halves: np.ndarray, data_type: str) -> torch.Tensor:
    return torch.from_numpy(halves.view(np.int16).copy()).view(DTYPES[data_type])


def values_of_all_sizes() -> np.ndarray:
    rng = np.random.default_rng(0)
    any_bits = rng.integers(0, 2**32, 50_000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    usual = (rng.standard_normal(50_000) * np.exp2(rng.uniform(-28, 17, 50_000))).astype(np.float32)
    return np.concatenate([any_bits, usual, EDGES])


@pytest.mark.parametrize("data_type", ["bf16", "fp16"])
def test_nearest_is_what_torch_does(data_type: DataType) -> None:
    values = values_of_all_sizes()
    expected = torch.from_numpy(values).to(DTYPES[data_type])
    found = as_torch(all_nearest(values, CODES[data_type]), data_type)
    assert torch.equal(found.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(found.view(torch.int16)[numbers], expected.view(torch.int16)[numbers])


@pytest.mark.parametrize("data_type", ["bf16", "fp16"])
def test_widening_is_what_torch_does(data_type: DataType) -> None:
    halves = np.arange(65536).astype(np.uint16)
    expected = as_torch(halves, data_type).float().numpy()
    np.testing.assert_array_equal(all_widened(halves, CODES[data_type]), expected)


@pytest.mark.parametrize("data_type", ["bf16", "fp16"])
def test_chance_gives_a_neighbour_and_the_value_on_average(data_type: DataType) -> None:
    rng = np.random.default_rng(1)
    code, dtype = CODES[data_type], DTYPES[data_type]
    for value in (rng.standard_normal(40) * np.exp2(rng.uniform(-26, 8, 40))).astype(np.float32):
        found = all_widened(by_every_chance(value, code), code).astype(np.float64)
        exact = torch.tensor(value).to(dtype)
        # The nearest number is one neighbour, the other lies on the value's other side.
        away = float("inf") if value > float(exact) else -float("inf")
        other = torch.nextafter(exact, torch.tensor(away, dtype=dtype))
        assert set(found) <= {float(exact), float(other)}
        place = abs(float(other) - float(exact))
        assert abs(found.mean() - float(value)) <= place * 2.0**-12


@pytest.mark.parametrize("data_type", ["bf16", "fp16"])
def test_numbers_that_fit_stay_whatever_the_chance(data_type: DataType) -> None:
    code = CODES[data_type]
    halves = np.random.default_rng(2).integers(0, 65536, 300).astype(np.uint16)
    for half, value in zip(halves, all_widened(halves, code), strict=True):
        found = by_every_chance(value, code)
        assert (
            np.isnan(all_widened(found[:1], code)[0]) if np.isnan(value) else (found == half).all()
        )


@pytest.mark.parametrize("dim", [1, 6, 7])
@pytest.mark.parametrize("data_type", ["bf16", "fp16"])
def test_initial_weights_are_the_float32_ones_rounded_to_the_nearest(
    data_type: DataType, dim: int
) -> None:
    optimizer = Adagrad(lr=0.1, initial_accumulator_value=0.25)

    def records(data_type: DataType) -> tuple[Group, np.ndarray]:
        tables = [
            TableConfig(
                name="u",
                num_embeddings=50,
                embedding_dim=dim,
                feature_names=["u"],
                data_type=data_type,
            ),
            TableConfig(
                name="n",
                num_embeddings=50,
                embedding_dim=dim,
                feature_names=["n"],
                init=Normal(),
                data_type=data_type,
            ),
        ]
        group = Group(index=0, tables=tuple(tables), optimizer=optimizer)
        out = np.full((100, group.record_width), np.nan, np.float32)
        MemoryStore(group, seed=3).fetch(np.arange(100), out)
        return group, out

    (_, wide), (group, found) = records("fp32"), records(data_type)
    assert group.weight_words == (dim + 1) // 2
    assert group.record_width == group.weight_words + dim
    halves = found[:, : group.weight_words].copy().view(np.uint16)
    assert torch.equal(
        as_torch(halves[:, :dim].copy(), data_type),
        torch.from_numpy(wide[:, :dim]).to(DTYPES[data_type]),
    )
    assert (halves[:, dim:] == 0).all()
    assert (found[:, group.weight_words :] == 0.25).all()


def test_a_small_step_that_the_nearest_would_drop_counts_on_average() -> None:
    rng = np.random.default_rng(4)
    # a place of bf16 at 1 is 2**-7
    code, value, step = (CODES["bf16"], np.float32(1.0), np.float32(2.0**-12))
    assert all_nearest(np.array([value + step]), code)[0] == all_nearest(np.array([value]), code)[0]
    ends = []
    for _ in range(200):
        weight = value
        for chance in rng.integers(0, 65536, 256):
            weight = np.float32(
                all_widened(
                    np.array([by_chance(np.float32(weight + step), chance, code)], np.uint16), code
                )[0]
            )
        ends.append(weight)
    assert abs(np.mean(ends) - (1.0 + 256 * 2.0**-12)) < 5 * np.std(ends) / 200**0.5


def test_groups_have_one_data_type() -> None:
    tables = [
        TableConfig(
            name=name, num_embeddings=9, embedding_dim=4, feature_names=[name], data_type=data_type
        )
        for name, data_type in (("a", "fp32"), ("b", "bf16"), ("c", "fp32"), ("d", "bf16"))  # type: ignore[arg-type]
    ]
    first, second = group_tables(tables, SGD(lr=0.1))
    assert ([table.name for table in first.tables], first.record_bytes, first.name) == (
        ["a", "c"],
        16,
        "group 0 (dim 4)",
    )
    assert ([table.name for table in second.tables], second.record_bytes, second.name) == (
        ["b", "d"],
        8,
        "group 1 (dim 4, bf16)",
    )
