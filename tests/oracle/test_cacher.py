"""Plans against the naive oracle and the invariants.

Traces, caches, lookaheads and prefetch depths are random.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import reference, strategies
from tests.planning import checked_for_one, plan_for_one

from bagpipe.errors import CacheTooSmallError, ConfigError, PlanError
from bagpipe.optimizers import SGD
from bagpipe.oracle import DedupedBatch, Oracle, OracleReport, checked
from bagpipe.plan import GroupPlan, StepPlan, Transfers
from bagpipe.topology import Topology
from bagpipe.types import Group, Jagged, TableConfig, group_tables


def smallest_cache(group: Group, batches: list[Jagged]) -> int:
    return max(1, *(len(reference.unique_rows(group, batch)) for batch in batches))


@given(
    strategies.group_traces(),
    st.integers(0, 70),
    st.integers(1, 30),
    st.integers(0, 4),
    st.integers(0, 5),
)
@settings(max_examples=strategies.examples(150), deadline=None)
def test_plans_keep_the_invariants_and_fetch_what_the_naive_oracle_fetches(
    trace: tuple[Group, list[Jagged]],
    extra_slots: int,
    lookahead: int,
    prefetch_depth: int,
    first_step: int,
) -> None:
    group, batches = trace
    num_slots = smallest_cache(group, batches) + extra_slots
    oracle = Oracle(
        [group],
        num_slots=[num_slots],
        lookahead=lookahead,
        prefetch_depth=prefetch_depth,
        first_step=first_step,
    )
    planned = checked_for_one(oracle, group, num_slots, batches)
    plans = [plan.groups[0] for plan, _ in planned]
    naive = reference.naive_oracle(
        [reference.unique_rows(group, batch) for batch in batches],
        num_slots=num_slots,
        lookahead=lookahead,
        prefetch_depth=prefetch_depth,
    )
    assert len(plans) == len(naive)
    for plan, (fetched, evicted) in zip(plans, naive, strict=True):
        assert {*plan.overlapped.fetch_rows, *plan.urgent.fetch_rows} == set(fetched)
        assert {*plan.overlapped.evict_rows, *plan.urgent.evict_rows} == evicted


@given(strategies.group_traces(), st.integers(0, 30), st.integers(1, 30))
@settings(max_examples=strategies.examples(25), deadline=None)
def test_plans_are_deterministic(
    trace: tuple[Group, list[Jagged]], extra_slots: int, lookahead: int
) -> None:
    group, batches = trace
    num_slots = smallest_cache(group, batches) + extra_slots

    def plan() -> list[GroupPlan]:
        oracle = Oracle([group], num_slots=[num_slots], lookahead=lookahead)
        return [plan.groups[0] for plan, _ in plan_for_one(oracle, group, batches)]

    for one, other in zip(plan(), plan(), strict=True):
        np.testing.assert_array_equal(one.lookup_slots, other.lookup_slots)
        np.testing.assert_array_equal(one.overlapped.fetch_rows, other.overlapped.fetch_rows)
        np.testing.assert_array_equal(one.urgent.evict_slots, other.urgent.evict_slots)


@given(strategies.group_traces(), st.integers(0, 30))
@settings(max_examples=strategies.examples(25), deadline=None)
def test_auto_lookahead_keeps_the_invariants(
    trace: tuple[Group, list[Jagged]], extra_slots: int
) -> None:
    group, batches = trace
    num_slots = smallest_cache(group, batches) + extra_slots
    oracle = Oracle([group], num_slots=[num_slots], lookahead="auto")
    assert len(list(checked_for_one(oracle, group, num_slots, batches))) == len(batches)


def zipf_batches(num_batches: int, batch_size: int = 64) -> tuple[Group, list[Jagged]]:
    (group,) = group_tables(
        [TableConfig(name="t", num_embeddings=2000, embedding_dim=4, feature_names=["f"])],
        SGD(lr=1.0),
    )
    rng = np.random.default_rng(7)
    return group, [
        Jagged(
            keys=("f",),
            values=(2000 * rng.random(batch_size) ** 4).astype(np.int64),
            batch_size=batch_size,
        )
        for _ in range(num_batches)
    ]


def report_of(group: Group, batches: list[Jagged], **options: int) -> OracleReport:
    num_slots = options.pop("num_slots")
    oracle = Oracle([group], num_slots=[num_slots], **options)
    report = OracleReport.for_groups([group])
    for plan, _ in plan_for_one(oracle, group, batches):
        report.add(plan, oracle.peak_slots)
    return report


def test_a_longer_lookahead_and_a_bigger_cache_fetch_less() -> None:
    group, batches = zipf_batches(120)
    by_lookahead = [
        report_of(group, batches, num_slots=250, lookahead=ahead).num_fetched
        for ahead in (1, 4, 16, 64)
    ]
    by_cache = [
        report_of(group, batches, num_slots=slots, lookahead=32).num_fetched
        for slots in (100, 200, 400, 800, 2000)
    ]
    assert by_lookahead == sorted(by_lookahead, reverse=True)
    assert by_lookahead[-1] < 0.95 * by_lookahead[0]
    assert by_cache == sorted(by_cache, reverse=True)
    assert by_cache[-1] == len({int(value) for batch in batches for value in batch.values})


def fewest_fetches(batches: list[list[int]], num_slots: int) -> int:
    """Counts the fetches of Belady's MIN, which knows all batches."""
    uses: dict[int, list[int]] = {}
    for step, rows in enumerate(batches):
        for row in rows:
            uses.setdefault(row, []).append(step)
    cached: set[int] = set()
    num_fetched = 0
    for step, rows in enumerate(batches):
        num_fetched += len(set(rows) - cached)
        cached |= set(rows)

        def next_use(row: int, step: int = step) -> float:
            return next((use for use in uses[row] if use > step), math.inf)

        unneeded = sorted(cached - set(rows), key=next_use)
        cached -= set(unneeded[max(0, num_slots - len(rows)) :])
    return num_fetched


