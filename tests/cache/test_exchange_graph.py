"""What graphs hold of several trainers' steps, run without a GPU: the bits of steps without graphs.

Ranks are threads. Memory of the host stands for that of GPUs, and Triton's interpreter runs the
kernels, one launch at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from tests.cache.one_at_a_time import in_turn, launch_in_turn
from tests.cache.peer_ranks import Host, Turns, peer_memory
from tests.cache.test_kernels_triton import make_group
from tests.oracle.rank_replay import plan_all
from tests.train.equality import skewed_batch
from tests.train.test_trainers import (
    Trainer,
    assert_equal,
    curved_loss,
    make_tables,
    train,
)

from bagpipe.cache import device_cache, exchange, kernels_cpu, plan_rings
from bagpipe.cache.exchange_graph import BehindGraph, SharedUpdate
from bagpipe.cache.plan_layout import HostPlanRings
from bagpipe.embeddings.collection import EmbeddingBagCollection
from bagpipe.optimizers import AdamW, RowWiseAdagrad
from bagpipe.types import Jagged

kernels_triton = pytest.importorskip("bagpipe.cache.kernels_triton")

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="tests/train/test_trainers_gpu.py does it"
)
NUM_STEPS = 14


class Held:
    """Counts what was done as a graph does it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[int] = []
        """Ranks that have made a graph of what is behind compute."""
        make = BehindGraph.__init__

        def making(graph: BehindGraph, launcher: Any, *arguments: Any) -> None:
            self.made.append(launcher._communicator.rank)
            make(graph, launcher, *arguments)

        monkeypatch.setattr(BehindGraph, "__init__", making)
        self.counts = dict.fromkeys((SharedUpdate, BehindGraph), 0)
        for owner, name in ((SharedUpdate, "__call__"), (BehindGraph, "_launch")):
            monkeypatch.setattr(owner, name, self._counted(owner, getattr(owner, name)))

    def _counted(self, owner: type, original: Callable[..., None]) -> Callable[..., None]:
        def counted(*arguments: Any) -> None:
            self.counts[owner] += 1
            original(*arguments)

        return counted


def as_on_gpus(monkeypatch: pytest.MonkeyPatch) -> Held:
    """Lets ranks on a CPU do what they would do on GPUs of one host."""
    monkeypatch.setattr(peer_memory, "_NUM_PROGRAMS", {"urgent": 2, "overlapped": 2})
    monkeypatch.setattr(plan_rings, "_PLANS_BEFORE_STAY", 2)
    host = Host(2, 4096)
    turns = Turns(host)

    kernels = SimpleNamespace(
        lookup=kernels_triton.lookup,
        update=kernels_triton.update,
        sum_by_row=kernels_triton.sum_by_row,
        # by threads
        fill=in_turn(turns.turn, kernels_cpu.fill),
        read=in_turn(turns.turn, kernels_cpu.read),
    )
    monkeypatch.setattr(device_cache, "kernels_of", lambda _: kernels)
    launch_in_turn(turns.turn, monkeypatch)
    monkeypatch.setattr(peer_memory, "exchange_rows", turns.exchange_rows)
    monkeypatch.setattr(exchange, "way_for", lambda communicator, *_: host.open(communicator))
    # as on a GPU, whatever is set
    late = property(lambda _: True, lambda *_: None)
    monkeypatch.setattr(exchange.Exchange, "_defers_late", late, raising=False)
    return Held(monkeypatch)


def set_rate(embeddings: EmbeddingBagCollection, step: int) -> None:
    """When gradients of the step are still on their way."""
    if step % 3 == 0:
        embeddings.set_learning_rate(0.05 * (1 + step % 2))


