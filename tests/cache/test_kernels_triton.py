"""The Triton kernels against the CPU kernels.

On CUDA they run at real sizes, elsewhere in Triton's interpreter at tiny ones.

The CPU kernels are themselves compared with the torch reference, and results must be theirs to the
bit: the same sums in the same order. Only squares of a row, of row-wise optimizers and for its
norm, are added up in another order.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.planning import plan_for_one
from torch import Tensor

from bagpipe.cache import kernels_cpu
from bagpipe.cache.device_plan import DevicePlan
from bagpipe.optimizers import (
    SGD,
    Adagrad,
    Adam,
    AdamW,
    Optimizer,
    PartialRowWiseAdam,
    RowWiseAdagrad,
)
from bagpipe.oracle import Oracle
from bagpipe.types import Group, Jagged, TableConfig, group_tables

kernels_triton = pytest.importorskip("bagpipe.cache.kernels_triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OPTIMIZERS: list[Optimizer] = [SGD(lr=0.1), Adagrad(lr=0.1), RowWiseAdagrad(lr=0.1), Adam(lr=0.1)]


def make_group(
    dim: int, optimizer: Optimizer, *, is_mean: bool = True, num_embeddings: int = 2000
) -> Group:
    (group,) = group_tables(
        [
            TableConfig(
                name="small",
                num_embeddings=3,
                embedding_dim=dim,
                feature_names=["a", "b"],
                pooling="mean" if is_mean else "sum",
            ),
            TableConfig(
                name="large", num_embeddings=num_embeddings, embedding_dim=dim, feature_names=["c"]
            ),
        ],
        optimizer,
    )
    return group


def make_plan(
    group: Group,
    batch_size: int,
    max_length: int | None,
    seed: int = 0,
    *,
    is_weighted: bool = False,
) -> DevicePlan:
    """A plan on the CPU, with rows that are in half of all bags, and rows used once.

    With `max_length` there are also empty bags and repeats.
    """
    rng = np.random.default_rng(seed)
    lengths = (
        np.ones(3 * batch_size, np.int64)
        if max_length is None
        else rng.integers(0, max_length + 1, 3 * batch_size)
    )
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    values = rng.integers(0, 3, offsets[-1])
    num_large = offsets[-1] - offsets[2 * batch_size]
    values[offsets[2 * batch_size] :] = rng.integers(
        0, group.tables[1].num_embeddings, num_large
    ) * rng.integers(0, 2, num_large)
    batch = Jagged(
        keys=("a", "b", "c"),
        values=values,
        batch_size=batch_size,
        offsets=None if max_length is None else offsets,
        weights=rng.normal(size=len(values)) if is_weighted else None,
    )
    oracle = Oracle([group], num_slots=[group.num_rows], lookahead=1, first_step=4)
    ((plan, _),) = plan_for_one(oracle, group, [batch])
    return DevicePlan.of(
        plan.groups[0], step=4, batch_size=batch_size, num_features=3, device=torch.device("cpu")
    )


def moved(plan: DevicePlan) -> DevicePlan:
    """`plan` on the device under test."""
    values = {field.name: getattr(plan, field.name) for field in fields(plan)}
    return replace(
        plan,
        **{name: value.to(DEVICE) for name, value in values.items() if isinstance(value, Tensor)},
    )


def random_records(group: Group, num_slots: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(num_slots, group.embedding_dim, generator=generator)
    return weights, torch.rand(num_slots, group.state_width, generator=generator)


def check_lookup(group: Group, plan: DevicePlan, dtype: torch.dtype) -> None:
    weights, _ = random_records(group, group.num_rows)
    expected = torch.full((plan.num_bags, group.embedding_dim), float("nan"), dtype=dtype)
    kernels_cpu.lookup(weights, plan, expected)
    pooled = torch.full(expected.shape, float("nan"), dtype=dtype, device=DEVICE)
    kernels_triton.lookup(weights.to(DEVICE), moved(plan), pooled)
    # Triton's interpreter truncates to bfloat16 where CUDA rounds.
    rtol = 2.0**-7 if dtype == torch.bfloat16 and DEVICE.type == "cpu" else 0.0
    torch.testing.assert_close(pooled.cpu(), expected, rtol=rtol, atol=0.0)


def check_update(group: Group, plan: DevicePlan, dtype: torch.dtype) -> None:
    weights, state = random_records(group, group.num_rows)
    grads = torch.randn(
        plan.num_bags, group.embedding_dim, generator=torch.Generator().manual_seed(2)
    ).to(dtype)
    new_weights, new_state = weights.to(DEVICE, copy=True), state.to(DEVICE, copy=True)
    kernels_triton.update(
        new_weights, new_state, moved(plan), grads.to(DEVICE), group.optimizer, 0.1
    )
    kernels_cpu.update(weights, state, plan, grads, group.optimizer, 0.1)
    # a row's squares are added up in another order
    has_squares = isinstance(group.optimizer, RowWiseAdagrad | PartialRowWiseAdam)
    has_squares = has_squares or group.optimizer.max_grad_norm is not None
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if has_squares else {"rtol": 0.0, "atol": 0.0}
    torch.testing.assert_close(new_weights.cpu(), weights, **tolerance)
    torch.testing.assert_close(new_state.cpu(), state, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("max_length", "is_mean"), [(None, False), (5, False), (5, True)])
@pytest.mark.parametrize("dim", [4, 13])
def test_lookup_equals_the_cpu(
    dim: int, max_length: int | None, is_mean: bool, dtype: torch.dtype
) -> None:
    group = make_group(dim, SGD(lr=0.1), is_mean=is_mean)
    check_lookup(group, make_plan(group, 7, max_length), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: type(optimizer).__name__)
@pytest.mark.parametrize(("dim", "max_length", "is_mean"), [(4, None, False), (13, 3, True)])
def test_update_equals_the_cpu(
    dim: int, max_length: int | None, is_mean: bool, optimizer: Optimizer, dtype: torch.dtype
) -> None:
    group = make_group(dim, optimizer, is_mean=is_mean, num_embeddings=20)
    plan = make_plan(group, 300, max_length)
    assert len(plan.long_uniques) > 1
    check_update(group, plan, dtype)


@pytest.mark.parametrize(
    "optimizer",
    [
        PartialRowWiseAdam(lr=0.1, max_grad_norm=2.0),
        AdamW(lr=0.1, weight_decay=0.3),
        Adagrad(lr=0.1, weight_decay=0.3, max_grad_norm=2.0),
    ],
    ids=lambda optimizer: type(optimizer).__name__,
)
def test_clipped_and_decayed_updates_equal_the_cpu(optimizer: Optimizer) -> None:
    group = make_group(13, optimizer, num_embeddings=20)
    plan = make_plan(group, 300, 3)
    assert len(plan.long_uniques) > 1
    check_update(group, plan, torch.float32)


def test_a_rate_of_zero_leaves_every_weight_as_it_is() -> None:
    optimizer = AdamW(lr=0.0, weight_decay=0.3)
    group = make_group(4, optimizer, num_embeddings=20)
    plan = moved(make_plan(group, 8, None))
    weights, state = (tensor.to(DEVICE) for tensor in random_records(group, group.num_rows))
    weights[:, 0] = -0.0
    before = weights.clone()
    grads = torch.ones(plan.num_bags, 4, device=DEVICE)
    kernels_triton.update(weights, state, plan, grads, optimizer, 0.0)
    assert torch.equal(weights.view(torch.int32), before.view(torch.int32))


@pytest.mark.parametrize("max_length", [None, 5])
@pytest.mark.parametrize("dim", [4, 13])
def test_weighted_lookup_and_update_equal_the_cpu(dim: int, max_length: int | None) -> None:
    group = make_group(dim, Adagrad(lr=0.1), is_mean=False, num_embeddings=20)
    plan = make_plan(group, 300, max_length, is_weighted=True)
    assert len(plan.long_uniques) > 1
    check_lookup(group, plan, torch.float32)
    check_update(group, plan, torch.float32)


def test_a_row_in_every_bag_and_rows_at_the_limit_of_a_piece() -> None:
    (group,) = group_tables(
        [TableConfig(name="t", num_embeddings=4, embedding_dim=5, feature_names=["f"])],
        Adagrad(lr=0.1),
    )
    values = np.concatenate([np.full(128, 1), np.full(129, 3), np.zeros(400, np.int64)])
    batch = Jagged(keys=("f",), values=values, batch_size=len(values))
    oracle = Oracle([group], num_slots=[4], lookahead=1)
    ((plan, _),) = plan_for_one(oracle, group, [batch])
    device_plan = DevicePlan.of(
        plan.groups[0], step=0, batch_size=len(values), num_features=1, device=torch.device("cpu")
    )
    check_update(group, device_plan, torch.float32)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: type(optimizer).__name__)
@pytest.mark.parametrize("dim", [4, 13])
def test_fill_and_read_equal_the_cpu(optimizer: Optimizer, dim: int) -> None:
    group = make_group(dim, optimizer, num_embeddings=50)
    weights, state = random_records(group, 53)
    slots = torch.randperm(53, generator=torch.Generator().manual_seed(3))[:41].to(torch.int32)
    records = torch.randn(41, group.record_width)
    new_weights, new_state = weights.to(DEVICE, copy=True), state.to(DEVICE, copy=True)
    kernels_triton.fill(new_weights, new_state, slots.to(DEVICE), records.to(DEVICE))
    assert torch.equal(kernels_triton.read(new_weights, new_state, slots.to(DEVICE)).cpu(), records)
    kernels_cpu.fill(weights, state, slots, records)
    assert torch.equal(new_weights.cpu(), weights)
    assert torch.equal(new_state.cpu(), state)


def test_nothing_to_do_is_no_launch() -> None:
    group = make_group(4, Adagrad(lr=0.1))
    weights, state = random_records(group, 3)
    plan = moved(make_plan(group, 0, None))
    nothing, no_slots = (
        torch.empty(0, 4, device=DEVICE),
        torch.empty(0, dtype=torch.int32, device=DEVICE),
    )
    kernels_triton.lookup(weights.to(DEVICE), plan, nothing)
    kernels_triton.update(weights.to(DEVICE), state.to(DEVICE), plan, nothing, group.optimizer, 0.1)
    kernels_triton.fill(
        weights.to(DEVICE), state.to(DEVICE), no_slots, torch.empty(0, 8, device=DEVICE)
    )
    assert kernels_triton.read(weights.to(DEVICE), state.to(DEVICE), no_slots).shape == (0, 8)


def test_a_batch_without_lookups_gives_zeros() -> None:
    group = make_group(4, SGD(lr=0.1))
    check_lookup(group, make_plan(group, 5, 0), torch.float32)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
# dimensions that no other test has compiled
@pytest.mark.parametrize(("dim", "max_length"), [(16, None), (24, 5)])
def test_steps_of_any_size_compile_nothing_and_never_wait_for_the_device(
    dim: int, max_length: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("triton")
    compiled: list[Any] = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda **kwargs: compiled.append(kwargs)
    )
    group = make_group(dim, Adagrad(lr=0.1))
    weights, state = (tensor.to(DEVICE) for tensor in random_records(group, group.num_rows))
    # Sizes that Triton tells apart where it may: 1, multiples of 16, and others; the first has long
    # rows and so compiles all.
    plans = [
        moved(make_plan(group, batch_size, max_length, seed=batch_size))
        for batch_size in (1000, 1, 16, 17, 333, 1024)
    ]
    grads = [torch.randn(plan.num_bags, dim, device=DEVICE).bfloat16() for plan in plans]
    all_slots = torch.arange(1000, dtype=torch.int32, device=DEVICE)

    def run(index: int) -> None:
        plan = plans[index]
        slots = all_slots[index : index + plan.batch_size]  # begins at odd places
        kernels_triton.lookup(weights, plan, torch.empty_like(grads[index]))
        kernels_triton.update(
            weights, state, plan, grads[index], group.optimizer, 0.1 / (1 + index)
        )
        kernels_triton.fill(weights, state, slots, kernels_triton.read(weights, state, slots))

    run(0)
    num_kernels = len(compiled)
    assert num_kernels == 5  # lookup, update, update of long rows, fill, read
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for index in range(len(plans)):
            run(index)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(compiled) == num_kernels
