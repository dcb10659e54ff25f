"""Plans of the host in rings: what `plan_to_device` gives, and what kernels find by a clock.

Without a GPU, Triton's interpreter runs the kernels.
"""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.cache.test_kernels_triton import DEVICE, make_group, random_records
from tests.oracle.rank_replay import exchange_of, plan_all
from tests.train import equality
from torch import Tensor

import bagpipe
from bagpipe.cache import executor, plan_rings
from bagpipe.cache.device_plan import DeviceGroup, DevicePlan, PlanRings, plan_to_device
from bagpipe.cache.plan_layout import ExchangeRings, HostPlanRings, RowRings
from bagpipe.cache.plan_rings import HostRings
from bagpipe.cache.ring import Ring
from bagpipe.embeddings.collection import EmbeddingBagCollection
from bagpipe.optimizers import SGD, Adam
from bagpipe.plan import GroupPlan, StepPlan
from bagpipe.types import Group, Jagged

kernels_triton = pytest.importorskip("bagpipe.cache.kernels_triton")

_SENT = ("replicas_overlapped", "replicas_urgent", "sync_urgent", "sync_overlapped")
_APPLIED = ("apply_urgent", "apply_overlapped")
_CPU = torch.device("cpu")


def plans_of(
    group: Group,
    sizes: Sequence[int],
    num_trainers: int,
    *,
    max_length: int | None = None,
    is_weighted: bool = False,
    depth: int = 2,
) -> list[StepPlan]:
    """Those of the last rank, for batches of so many samples."""
    rng, batches = np.random.default_rng(3), []
    for size in sizes:
        one_each = max_length is None
        lengths = np.ones(3 * size, np.int64) if one_each else rng.integers(0, 4, 3 * size)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        values = rng.integers(0, 3, offsets[-1])
        values[offsets[2 * size] :] = rng.integers(0, 20, offsets[-1] - offsets[2 * size])
        batches.append(
            Jagged(
                keys=("a", "b", "c"),
                values=values,
                batch_size=size,
                offsets=None if one_each else offsets,
                weights=rng.normal(size=len(values)) if is_weighted else None,
            )
        )
    planned = plan_all(group, batches, num_trainers, group.num_rows, depth=depth, first_step=4)
    return [plans[-1] for plans in planned.plans]