@pytest.mark.parametrize(
    ("size", "prefetch_depth"), [(1.0, 2), (1.3, 2), (2.0, 2), (2.5, 2), (1.5, 1), (4.0, 4)]
)
def test_a_tight_cache_fetches_little_more_than_if_all_were_known(
    size: float, prefetch_depth: int
) -> None:
    group, batches = zipf_batches(100)
    rows = [reference.unique_rows(group, batch) for batch in batches]
    num_slots = int(size * max(map(len, rows)))
    report = report_of(
        group, batches, num_slots=num_slots, lookahead=64, prefetch_depth=prefetch_depth
    )
    assert report.num_fetched <= 1.05 * fewest_fetches(rows, num_slots)


def test_what_a_tight_cache_can_move_ahead_it_does() -> None:
    """There, too, slots of rows unused for longer than the prefetch depth are filled ahead."""
    group, batches = zipf_batches(100)
    num_slots, depth = int(2.5 * smallest_cache(group, batches)), 2
    oracle = Oracle([group], num_slots=[num_slots], lookahead=8, prefetch_depth=depth)
    last_use: dict[int, int] = {}
    num_overlapped = 0
    for plan, batch in checked_for_one(oracle, group, num_slots, batches):
        overlapped, urgent = plan.groups[0].overlapped.evict_rows, plan.groups[0].urgent.evict_rows
        assert all(last_use[row] < plan.step - depth for row in overlapped.tolist())
        assert all(last_use[row] >= plan.step - depth for row in urgent.tolist())
        num_overlapped += len(overlapped)
        last_use.update(dict.fromkeys(batch.groups[0].unique_rows.tolist(), plan.step))
    assert num_overlapped > 100


