"""The index of rows as a map: it forgets what is far, and decides nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.device_oracle.test_device_oracle import (
    DEVICE,
    assert_equal,
    keep,
    make_planner,
    one_table,
    plan_on_device,
    skewed,
    use,
)
from tests.device_oracle.test_functions import NothingWaits
from tests.device_oracle.test_row_entries import WAYS, make_map, number_of_keys

import bagpipe
from bagpipe.device_oracle import oracle as oracle_module
from bagpipe.device_oracle import planner as planner_module
from bagpipe.device_oracle import row_index
from bagpipe.device_oracle.alerts import INDEX_FULL
from bagpipe.device_oracle.oracle import which_know_all_rows
from bagpipe.device_oracle.planner import Planner
from bagpipe.device_oracle.state import SPARE, State, Window
from bagpipe.embeddings import capacity
from bagpipe.embeddings.collection import EmbeddingBagCollection
from bagpipe.errors import PlanError
from bagpipe.feed.stream import StreamOptions
from bagpipe.optimizers import SGD
from bagpipe.oracle import checked, dedup
from bagpipe.plan import GroupPlan
from bagpipe.types import Jagged, TableConfig


def far_apart(num_batches: int, batch_size: int) -> list[Jagged]:
    """Batches of rows that no other one has, and some rows of the batch before."""
    return [
        Jagged(
            keys=("f",),
            values=np.arange(batch_size) + step * (batch_size - 3),
            batch_size=batch_size,
        )
        for step in range(num_batches)
    ]


def numbers_of_keys(planner: Planner, batches: list[Jagged]) -> Iterator[int]:
    for _ in plan_on_device(planner, batches):
        yield number_of_keys(planner.oracles[0].state)


@WAYS
def test_a_map_forgets_before_it_is_full(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(way, monkeypatch)
    keep("map", monkeypatch)
    planner = make_planner(one_table(100_000), num_slots=40, lookahead=1, prefetch_depth=0)
    numbers = list(numbers_of_keys(planner, far_apart(22, 25)))
    state = planner.oracles[0].state
    assert state.num_entries < 700
    assert max(numbers) <= 2 * state.num_entries // 3
    assert numbers != sorted(numbers)
    assert int(state.forgotten) > 5
    if way == "torch":
        without = make_planner(one_table(100_000), num_slots=40, lookahead=1, prefetch_depth=0)
        monkeypatch.setattr(Window, "batches_between", 99)
        assert max(numbers_of_keys(without, far_apart(30, 25))) > 600


def moves(plan: GroupPlan) -> list[np.ndarray]:
    return [
        getattr(moved, name)
        for moved in (plan.overlapped, plan.urgent)
        for name in ("evict_rows", "evict_slots", "fetch_rows", "fetch_slots")
    ]


def plans_of(
    way: str, index: str, batches: list[Jagged], num_slots: int, **options: Any
) -> list[GroupPlan]:
    group = one_table(2000)
    with pytest.MonkeyPatch.context() as patch:
        use(way, patch)
        keep(index, patch)
        planner = make_planner(group, num_slots=num_slots, **options)
        planned = checked([group], [num_slots], plan_on_device(planner, batches))
        return [plan.groups[0] for (plan,), _ in planned]


@pytest.mark.parametrize(
    ("lookahead", "prefetch_depth", "num_slots"), [(1, 4, 70), (3, 2, 99), (20, 2, 300), (2, 0, 70)]
)
def test_plans_are_those_of_an_index_of_all_rows(
    lookahead: int, prefetch_depth: int, num_slots: int
) -> None:
    """But for fences, which may be later, by rows that nobody knows any more."""
    batches = skewed(80, 64)
    options = {"lookahead": lookahead, "prefetch_depth": prefetch_depth}
    found, expected = (
        plans_of("torch", index, batches, num_slots, **options) for index in ("map", "array")
    )
    num_later = 0
    for one, other in zip(found, expected, strict=True):
        for of_one, of_other in zip(moves(one), moves(other), strict=True):
            np.testing.assert_array_equal(of_one, of_other)
        for name in ("overlapped", "urgent"):
            fence, needed = getattr(one, name).fence_tick, getattr(other, name).fence_tick
            assert fence >= needed
            num_later += fence > needed
    assert num_later < len(batches) / 4


def test_in_triton_they_are_those_of_torch_operations_with_their_fences() -> None:
    batches = [*skewed(12, 64), *skewed(12, 90)]
    found, expected = (
        plans_of(way, "map", batches, 130, lookahead=2) for way in ("triton", "torch")
    )
    assert max(plan.overlapped.fence_tick for plan in expected) > 3
    for one, other in zip(found, expected, strict=True):
        for of_one, of_other in zip(moves(one), moves(other), strict=True):
            np.testing.assert_array_equal(of_one, of_other)
        assert one.overlapped.fence_tick == other.overlapped.fence_tick
        assert one.urgent.fence_tick == other.urgent.fence_tick


def assert_resident(plans: list[GroupPlan], batches: list[Jagged], num_slots: int) -> None:
    """Each lookup finds its row; for one table of so many rows that no array has them all."""
    rows_of_slots = np.full(num_slots, -1, np.int64)
    for plan, batch in zip(plans, batches, strict=True):
        for moved in (plan.overlapped, plan.urgent):
            np.testing.assert_array_equal(rows_of_slots[moved.evict_slots], moved.evict_rows)
            rows_of_slots[moved.evict_slots] = -1
            assert (rows_of_slots[moved.fetch_slots] == -1).all()
            rows_of_slots[moved.fetch_slots] = moved.fetch_rows
        slots = plan.schedule.unique_slots[plan.inverse]
        np.testing.assert_array_equal(rows_of_slots[slots], batch.values)


def wide(batches: list[Jagged]) -> list[Jagged]:
    """The same batches with ids all over ten billion rows."""
    factor = 10**10 // 2000
    return [replace(batch, values=batch.values * factor + 123) for batch in batches]


@WAYS
def test_ten_billion_rows_are_planned_in_memory_that_follows_from_cache_and_window(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(way, monkeypatch)
    memory = 8 * 10**10  # an eighth of it holds arrays of 1.25 billion rows
    monkeypatch.setattr(oracle_module, "_total_memory", lambda device: memory)
    group = one_table(10**10)
    batches = wide(skewed(12 if way == "triton" else 25, 64))
    planner = make_planner(group, num_slots=99, lookahead=3)
    planned = list(plan_on_device(planner, batches))
    for (_, deduped), batch in zip(planned, batches, strict=True):
        assert_equal(deduped.groups[0].shares[0], dedup(group, batch))
    assert_resident([plan.groups[0] for (plan,), _ in planned], batches, 99)
    (oracle,) = planner.oracles
    assert not oracle.window.knows_all_rows
    room, ring = oracle.capacity.max_uniques, oracle.window.ring_length
    index = (oracle.state.keys, oracle.state.slots_of_rows, oracle.state.places_of_rows)
    num_bytes = sum(0 if tensor is None else tensor.nbytes for tensor in index)
    assert num_bytes <= 24 * 99 + 36 * ring * room + 16 * SPARE
    assert planner.nbytes < 300_000


@WAYS
def test_entries_that_are_too_few_are_told(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be a fault of the oracle's own, so the test makes the map too small."""
    use(way, monkeypatch)
    keep("map", monkeypatch)
    monkeypatch.setattr(Window, "max_entries", lambda window, max_uniques: 100)
    planner, steps = make_planner(one_table(2000), num_slots=99, lookahead=2), list[int]()
    planned = plan_on_device(planner, far_apart(9, 25))
    with pytest.raises(PlanError, match=r"at step 4 .* than its index has entries \(100"):
        steps.extend(plan.step for (plan,), _ in planned)
    assert steps == [0, 1, 2, 3]
    assert planner.oracles[0].state.alert.tolist()[:3] == [INDEX_FULL, 4, 100]


