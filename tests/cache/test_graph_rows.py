"""What a graph holds of a step, run without one: the same bits as `lookup` and `update`.

Without a GPU, Triton's interpreter runs the kernels.
"""

from __future__ import annotations

import gc
import threading
import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from tests.cache.one_at_a_time import in_turn, launch_in_turn
from tests.cache.test_kernels_triton import DEVICE, make_group, make_plan, moved, random_records
from tests.train import equality
from torch import Tensor

import bagpipe
from bagpipe.cache import device_cache, kernels_cpu, plan_rings
from bagpipe.cache.device_plan import DevicePlan
from bagpipe.cache.executor import Executor
from bagpipe.cache.graph_rows import GraphRows
from bagpipe.cache.ring import Ring, RingLayout
from bagpipe.device_oracle import oracle as device_oracle
from bagpipe.embeddings.collection import EmbeddingBagCollection
from bagpipe.optimizers import SGD, Adagrad, Adam, AdamW, Optimizer, RowWiseAdagrad
from bagpipe.types import OraclePlace

kernels_triton = pytest.importorskip("bagpipe.cache.kernels_triton")

_NUM_PLANS, _NUM_BATCHES, _STEP = 3, 5, 4


def in_rings(plan: DevicePlan, rates: tuple[float, float]) -> DevicePlan:
    """The same plan in rings that have more room, and zeros in all other places."""
    num_uniques, num_long = len(plan.unique_slots), len(plan.long_uniques)
    num_pieces, num_bags = len(plan.piece_offsets) - 1, plan.num_bags
    lookups, uniques, bags = len(plan.bags) + 3, num_uniques + 2, num_bags + 1
    further = max(num_pieces - num_uniques, num_long) + 1

    def ring(tensor: Tensor | None, num_places: int, capacity: int) -> Tensor | None:
        if tensor is None:
            return None
        whole = torch.zeros(num_places, capacity, dtype=tensor.dtype)
        whole[_STEP % num_places, : len(tensor)] = tensor
        return whole.to(DEVICE)

    headers = torch.zeros(_NUM_PLANS, 6, dtype=torch.int64)
    headers[_STEP % _NUM_PLANS] = torch.tensor([0, num_uniques, num_pieces, num_long, 0, 0])
    rings: dict[str, Any] = {
        "lookup_slots": ring(plan.lookup_slots, _NUM_PLANS, lookups),
        "unique_slots": ring(plan.unique_slots, _NUM_PLANS, uniques),
        "bag_offsets": ring(plan.bag_offsets, _NUM_BATCHES, bags + 1),
        "bag_scales": ring(plan.bag_scales, _NUM_BATCHES, bags),
        "lookup_weights": ring(plan.lookup_weights, _NUM_BATCHES, lookups),
        "bags": ring(plan.bags, _NUM_BATCHES, lookups),
        "bag_weights": ring(plan.bag_weights, _NUM_BATCHES, lookups),
        "piece_offsets": ring(plan.piece_offsets, _NUM_BATCHES, uniques + further + 1),
        "long_uniques": ring(plan.long_uniques, _NUM_BATCHES, further),
        "long_offsets": ring(plan.long_offsets, _NUM_BATCHES, further + 1),
    }
    layout = RingLayout(headers=headers.to(DEVICE), columns=(1, 2, 3), num_batches=_NUM_BATCHES)
    clock, told = torch.tensor([_STEP], device=DEVICE), torch.tensor(rates, device=DEVICE)
    return replace(
        plan, step=0, **rings, ring=Ring(layout=layout, clock=clock, rates=told, typical=(3, 5, 1))
    )