def test_the_report_counts_rows_bytes_slots_and_lookahead() -> None:
    group, batches = zipf_batches(50)
    report = report_of(group, batches, num_slots=2000, lookahead=10)
    num_uniques = [len(set(batch.values.tolist())) for batch in batches]
    num_seen = len({int(value) for batch in batches for value in batch.values})
    assert (report.num_steps, report.num_lookups, report.num_uniques) == (
        50,
        50 * 64,
        sum(num_uniques),
    )
    assert (report.num_fetched, report.num_written_back, report.peak_slots) == (
        num_seen,
        0,
        num_seen,
    )
    assert report.fetched_bytes == num_seen * 4 * 4
    assert report.hit_rate == pytest.approx(1 - num_seen / sum(num_uniques))
    assert report.max_lookahead == 10
    assert report.as_dict()["hit_rate"] == report.hit_rate


def test_auto_lookahead_grows_only_while_it_can_save_a_fetch_and_fits_its_memory() -> None:
    group, batches = zipf_batches(200)
    narrow = Oracle([group], num_slots=[150], lookahead="auto", lookahead_bytes=60_000)
    wide = Oracle([group], num_slots=[150], lookahead="auto")
    ample = Oracle([group], num_slots=[2000], lookahead="auto")
    reached = [
        max(plan.lookahead for plan, _ in plan_for_one(oracle, group, batches))
        for oracle in (narrow, wide, ample)
    ]
    assert reached[0] < reached[1]
    assert reached[2] == 8  # nothing ever leaves this cache


def test_a_cache_too_small_for_one_batch_is_refused_with_step_need_and_limit() -> None:
    group, batches = zipf_batches(3)
    oracle = Oracle([group], num_slots=[10], lookahead=1, first_step=40)
    with pytest.raises(
        CacheTooSmallError,
        match=r"step 40 uses \d+ unique rows of group 0 .*cache has 10 slots: give",
    ):
        list(plan_for_one(oracle, group, batches))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lookahead": 0}, "lookahead is 0, must be 'auto' or from 1"),
        ({"prefetch_depth": -1}, "prefetch_depth is -1"),
        ({"num_slots": [1, 2]}, "num_slots has 2 entries for 1 groups"),
        ({"num_slots": [0]}, "a cache of 0 slots"),
        (
            {
                "num_slots": [2**30],
                "topology": Topology(num_trainers=2, ranks=(0,), num_replica_slots=(1,)),
            },
            "a cache of 1,073,741,824 slots, must be from 1 to 1,073,741,823",
        ),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    group, _ = zipf_batches(1)
    with pytest.raises(ConfigError, match=message):
        Oracle([group], **({"num_slots": [10]} | options))  # type: ignore[arg-type]


def test_due_queues_never_run_out_of_chunks() -> None:
    """Every queue holds one partly emptied and one partly filled chunk at once."""
    num_queues, length = 40, 129
    (group,) = group_tables(
        [
            TableConfig(
                name="t", num_embeddings=num_queues * length, embedding_dim=4, feature_names=["f"]
            )
        ],
        SGD(lr=1.0),
    )

    def batch(ids: range) -> Jagged:
        return Jagged(keys=("f",), values=np.array(ids), batch_size=len(ids))

    few = [batch(range(queue * length, queue * length + 2)) for queue in range(num_queues)]
    many = [batch(range(queue * length, (queue + 1) * length)) for queue in range(num_queues)]
    num_slots = length + 2 * (num_queues - 1)
    oracle = Oracle([group], num_slots=[num_slots], lookahead=num_queues, prefetch_depth=0)
    assert len(list(checked_for_one(oracle, group, num_slots, few + many * 4))) == 5 * num_queues