@WAYS
def test_what_is_known_of_rows_outlives_growth(way: str) -> None:
    sizes = (8, 30, 20, 90) if way == "triton" else (8, 50, 20, 90, 140)
    batches = [batch for size in sizes for batch in skewed(5, size, seed=size)]
    found, expected = (
        plans_of(way, index, batches, 150, lookahead=3) for index in ("map", "array")
    )
    for one, other in zip(found, expected, strict=True):
        for of_one, of_other in zip(moves(one), moves(other), strict=True):
            np.testing.assert_array_equal(of_one, of_other)


@pytest.mark.parametrize(("index", "number"), [("array", 2), ("map", 3)])
def test_forgetting_is_captured_with_entering_and_planning(
    index: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(index, monkeypatch)
    use("torch", monkeypatch)
    planner = make_planner(one_table(2000), num_slots=99)
    for _ in plan_on_device(planner, skewed(20, 64)):
        pass
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(oracle_module, "captured_graph", lambda stream: nullcontext(stream))
    (oracle,) = planner.oracles
    oracle._can_capture = True
    oracle.capture_if_due()
    assert len(oracle._graphs) == number


def keep_none_in_slots(state: State) -> torch.Tensor:
    return is_near(state) & (state.slots_of_rows[: state.num_entries] < 0)


def keep_none_ahead(state: State) -> torch.Tensor:
    never_planned = torch.full_like(state.batches, -1)
    return is_near(replace(state, batches=never_planned))


is_near = row_index.is_near


@pytest.mark.parametrize("fault", [keep_none_in_slots, keep_none_ahead])
def test_a_row_that_is_forgotten_too_early_is_found(
    fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_index, "is_near", fault)
    with pytest.raises(PlanError):
        plans_of("torch", "map", skewed(40, 64), 99, lookahead=9)


def test_an_eviction_that_is_forgotten_with_its_tick_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A fetch must wait for the write-back of rows that nobody knows any more."""
    rebuild = row_index.rebuild

    def forget_ticks(state: State, old: State) -> None:
        rebuild(state, old)
        state.slots_of_rows[state.slots_of_rows == -2 - state.forgotten] = -1

    monkeypatch.setattr(row_index, "rebuild", forget_ticks)
    with pytest.raises(PlanError, match="does not wait for the write-back of tick"):
        plans_of("torch", "map", skewed(40, 64), 99)


def test_rebuilding_waits_for_nothing() -> None:
    state = make_map()
    with NothingWaits():
        row_index.rebuild(state, state)


def test_arrays_of_all_rows_take_an_eighth_of_the_device_the_smallest_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    properties = SimpleNamespace(total_memory=8 * 8 * 1_500)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    groups = [one_table(rows) for rows in (900, 300, 200)]
    device = torch.device("cuda")
    assert which_know_all_rows(groups, device) == (True, True, True)
    groups.append(one_table(101))
    assert which_know_all_rows(groups, device) == (False, True, True, True)
    assert which_know_all_rows([one_table(1_501)], device) == (False,)
    assert which_know_all_rows([one_table(10**11)], torch.device("cpu")) == (False,)


def test_an_automatic_lookahead_counts_what_a_map_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    group, batches = one_table(2000), skewed(6, 64)
    options = StreamOptions(
        groups=(group,), num_slots=(200,), lookahead="auto", lookahead_bytes=20 * 64 * 40
    )
    for index, expected in (("array", 20 * 40 // 14), ("map", 20)):
        keep(index, monkeypatch)
        planner = Planner(options, DEVICE)
        for _ in plan_on_device(planner, batches):
            pass
        assert planner.oracles[0].window.lookahead == expected


def test_only_a_map_is_rebuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    rebuilt = list[bool]()
    rebuild = row_index.rebuild

    def note(state: State, old: State) -> None:
        rebuilt.append(state is old)
        rebuild(state, old)

    monkeypatch.setattr(row_index, "rebuild", note)
    use("torch", monkeypatch)
    for index, expected in (("array", 0), ("map", 7)):
        keep(index, monkeypatch)
        rebuilt.clear()
        for _ in plan_on_device(
            make_planner(one_table(2000), num_slots=99, lookahead=1), skewed(40, 64)
        ):
            pass
        assert sum(rebuilt) == expected


@pytest.mark.parametrize(("index", "num_slots"), [("array", 100), ("map", 23)])
def test_an_automatic_cache_counts_the_map_of_rows_that_the_device_keeps(
    index: str, num_slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = TableConfig(name="a", num_embeddings=900, embedding_dim=4, feature_names=["f"])
    monkeypatch.setattr(capacity, "_free_bytes", lambda device: 2 * 100 * 16)
    keep(index, monkeypatch)
    monkeypatch.setattr(oracle_module, "which_know_all_rows", planner_module.which_know_all_rows)
    embeddings = EmbeddingBagCollection([table], optimizer=SGD(lr=0.1), device=DEVICE)
    batches = [Jagged(keys=("f",), values=np.arange(6), batch_size=6)] * 3
    with bagpipe.lookahead(batches, embeddings, oracle="device") as stream:
        assert embeddings.executor is not None
        assert embeddings.executor.caches[0].num_slots == num_slots
        assert len(list(stream)) == 3
    with bagpipe.lookahead(batches, embeddings, oracle="thread"):
        assert embeddings.executor.caches[0].num_slots == 100