def in_shared_memory(plan: Any, memory: mmap.mmap, end: list[int]) -> Any:
    """A plan whose arrays lie in `memory`, from `end` on, as those of the oracle process."""
    if isinstance(plan, np.ndarray):
        copy = np.frombuffer(memory, plan.dtype, plan.size, end[0]).reshape(plan.shape)
        copy[...] = plan
        end[0] += -(-plan.nbytes // 256) * 256
        return copy
    if isinstance(plan, tuple):
        return tuple(in_shared_memory(each, memory, end) for each in plan)
    if not is_dataclass(plan) or isinstance(plan, type):
        return plan
    named = {field.name: getattr(plan, field.name) for field in fields(plan)}
    moved = {name: in_shared_memory(value, memory, end) for name, value in named.items()}
    return replace(plan, **moved)


def rings_for(num_trainers: int, *, with_rows: bool = False) -> HostRings:
    return HostRings(
        num_features=3,
        num_trainers=num_trainers if num_trainers > 1 else 0,
        device=DEVICE,
        with_rows=with_rows,
    )


def move(rings: HostRings, plan: StepPlan, **along: Any) -> DeviceGroup:
    return rings.move(
        plan.groups[0],
        step=plan.step,
        issue_tick=plan.issue_tick,
        batch_size=plan.batch_size,
        **along,
    )


def plain(plan: StepPlan, **more: Any) -> DeviceGroup:
    return plan_to_device(
        plan.groups[0],
        step=plan.step,
        batch_size=plan.batch_size,
        num_features=3,
        device=_CPU,
        **more,
    )


def check_same(moved: Any, expected: Any, added: int, name: str = "") -> None:
    """`added` is where the step's sums are."""
    if isinstance(expected, Tensor):
        if (name.startswith("sync") and name.endswith("send")) or name.endswith("apply.bags"):
            expected = expected + added
        assert moved.dtype == expected.dtype, name
        assert torch.equal(moved.cpu(), expected), name
    elif is_dataclass(expected):
        for field in fields(expected):
            where = "apply" if name.startswith("apply") else name
            if (where, field.name) != ("apply", "batch_size"):  # the two halves of sums
                values = getattr(moved, field.name), getattr(expected, field.name)
                check_same(*values, added, f"{where}.{field.name}" if name else field.name)
    else:
        assert moved == expected, name


def check_group(moved: DeviceGroup, plan: StepPlan, **more: Any) -> None:
    expected = plain(plan, **more)
    check_same(moved.plan, expected.plan, 0, "plan")
    check_same(moved.overlapped, expected.overlapped, 0, "overlapped")
    assert (moved.exchange is None) == (expected.exchange is None)
    assert moved.first_sum == plan.step % 2 * moved.sums_rows
    if expected.exchange is not None:
        for name in (*_SENT, *_APPLIED):
            one, other = getattr(moved.exchange, name), getattr(expected.exchange, name)
            check_same(one, other, moved.first_sum, name)
        assert moved.sums_rows >= plan.groups[0].num_uniques + exchange_of(plan).num_room


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize(
    ("num_trainers", "max_length", "is_weighted"),
    [(1, None, False), (1, 3, True), (2, None, True), (3, 3, False)],
)
def test_plans_in_rings_are_those_of_plain_tensors(
    num_trainers: int, max_length: int | None, is_weighted: bool, is_shared: bool
) -> None:
    group = make_group(4, SGD(lr=0.1), is_mean=not is_weighted, num_embeddings=20)
    sizes, depth = [2, 9, 5, 300, 280, 900, *[40] * 6, 3, 1000], 3
    plans = plans_of(
        group, sizes, num_trainers, max_length=max_length, is_weighted=is_weighted, depth=depth
    )
    assert len(plans[5].groups[0].schedule.long_uniques) > 0
    rings = rings_for(num_trainers, with_rows=is_weighted)
    memory, end = mmap.mmap(-1, 1 << 22), [4096]
    held = deque[tuple[DeviceGroup, StepPlan, list[Any]]]()
    for number, plan in enumerate(plans):
        along = [np.arange(number, dtype=np.int64), np.ones((number, 2), np.float32)]
        if is_shared:
            plan = in_shared_memory(plan, memory, end)
            along = [in_shared_memory(each, memory, end) for each in along]
        moved = move(rings, plan, along=along)
        plan, along = plans[number], [each.copy() for each in along]
        held.append((moved, plan, along))
        if len(held) > depth + 2:  # what is known ahead, and what is not over
            moved, plan, along = held.popleft()
        check_group(moved, plan, with_rows=is_weighted)
        for tensor, array in zip(moved.along, along, strict=True):
            np.testing.assert_array_equal(tensor.cpu().numpy(), array)


def with_clock(rings: PlanRings, step: int, batch_size: int) -> DevicePlan:
    ring = Ring(
        layout=rings.layout,
        clock=torch.tensor([step], device=DEVICE),
        typical=(3, 5, 1),
        rates=torch.tensor([0.1, 0.0], device=DEVICE),
    )
    return replace(rings.plans, batch_size=batch_size, ring=ring)


def in_place(rows: RowRings, step: int) -> tuple[list[int], list[int], int]:
    place = step % len(rows.send)
    counts = (rows.send_counts[place].tolist(), rows.receive_counts[place].tolist())
    return *counts, int(rows.firsts[place])


def check_header(rings: HostPlanRings, plan: StepPlan, first_sum: int) -> None:
    group: GroupPlan = plan.groups[0]
    schedules: list[tuple[PlanRings, Any]] = [(rings, group.schedule)]
    if rings.exchange is not None:
        exchange, on_device = exchange_of(plan), rings.exchange
        behind = exchange.first_replica + exchange.replicas_overlapped.num_received
        received = first_sum + group.num_uniques
        firsts = (exchange.first_replica, behind, received, received)
        for name, first in zip(_SENT, firsts, strict=True):
            rows, ring = getattr(exchange, name), getattr(on_device, name)
            expected = (rows.send_counts.tolist(), rows.receive_counts.tolist(), first)
            assert in_place(ring, plan.step) == expected
        schedules += [(getattr(on_device, name), getattr(exchange, name)) for name in _APPLIED]
    for each, schedule in schedules:
        header = each.layout.headers[plan.step % len(each.layout.headers)]
        assert header[list(each.layout.columns)].tolist() == [
            schedule.num_uniques,
            len(schedule.piece_offsets) - 1,
            len(schedule.long_uniques),
        ]


@pytest.mark.parametrize(
    ("num_trainers", "max_length", "is_weighted"), [(1, None, True), (2, 3, False), (3, 3, True)]
)
def test_kernels_find_plans_in_rings_by_a_clock(
    num_trainers: int, max_length: int | None, is_weighted: bool
) -> None:
    optimizer = Adam(lr=0.1)
    group = make_group(4, optimizer, is_mean=not is_weighted, num_embeddings=20)
    plans = plans_of(
        group, [900] + [850] * 12, num_trainers, max_length=max_length, is_weighted=is_weighted
    )
    rings, num_held = rings_for(num_trainers), 0
    num_slots = 1 + max(plan.groups[0].schedule.unique_slots.max() for plan in plans)
    records = random_records(group, num_slots)  # with replicas
    weights, state = (tensor.to(DEVICE) for tensor in records)
    for plan in plans:
        moved = move(rings, plan)
        if moved.rings is None:
            continue
        num_held += 1
        assert isinstance(moved.rings, HostPlanRings)
        check_header(moved.rings, plan, moved.first_sum)
        if num_held > 1:  # the interpreter is slow
            continue
        pairs = [(moved.plan, with_clock(moved.rings, plan.step, plan.batch_size))]
        if moved.exchange is not None:
            on_device = moved.rings.exchange
            assert isinstance(on_device, ExchangeRings)
            assert on_device.sums_rows == moved.sums_rows
            pairs += [
                (getattr(moved.exchange, name), with_clock(getattr(on_device, name), plan.step, 0))
                for name in _APPLIED
            ]
        pooled = [torch.empty(moved.plan.num_bags, 4, device=DEVICE) for _ in range(2)]
        for each, out in zip(pairs[0], pooled, strict=True):
            kernels_triton.lookup(weights, each, out)
        assert torch.equal(*pooled)
        generator = torch.Generator().manual_seed(2)
        num_grads = max(moved.plan.num_bags, 2 * moved.sums_rows)
        grads = torch.randn(num_grads, 4, generator=generator).to(DEVICE)
        for pair in pairs:
            results = [(weights.clone(), state.clone()) for _ in pair]
            for each, (new_weights, new_state) in zip(pair, results, strict=True):
                kernels_triton.update(new_weights, new_state, each, grads, optimizer, 0.1)
            assert torch.equal(results[0][0], weights) == (len(pair[0].unique_slots) == 0)
            for one, other in zip(*results, strict=True):
                assert torch.equal(one, other)
    assert num_held > 1


def test_rings_stay_as_long_as_plans_fit() -> None:
    group, rings = make_group(4, SGD(lr=0.1), num_embeddings=20), rings_for(2)
    plans = plans_of(group, [40] * 15 + [400] + [300] * 10, 2)
    moved = [move(rings, plan) for plan in plans]
    found = [each.rings for each in moved]
    # The third plan is the first that moves two steps ahead. A larger batch comes as the 16th.
    assert [each is None for each in found] == [
        *([True] * 2 + [True] * 8 + [False] * 5),
        *([True] * 8 + [False] * 3),
    ]
    kept = [each for each in found if each is not None]
    assert all(each is kept[0] for each in kept[:5])
    assert all(each is kept[5] for each in kept[5:])
    assert kept[0] is not kept[5]
    assert isinstance(kept[5], HostPlanRings)
    assert kept[5].exchange is not None
    assert kept[5].exchange.sums_rows == moved[-1].sums_rows
    num_places, capacity = kept[5].plans.bags.shape
    assert num_places == 6  # a depth of 2, and four
    assert capacity == 600 + 150  # a quarter more than half of 400 samples have
    for array in (kept[5].plans.piece_offsets, kept[5].exchange.sync_urgent.send):
        assert array.stride(0) % 4 == 0
        assert array.data_ptr() % 16 == 0


def test_kinds_of_plans_have_rings_of_their_own() -> None:
    """The same memory, with and without what only some batches have."""
    group, rings = make_group(4, SGD(lr=0.1), is_mean=False, num_embeddings=20), rings_for(1)
    bare = plans_of(group, [20] * 24, 1)
    rich = plans_of(group, [20] * 24, 1, max_length=3, is_weighted=True)
    found = [
        move(rings, pair[number % 2]).rings
        for number, pair in enumerate(zip(bare, rich, strict=True))
    ]
    assert found[-4] is found[-2] is not None
    assert found[-3] is found[-1] is not None
    for name in ("bag_offsets", "lookup_weights", "bag_weights"):
        assert getattr(found[-2].plans, name) is None
        assert len(getattr(found[-1].plans, name)) == 6
    assert found[-1].plans.bag_scales is None
    assert found[-1].plans.bags is found[-2].plans.bags


def test_memory_of_the_host_is_used_again_only_once_it_is_given_back() -> None:
    group, rings = make_group(4, SGD(lr=0.1), num_embeddings=20), rings_for(1)
    plans = plans_of(group, [4] * 12, 1)
    groups = [move(rings, plan) for plan in plans[:9]]  # more than there are places
    assert len(rings._free) == 0
    for moved in groups:
        moved.give_back()
    assert len({row.data_ptr() for row, _ in rings._free}) == 9
    move(rings, plans[9])
    assert len(rings._free) == 8


class NoRings(plan_rings.PlanMover):
    """Plain tensors also on a GPU."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._rings = []


class RingsAnywhere(plan_rings.PlanMover):
    """Rings also on a CPU."""

    def __init__(self, *arguments: Any, with_rows: bool) -> None:
        super().__init__(*arguments, with_rows=with_rows)
        self._rings = self._rings or [
            HostRings(num_features=number, num_trainers=0, device=DEVICE, with_rows=with_rows)
            for number in self._num_features
        ]


def trained() -> tuple[list[float], list[np.ndarray]]:
    embeddings = EmbeddingBagCollection(
        equality.TABLES, optimizer=Adam(lr=0.05), device=DEVICE, seed=11
    )
    small, large = (equality.skewed_batches(12, batch_size=size) for size in (6, 11))
    losses = list[float]()
    for batch in bagpipe.lookahead(
        [*small, *large, *small], embeddings, cache=[70, 16], lookahead=4, oracle="thread"
    ):
        pooled = embeddings.lookup(batch)
        leaves = [each.detach().requires_grad_() for each in pooled]
        loss = torch.stack([leaf.sin().square().sum() for leaf in leaves]).sum()
        losses.append(loss.item())
        embeddings.update(torch.autograd.grad(loss, leaves))
    records = equality.all_records(embeddings)
    embeddings.close()
    return losses, records


def test_training_by_plans_in_rings_is_that_by_plain_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A place is written again only when nothing reads it any more."""
    results = []
    for mover in (NoRings, RingsAnywhere):
        monkeypatch.setattr(executor, "PlanMover", mover)
        results.append(trained())
    assert results[0][0] == results[1][0]
    for one, other in zip(results[0][1], results[1][1], strict=True):
        np.testing.assert_array_equal(one, other)
