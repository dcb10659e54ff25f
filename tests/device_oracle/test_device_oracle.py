"""The oracle on the device: de-duplication to the bit, invariants, few fetches, bad input."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import reference, strategies
from tests.planning import plan_for_one

from bagpipe.device_oracle import Planner, entering, planning, row_index
from bagpipe.device_oracle import oracle as oracle_module
from bagpipe.device_oracle import planner as planner_module
from bagpipe.device_oracle.oracle import DeviceOracle, Functions
from bagpipe.device_oracle.read_back import read_back
from bagpipe.device_oracle.state import Capacity, Window
from bagpipe.errors import CacheTooSmallError, ConfigError, DataError
from bagpipe.feed.stream import StreamOptions
from bagpipe.optimizers import SGD
from bagpipe.oracle import DedupedBatch, Oracle, checked, dedup
from bagpipe.oracle.dedup import DedupedGroup
from bagpipe.plan import StepPlan
from bagpipe.types import Group, Jagged, TableConfig, group_tables

META = torch.device("meta")  # has no memory
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def smallest_cache(group: Group, batches: list[Jagged]) -> int:
    return max(1, *(len(reference.unique_rows(group, batch)) for batch in batches))


def assert_equal(one: DedupedGroup, other: DedupedGroup) -> None:
    """Equal to the bit, types included."""
    for field in fields(DedupedGroup):
        found, expected = getattr(one, field.name), getattr(other, field.name)
        if expected is None:
            assert found is None, field.name
        else:
            assert found.dtype == expected.dtype, field.name
            np.testing.assert_array_equal(found, expected, err_msg=field.name)


def make_planner(group: Group, *, num_slots: int, **options: Any) -> Planner:
    options = {"lookahead": 4} | options
    return Planner(StreamOptions(groups=(group,), num_slots=(num_slots,), **options), DEVICE)


def plan_on_device(
    planner: Planner, batches: Iterable[Jagged]
) -> Iterator[tuple[tuple[StepPlan, ...], DedupedBatch[Any]]]:
    """Each plan is read back whole, and over then."""
    staged = ((planner.stage([batch]), batch) for batch in batches)
    for made in planner.plan(staged, lambda: True):
        yield read_back(planner, made)


def one_table(num_embeddings: int, *features: str) -> Group:
    (group,) = group_tables(
        [
            TableConfig(
                name="t",
                num_embeddings=num_embeddings,
                embedding_dim=4,
                feature_names=features or ["f"],
            )
        ],
        SGD(lr=1.0),
    )
    return group


def skewed(num_batches: int, batch_size: int, *, seed: int = 7) -> list[Jagged]:
    rng = np.random.default_rng(seed)
    return [
        Jagged(
            keys=("f",),
            values=(2000 * rng.random(batch_size) ** 4).astype(np.int64),
            batch_size=batch_size,
        )
        for _ in range(num_batches)
    ]


def num_fetched(planned: Iterable[tuple[tuple[StepPlan, ...], DedupedBatch[Any]]]) -> int:
    return sum(
        len(plan.groups[0].overlapped.fetch_rows) + len(plan.groups[0].urgent.fetch_rows)
        for (plan,), _ in planned
    )


def use(way: str, patch: pytest.MonkeyPatch) -> None:
    """Torch operations or Triton, whatever the device has by default."""
    functions = Functions(entering.enter, planning.plan, row_index.rebuild)
    if way == "triton":
        enters = pytest.importorskip("bagpipe.device_oracle.entering_triton")
        plans = pytest.importorskip("bagpipe.device_oracle.planning_triton")
        index = pytest.importorskip("bagpipe.device_oracle.row_index_triton")
        functions = Functions(enters.enter, plans.plan, index.rebuild)
    patch.setattr(oracle_module, "functions_for", lambda device: functions)


def keep(index: str, patch: pytest.MonkeyPatch) -> None:
    """An index of all rows, or one that is a map, whatever the device has room for."""
    patch.setattr(
        planner_module,
        "which_know_all_rows",
        lambda groups, device: (index == "array",) * len(groups),
    )


_INDEXES = pytest.mark.parametrize("index", ["array", "map"])
_TRACES = (
    strategies.group_traces(),
    st.integers(0, 70),
    st.integers(1, 30),
    st.integers(0, 4),
    st.integers(0, 5),
)


def check_plans(
    way: str,
    index: str,
    trace: tuple[Group, list[Jagged]],
    extra_slots: int,
    lookahead: int,
    prefetch_depth: int,
    first_step: int,
) -> None:
    group, batches = trace
    num_slots = smallest_cache(group, batches) + extra_slots
    with pytest.MonkeyPatch.context() as patch:
        use(way, patch)
        keep(index, patch)
        planner = make_planner(
            group,
            num_slots=num_slots,
            lookahead=lookahead,
            prefetch_depth=prefetch_depth,
            first_step=first_step,
        )
        planned = checked([group], [num_slots], plan_on_device(planner, batches))
        for (_, deduped), batch in zip(planned, batches, strict=True):
            assert_equal(deduped.groups[0].shares[0], dedup(group, batch))


@_INDEXES
@given(*_TRACES)
@settings(max_examples=strategies.examples(40), deadline=None)
def test_plans_keep_the_invariants_and_unique_rows_are_the_hosts_to_the_bit(
    index: str, trace: Any, extra_slots: int, lookahead: int, prefetch_depth: int, first_step: int
) -> None:
    check_plans("torch", index, trace, extra_slots, lookahead, prefetch_depth, first_step)


@_INDEXES
@given(*_TRACES)
@settings(max_examples=strategies.examples(5), deadline=None)  # the interpreter takes 1 s each
def test_so_they_do_in_triton(
    index: str, trace: Any, extra_slots: int, lookahead: int, prefetch_depth: int, first_step: int
) -> None:
    check_plans("triton", index, trace, extra_slots, lookahead, prefetch_depth, first_step)


@pytest.mark.parametrize(("size", "prefetch_depth"), [(1.0, 2), (1.3, 2), (2.0, 0), (4.0, 4)])
@pytest.mark.parametrize("lookahead", [2, 20])
def test_at_most_one_percent_more_rows_are_fetched_than_the_host_fetches(
    size: float, prefetch_depth: int, lookahead: int
) -> None:
    group, batches = one_table(2000), skewed(80, 64)
    num_slots = int(size * smallest_cache(group, batches))
    options = {"lookahead": lookahead, "prefetch_depth": prefetch_depth}
    host = Oracle([group], num_slots=[num_slots], **options)
    expected = num_fetched(((plan,), batch) for plan, batch in plan_for_one(host, group, batches))
    planner = make_planner(group, num_slots=num_slots, **options)
    assert num_fetched(plan_on_device(planner, batches)) <= 1.01 * expected


@pytest.mark.parametrize("way", ["torch", "triton"])
def test_rows_of_many_lookups_are_cut_into_pieces_as_on_the_host(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(way, monkeypatch)
    group, rng = one_table(3, "f", "g"), np.random.default_rng(5)
    batches = [
        Jagged(keys=("g", "f"), values=rng.integers(0, 3, 2 * size), batch_size=size)
        for size in (1, 300, 64, 700, 192)
    ]
    planner = make_planner(group, num_slots=3)
    for (_, deduped), batch in zip(plan_on_device(planner, batches), batches, strict=True):
        assert_equal(deduped.groups[0].shares[0], dedup(group, batch))


@_INDEXES
@pytest.mark.parametrize("way", ["torch", "triton"])
def test_capacities_grow_and_cut_nothing(
    way: str, index: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches get larger, and one has more unique rows than was guessed."""
    use(way, monkeypatch)
    keep(index, monkeypatch)
    group = one_table(2000)
    batches = [*skewed(3, 8), *skewed(3, 50)]
    batches += [Jagged(keys=("f",), values=np.arange(100), batch_size=100)] * 2 + skewed(9, 8)
    planner = make_planner(group, num_slots=300)
    planned = checked([group], [300], plan_on_device(planner, batches))
    for (_, deduped), batch in zip(planned, batches, strict=True):
        assert_equal(deduped.groups[0].shares[0], dedup(group, batch))
    (oracle,) = planner.oracles
    assert oracle.num_capacities >= 3
    assert oracle.capacity.max_uniques >= 100


