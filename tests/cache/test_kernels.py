"""The CPU kernels against the torch reference, and that against torch.nn and torch.optim."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from tests.cache import kernels_torch
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

OPTIMIZERS = [
    SGD(lr=0.1),
    Adagrad(lr=0.1),
    RowWiseAdagrad(lr=0.1),
    Adam(lr=0.1),
    AdamW(lr=0.1, weight_decay=0.3, max_grad_norm=2.0),
    PartialRowWiseAdam(lr=0.1),
    RowWiseAdagrad(lr=0.1, weight_decay=0.3, max_grad_norm=2.0),
]


def make_case(
    optimizer: Optimizer,
    dim: int,
    is_jagged: bool,
    batch_size: int = 700,
    *,
    is_weighted: bool = False,
) -> tuple[Group, Jagged, DevicePlan]:
    """A skewed batch: long rows of several pieces, empty bags, repeated ids, a shared table.

    One table is pooled by the mean, but with per-sample weights all are summed.
    """
    (group,) = group_tables(
        [
            TableConfig(
                name="small",
                num_embeddings=3,
                embedding_dim=dim,
                feature_names=["a", "b"],
                pooling="sum" if is_weighted else "mean",
            ),
            TableConfig(name="large", num_embeddings=2000, embedding_dim=dim, feature_names=["c"]),
        ],
        optimizer,
    )
    rng = np.random.default_rng(dim)
    lengths = rng.integers(0, 4, 3 * batch_size) if is_jagged else np.ones(3 * batch_size, np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    values = rng.integers(0, 3, offsets[-1])
    values[offsets[2 * batch_size] :] = rng.integers(0, 2000, offsets[-1] - offsets[2 * batch_size])
    batch = Jagged(
        keys=("a", "b", "c"),
        values=values,
        batch_size=batch_size,
        offsets=offsets if is_jagged else None,
        weights=rng.normal(size=len(values)) if is_weighted else None,
    )
    oracle = Oracle([group], num_slots=[group.num_rows], lookahead=1, first_step=4)
    ((plan, _),) = plan_for_one(oracle, group, [batch])
    device_plan = DevicePlan.of(
        plan.groups[0], step=4, batch_size=batch_size, num_features=3, device=torch.device("cpu")
    )
    assert len(device_plan.long_uniques) > 0
    return group, batch, device_plan


def pooled(
    kernels: ModuleType, weights: Tensor, plan: DevicePlan, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`kernels.lookup` into a buffer of its own."""
    out = torch.full((plan.num_bags, weights.shape[1]), float("nan"), dtype=dtype)
    kernels.lookup(weights, plan, out)
    return out


@pytest.mark.parametrize("is_weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize(
    ("is_jagged", "grad_dtype"),
    [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("dim", [1, 4, 13, 64])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: type(optimizer).__name__)
def test_cpu_kernels_equal_the_torch_reference(
    optimizer: Optimizer, dim: int, is_jagged: bool, grad_dtype: torch.dtype, is_weighted: bool
) -> None:
    group, _, plan = make_case(optimizer, dim, is_jagged, is_weighted=is_weighted)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(group.num_rows, dim, generator=generator)
    state = torch.rand(group.num_rows, group.state_width, generator=generator)
    grads = torch.randn(plan.num_bags, dim, generator=generator).to(grad_dtype)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(
            pooled(kernels_cpu, weights, plan, dtype), pooled(kernels_torch, weights, plan, dtype)
        )
    expected_weights, expected_state = weights.clone(), state.clone()
    kernels_cpu.update(weights, state, plan, grads, optimizer, optimizer.lr)
    kernels_torch.update(expected_weights, expected_state, plan, grads, optimizer, optimizer.lr)
    # Equal but for torch's square root on CPUs, which is not correctly rounded.
    torch.testing.assert_close(weights, expected_weights, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(state, expected_state, rtol=1e-6, atol=1e-6)
    if isinstance(optimizer, SGD):
        assert torch.equal(weights, expected_weights)


@pytest.mark.parametrize("kernels", [kernels_cpu, kernels_torch], ids=["cpu", "torch"])
def test_fill_and_read_are_inverse(kernels: object) -> None:
    weights, state = torch.zeros(50, 5), torch.zeros(50, 2)
    slots, records = torch.tensor([3, 49, 0], dtype=torch.int32), torch.randn(3, 7)
    kernels.fill(weights, state, slots, records)  # type: ignore[attr-defined]
    assert torch.equal(kernels.read(weights, state, slots), records)  # type: ignore[attr-defined]
    assert int((weights != 0).any(1).sum()) == 3


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_the_number_of_threads_changes_no_bit(num_threads: int) -> None:
    optimizer = RowWiseAdagrad(lr=0.1)
    group, _, plan = make_case(optimizer, 16, True, batch_size=3000)
    weights, state = torch.randn(group.num_rows, 16), torch.rand(group.num_rows, 1)
    grads = torch.randn(plan.num_bags, 16)
    results = []
    before = torch.get_num_threads()
    for threads in (1, num_threads):
        torch.set_num_threads(threads)
        try:
            new_weights, new_state = weights.clone(), state.clone()
            kernels_cpu.update(new_weights, new_state, plan, grads, optimizer, 0.1)
            results.append((pooled(kernels_cpu, weights, plan), new_weights, new_state))
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