def faulty(plan: GroupPlan, fault: str) -> GroupPlan | None:
    """Returns the plan with a fault planted, or None if it has no place for that fault."""
    overlapped, slots = plan.overlapped, plan.schedule.unique_slots
    if fault == "flip a slot" and len(slots) > 1:
        flipped = slots.copy()
        flipped[:2] = slots[1::-1]
        return replace(plan, schedule=replace(plan.schedule, unique_slots=flipped))
    if fault == "drop a write-back" and len(overlapped.evict_rows):
        return replace(
            plan,
            overlapped=replace(
                overlapped,
                evict_rows=overlapped.evict_rows[1:],
                evict_slots=overlapped.evict_slots[1:],
            ),
        )
    if fault == "fetch without a slot" and len(overlapped.fetch_rows):
        return replace(plan, overlapped=replace(overlapped, fetch_slots=overlapped.fetch_slots[1:]))
    if fault == "fetch a row that there is not" and len(overlapped.fetch_rows):
        return replace(
            plan, overlapped=replace(overlapped, fetch_rows=overlapped.fetch_rows + 2000)
        )
    if fault == "drop a fetch" and len(overlapped.fetch_rows):
        return replace(
            plan,
            overlapped=replace(
                overlapped,
                fetch_rows=overlapped.fetch_rows[1:],
                fetch_slots=overlapped.fetch_slots[1:],
            ),
        )
    if fault == "forget a fence" and max(overlapped.fence_tick, plan.urgent.fence_tick) >= 0:
        return replace(
            plan,
            overlapped=replace(overlapped, fence_tick=-1),
            urgent=replace(plan.urgent, fence_tick=-1),
        )
    if fault == "wait for a later tick" and len(overlapped.fetch_rows):
        return replace(plan, overlapped=replace(overlapped, fence_tick=10_000))
    if fault == "slot out of range" and len(overlapped.fetch_slots):
        return replace(
            plan, overlapped=replace(overlapped, fetch_slots=overlapped.fetch_slots + 10_000)
        )
    if (
        fault == "re-use a slot too soon"
        and len(plan.urgent.evict_rows)
        and len(plan.urgent.fetch_rows)
    ):
        return replace(
            plan,
            overlapped=merged(overlapped, plan.urgent),
            urgent=merged(plan.urgent, plan.urgent, 0),
        )
    return faulty_lookups(plan, fault)


def faulty_lookups(plan: GroupPlan, fault: str) -> GroupPlan | None:
    if fault == "swap gradients":
        bags = plan.schedule.bags[::-1].copy()
        return replace(plan, schedule=replace(plan.schedule, bags=bags))
    if fault == "pool as a mean":
        return replace(plan, bag_scales=np.ones(len(plan.inverse), np.float32))
    return None


def merged(one: Transfers, other: Transfers, length: int | None = None) -> Transfers:
    """Returns `one` and then `other`, cut to `length` entries."""
    names = ("evict_rows", "evict_slots", "fetch_rows", "fetch_slots")
    arrays = {
        name: np.concatenate([getattr(one, name), getattr(other, name)])[:length] for name in names
    }
    return Transfers(**arrays, fence_tick=max(one.fence_tick, other.fence_tick))


@pytest.mark.parametrize(
    ("fault", "num_slots", "invariants"),
    [
        ("flip a slot", 200, "1"),
        ("drop a write-back", 200, "[56]"),
        ("drop a fetch", 200, "1"),
        ("fetch without a slot", 200, "2"),
        ("fetch a row that there is not", 200, "3"),
        ("swap gradients", 200, "8"),
        ("pool as a mean", 200, "8"),
        ("forget a fence", 100, "4"),
        ("wait for a later tick", 100, "4"),
        ("slot out of range", 200, "3"),
        ("re-use a slot too soon", 64, "[56]"),
    ],
)
def test_a_planted_fault_is_found(fault: str, num_slots: int, invariants: str) -> None:
    group, batches = zipf_batches(60)
    oracle = Oracle([group], num_slots=[num_slots], lookahead=8, prefetch_depth=2)

    def planned() -> Iterator[tuple[tuple[StepPlan, ...], DedupedBatch[None]]]:
        planted = False
        for plan, batch in plan_for_one(oracle, group, batches):
            wrong = None if planted or plan.step < 20 else faulty(plan.groups[0], fault)
            planted = planted or wrong is not None
            yield (replace(plan, groups=(wrong,)) if wrong else plan,), batch
        assert planted, "the trace has no place for this fault"

    with pytest.raises(PlanError, match=rf"step \d+, group 0 .*invariant {invariants} "):
        list(checked([group], [num_slots], planned()))