@pytest.mark.parametrize(
    ("optimizer", "max_length", "is_mean", "is_weighted", "dtype"),
    [
        (RowWiseAdagrad(lr=0.1), None, False, False, torch.float32),
        (Adam(lr=0.1), 3, True, False, torch.float32),
        (AdamW(lr=0.1, weight_decay=0.3), 3, False, True, torch.float32),
        (SGD(lr=0.1, max_grad_norm=0.5), None, False, True, torch.float32),
        (Adagrad(lr=0.1), None, False, False, torch.bfloat16),  # whose random bits go by the step
    ],
    ids=["one-hot", "mean", "weighted", "clipped", "16 bits"],
)
def test_a_plan_in_rings_gives_what_the_plan_gives(
    optimizer: Optimizer,
    max_length: int | None,
    is_mean: bool,
    is_weighted: bool,
    dtype: torch.dtype,
) -> None:
    group = make_group(4, optimizer, is_mean=is_mean, num_embeddings=20)
    plan = make_plan(group, 300, max_length, is_weighted=is_weighted)
    assert len(plan.long_uniques) > 0
    shrinkage = optimizer.update_constants(0.1).shrinkage
    weights, state = (tensor.to(DEVICE) for tensor in random_records(group, group.num_rows))
    weights = weights.to(dtype)
    grads = torch.randn(
        plan.num_bags, 4, generator=torch.Generator().manual_seed(2), device="cpu"
    ).to(DEVICE)
    results = []
    # Compiled at another rate, as a graph may be.
    for each, rate in ((moved(plan), 0.1), (in_rings(plan, (0.1, shrinkage)), 0.7)):
        pooled = torch.empty_like(grads)
        kernels_triton.lookup(weights, each, pooled)
        new_weights, new_state = weights.clone(), state.clone()
        kernels_triton.update(new_weights, new_state, each, grads, optimizer, rate)
        results.append((pooled, new_weights, new_state))
    assert not torch.equal(results[0][1], weights)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def trained(oracle: OraclePlace, *, in_graph: bool) -> tuple[list[float], list[np.ndarray], int]:
    """Losses, records at the end, and how many steps a graph could have held."""
    tables, optimizer = equality.TABLES, AdamW(lr=0.05, weight_decay=0.5)
    embeddings = EmbeddingBagCollection(tables, optimizer=optimizer, device=DEVICE, seed=11)
    batches, losses, num_held = equality.skewed_batches(13, batch_size=6), list[float](), 0
    stream = bagpipe.lookahead(batches, embeddings, cache=[60, 12], lookahead=4, oracle=oracle)
    for step, batch in enumerate(stream):
        executor = weakref.ref(cast(Executor, embeddings.executor))
        rows: GraphRows | None = None
        # some steps in another way, and one without an update, between those of a graph
        if in_graph and step not in (7, 9):
            rows = embeddings.rows_in_graph(batch)
        if step == 11:
            embeddings.set_learning_rate(0.02)
        if rows is None:
            pooled = embeddings.lookup(batch)
            grads = backward(pooled, losses)
            if step != 9:
                embeddings.update(grads)
        else:
            pooled = [
                torch.empty(6, len(group.features), group.embedding_dim, device=DEVICE)
                for group in embeddings.groups
            ]
            update = rows.look_up_now(pooled)
            update(backward(pooled, losses))
            num_held += 1
    records = equality.all_records(embeddings)
    embeddings.close()
    del stream
    assert executor() is None  # caches are freed at once, and not by the garbage collector
    return losses, records, num_held


def backward(pooled: list[Tensor], losses: list[float]) -> list[Tensor]:
    leaves = [each.detach().requires_grad_() for each in pooled]
    loss = sum(leaf.sin().square().sum() for leaf in leaves)
    assert isinstance(loss, Tensor)
    losses.append(loss.item())
    return list(torch.autograd.grad(loss, leaves))


@pytest.fixture
def reading_rings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that read rings, also on a CPU, and rings that are soon there to stay."""
    turn = threading.RLock()
    # On a CPU threads fill slots and move plans.
    moves = kernels_triton if DEVICE.type == "cuda" else kernels_cpu
    kernels = SimpleNamespace(
        lookup=kernels_triton.lookup,
        update=kernels_triton.update,
        fill=in_turn(turn, moves.fill),
        read=in_turn(turn, moves.read),
    )
    monkeypatch.setattr(device_cache, "kernels_of", lambda _: kernels)
    launch_in_turn(turn, monkeypatch)
    monkeypatch.setattr(device_oracle, "_PLANS_BEFORE_CAPTURE", 2)
    monkeypatch.setattr(plan_rings, "_PLANS_BEFORE_STAY", 2)


@pytest.mark.parametrize("oracle", ["thread", "device"])
@pytest.mark.usefixtures("reading_rings")
def test_steps_that_a_graph_could_hold_train_as_others_do(oracle: OraclePlace) -> None:
    losses, records, _ = trained(oracle, in_graph=False)
    held_losses, held_records, num_held = trained(oracle, in_graph=True)
    assert num_held >= 5
    assert held_losses == losses
    for one, other in zip(held_records, records, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.usefixtures("reading_rings")
def test_rows_of_a_graph_that_is_kept_keep_no_memory() -> None:
    """Not that of rings which have grown, nor that of a cache whose stream is over."""
    embeddings = EmbeddingBagCollection(equality.TABLES, optimizer=SGD(lr=0.1), device=DEVICE)
    small, large = (equality.skewed_batches(9, batch_size=size) for size in (4, 12))
    kept, rings, caches = list[GraphRows](), list[weakref.ref[Any]](), list[weakref.ref[Any]]()
    gc.disable()
    try:
        stream = bagpipe.lookahead(
            [*small, *large], embeddings, cache=[90, 20], lookahead=1, oracle="device"
        )
        for step, batch in enumerate(stream):
            rows = embeddings.rows_in_graph(batch)
            if rows is not None and rows not in kept:
                kept.append(rows)
                executor = cast(Executor, embeddings.executor)
                newest = list(executor._in_graph._rows.values())[-1]
                rings.append(weakref.ref(newest[0][0]))
                del newest
                caches.append(weakref.ref(executor.caches[0]))
                del executor
            if step == len(small) + 3:
                stream.flush()  # the device has computed the steps of the old rings
                assert rings[0]() is None
        del stream
        assert len(kept) == 2
        assert [each() for each in (*rings, *caches)] == [None] * 4
    finally:
        gc.enable()
    embeddings.close()


def test_a_cpu_has_no_rows_for_a_graph() -> None:
    embeddings = EmbeddingBagCollection(equality.TABLES, optimizer=SGD(lr=0.1))
    for place in ("thread", "device"):
        stream = bagpipe.lookahead(
            equality.skewed_batches(3, batch_size=4),
            embeddings,
            cache=[60, 12],
            oracle=place,  # type: ignore[arg-type]
        )
        for batch in stream:
            assert embeddings.rows_in_graph(batch) is None
            embeddings(batch)  # still to be had
    embeddings.close()