def in_graphs(trainer: Trainer, batches: Sequence[Jagged]) -> None:
    """Steps as graphs do them, and between them others, one of which has no backward."""
    embeddings = trainer.embeddings
    with trainer.stream(batches) as stream:
        for step, batch in enumerate(stream):
            if step == 11:
                stream.flush_between_steps()  # before other trainers' rows have come
            rows = None if step in (6, 9) else embeddings.rows_in_graph(batch)
            if rows is not None:
                pooled = [
                    torch.empty(batch.batch_size, len(group.features), group.embedding_dim)
                    for group in embeddings.groups
                ]
                update = rows.look_up_now(pooled)
                leaves = [each.detach().requires_grad_() for each in pooled]
                loss = trainer.loss(leaves) * trainer.num_trainers
                update(torch.autograd.grad(loss, leaves))
            elif step != 6:
                (trainer.loss(embeddings(batch).groups) * trainer.num_trainers).backward()
            set_rate(embeddings, step)
            if step == 10:
                stream.flush()


def without_graphs(trainer: Trainer, batches: Sequence[Jagged]) -> None:
    """The same steps."""
    with trainer.stream(batches) as stream:
        for step, loss in trainer.losses(stream):
            if step != 6:
                loss.backward()
            set_rate(trainer.embeddings, step)


def uneven_batches() -> list[Jagged]:
    """From the eighth on the last half of the samples have many more ids than the first."""
    rng = np.random.default_rng(0)
    batches = []
    for number in range(NUM_STEPS):
        lengths = np.full((3, 12), 2)
        lengths[:, 6:] *= 1 + 3 * (number >= 7)
        batches.append(skewed_batch(rng, lengths, a=(400, 3.0), b=(50, 3.0), c=(50, 3.0)))
    return batches


def test_ranks_train_in_graphs_as_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums are not exact, so a sum in another order shows."""

    def trained(loop: Callable[[Trainer, Sequence[Jagged]], None]) -> list[np.ndarray]:
        return train(
            make_tables(),
            AdamW(lr=0.05, weight_decay=0.5),
            uneven_batches(),
            [(2, NUM_STEPS)],
            loop=loop,
            loss=curved_loss,
            cache=[400, 50],
            lookahead=3,
        )

    expected = trained(without_graphs)
    held = as_on_gpus(monkeypatch)
    assert_equal(trained(in_graphs), expected)
    assert min(held.counts.values()) >= 5
    assert sorted(held.made) == [0, 1, 1]  # the rings of one rank alone have grown


def test_sums_of_many_rows_are_the_same_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than rings begin with, and rows of so many bags that several pieces are summed."""
    monkeypatch.setattr(plan_rings, "_PLANS_BEFORE_STAY", 0)
    group = make_group(4, RowWiseAdagrad(lr=0.1), num_embeddings=200)
    rng, size = np.random.default_rng(3), 300
    batches = [
        Jagged(
            keys=("a", "b", "c"),
            values=np.concatenate([np.zeros(2 * size, np.int64), rng.integers(0, 200, size)]),
            batch_size=size,
        )
        for _ in range(8)
    ]
    planned = plan_all(group, batches, 2, group.num_rows, depth=2, first_step=4)
    rings = plan_rings.HostRings(num_features=3, num_trainers=2, device=torch.device("cpu"))
    for plans in planned.plans:
        plan = plans[-1]
        moved = rings.move(
            plan.groups[0], step=plan.step, issue_tick=plan.issue_tick, batch_size=plan.batch_size
        )
    assert isinstance(moved.rings, HostPlanRings)
    assert len(moved.plan.long_uniques) > 0
    cache = device_cache.DeviceCache(group=group, num_slots=900, device=torch.device("cpu"))
    cache._kernels = kernels_triton
    update = SharedUpdate(
        cache,
        moved.rings,
        cache.no_sums(2 * moved.sums_rows),
        torch.tensor([plan.step]),
        MagicMock(),
        batch_size=plan.batch_size,
        num_trainers=2,
    )
    grads = torch.randn(plan.batch_size, 3, 4, generator=torch.Generator().manual_seed(1))
    update.warm_up(grads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "apply", lambda *_, **__: None)
        update(grads)
    expected = cache.sum_by_row(moved.plan, grads, scale=0.5)
    begin = moved.first_sum
    assert len(expected) > 32
    assert torch.equal(update._sums[begin : begin + len(expected)], expected)