def test_a_small_first_batch_does_not_make_the_window_too_long() -> None:
    group, batches = one_table(2000), [*skewed(1, 2), *skewed(6, 64)]
    options = StreamOptions(
        groups=(group,), num_slots=(200,), lookahead="auto", lookahead_bytes=20 * 64 * 14
    )
    for batch_size, expected in ((None, 256), (64, 20)):
        planner = Planner(options, DEVICE, batch_size)
        for _ in plan_on_device(planner, batches):
            pass
        assert planner.oracles[0].window.lookahead == expected


@pytest.mark.parametrize("bad", [-1, 2000, 2**40])
def test_an_id_outside_its_table_is_named_after_all_batches_before(bad: int) -> None:
    group, batches = one_table(2000), skewed(6, 8)
    values = batches[4].values.copy()
    values[[3, 5]] = bad, -7
    batches[4] = Jagged(keys=("f",), values=values, batch_size=8)
    planned, steps = plan_on_device(make_planner(group, num_slots=99), batches), list[int]()
    with pytest.raises(DataError, match=rf"feature 'f': id {bad} \(lookup 3 of .*table 't'"):
        steps.extend(plan.step for (plan,), _ in planned)
    assert steps == [0, 1, 2, 3]


def test_a_batch_of_more_rows_than_slots_is_refused_with_step_need_and_limit() -> None:
    group, few = one_table(2000), skewed(3, 4)
    batches = [*few, Jagged(keys=("f",), values=np.arange(20), batch_size=20)]
    with pytest.raises(CacheTooSmallError, match=r"step 43 uses 20 unique .* has 15 slots"):
        list(plan_on_device(make_planner(group, num_slots=15, first_step=40), batches))


def test_more_places_than_have_numbers_are_refused() -> None:
    capacity = Capacity(
        max_lookups=2**29,
        max_bags=1,
        max_uniques=2**28,
        is_jagged=False,
        is_weighted=False,
        is_wide=False,
    )
    with pytest.raises(ConfigError, match="take a shorter lookahead"):
        DeviceOracle(
            one_table(2**29), Window(num_slots=9, lookahead=0, prefetch_depth=1), META, capacity
        )


def test_a_map_of_more_entries_than_have_numbers_is_refused() -> None:
    window = Window(num_slots=2**31 // 3 * 2, lookahead=0, prefetch_depth=1, knows_all_rows=False)
    with pytest.raises(ConfigError, match="take a smaller cache or a shorter lookahead"):
        DeviceOracle(one_table(2**40), window, META)


def test_no_graph_is_captured_for_a_capacity_that_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may grow while the trainer's thread waits for its turn."""
    oracle = DeviceOracle(
        one_table(100), Window(num_slots=9, lookahead=1, prefetch_depth=1), torch.device("cpu")
    )
    oracle._can_capture, oracle._num_plans = True, 99

    class Grows(nullcontext[None]):
        def __enter__(self) -> None:
            oracle._num_plans = 0

    monkeypatch.setattr(oracle, "_issuing", Grows())
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: pytest.fail("captures"))
    oracle.capture_if_due()
    assert not oracle._graphs
