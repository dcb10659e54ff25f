"""Plans for several trainers, replayed on random traces and with faults planted in them.

Also what they promise of balance and limits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests import reference, strategies
from tests.oracle.rank_edits import FAULTS, HARMLESS, WHEN, Edit, Step
from tests.oracle.rank_replay import (
    Planned,
    Replay,
    Wrong,
    check,
    exchange_of,
    moved_by,
    plan_all,
    smallest_cache,
)
from tests.planning import plan_for_one

from bagpipe.errors import ConfigError, PlanError
from bagpipe.optimizers import SGD
from bagpipe.oracle import Oracle
from bagpipe.plan import StepPlan
from bagpipe.types import Group, Jagged, TableConfig, group_tables

Trace = tuple[Group, list[Jagged]]


@given(
    trace=strategies.group_traces(),
    num_trainers=st.sampled_from([2, 3, 4, 8]),
    extra=st.integers(0, 10),
    lookahead=st.integers(1, 20),
    depth=st.integers(0, 4),
    first_step=st.integers(0, 3),
    ahead=st.integers(0, 5),
    overlap=st.booleans(),
)
@settings(
    max_examples=strategies.examples(75),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
def test_every_rank_finds_current_rows_and_every_gradient_is_applied_once(
    trace: Trace,
    num_trainers: int,
    extra: int,
    lookahead: int,
    depth: int,
    first_step: int,
    ahead: int,
    overlap: bool,
) -> None:
    group, batches = trace
    num_slots = smallest_cache(group, batches, num_trainers) + extra
    planned = plan_all(
        group,
        batches,
        num_trainers,
        num_slots,
        lookahead=lookahead,
        depth=depth,
        first_step=first_step,
        overlap=overlap,
    )
    Replay(planned, ahead).run()
    check(planned)
    if not overlap:
        exchanges = [exchange_of(plan) for plans in planned.plans for plan in plans]
        assert all(
            len(each.replicas_overlapped.send) == len(each.sync_overlapped.send) == 0
            for each in exchanges
        )
    naive = reference.naive_oracle(
        # rank by rank
        [reference.in_order(row for rows in step for row in rows) for step in planned.lookups],
        num_slots=num_slots * num_trainers,
        lookahead=lookahead,
        prefetch_depth=depth + 1,  # with several trainers rows settle one step after that
    )
    for plans, (fetched, evicted) in zip(planned.plans, naive, strict=True):
        moved = [part for plan in plans for part in moved_by(plan)]
        assert sorted(row for part in moved for row in part.fetch_rows.tolist()) == sorted(fetched)
        assert {row for part in moved for row in part.evict_rows.tolist()} == evicted


def one_table(num_rows: int) -> Group:
    (group,) = group_tables(
        [TableConfig(name="t", num_embeddings=num_rows, embedding_dim=4, feature_names=["f"])],
        SGD(lr=1.0),
    )
    return group


def trace_of(ids: np.ndarray, num_rows: int) -> Trace:
    return one_table(num_rows), [
        Jagged(keys=("f",), values=values, batch_size=len(values)) for values in ids
    ]


def zipf_trace(num_batches: int, batch_size: int, num_rows: int) -> Trace:
    odds = 1 / np.arange(1, num_rows + 1) ** 1.05
    return trace_of(
        np.random.default_rng(7).choice(num_rows, (num_batches, batch_size), p=odds / odds.sum()),
        num_rows,
    )


def power_trace(num_batches: int, batch_size: int, num_rows: int) -> Trace:
    """Odds fall with the row's number to the power of -0.75.

    That is a heavier tail than that of `zipf_trace`.
    """
    ids = num_rows * np.random.default_rng(7).random((num_batches, batch_size)) ** 4
    return trace_of(ids.astype(np.int64), num_rows)


def jagged(lengths: Sequence[int], ids: Sequence[int]) -> Jagged:
    return Jagged(
        keys=("f",),
        values=np.array(ids, np.int64),
        batch_size=len(lengths),
        offsets=np.cumsum([0, *lengths]),
    )


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("num_trainers", [3, 8])
def test_ranks_without_samples_or_lookups(num_trainers: int, depth: int) -> None:
    batches = [
        jagged([1], [4]),
        jagged([0, 2], [4, 4]),
        jagged([0], []),
        jagged([0] * 9, []),
        jagged([1, 0, 1], [4, 5]),
    ] * 3
    planned = plan_all(one_table(6), batches, num_trainers, 1, lookahead=2, depth=depth)
    assert any(plan.batch_size == 0 for plan in planned.plans[0])
    Replay(planned).run()
    check(planned)


def test_plans_are_deterministic_and_do_not_depend_on_who_else_is_planned_for() -> None:
    group, batches = zipf_trace(30, 120, 3000)
    first, again = (plan_all(group, batches, 3, 60) for _ in range(2))
    alone = plan_all(group, batches, 3, 60, ranks=(1,))
    for plans, others, (only,) in zip(first.plans, again.plans, alone.plans, strict=True):
        np.testing.assert_equal([asdict(plan) for plan in plans], [asdict(plan) for plan in others])
        np.testing.assert_equal(asdict(plans[1]), asdict(only))


def test_all_caches_together_fetch_as_one_of_one_trainer() -> None:
    group, batches = power_trace(30, 120, 3000)
    # With several trainers rows settle one step after those of one trainer, hence a depth of 3.
    one = Oracle([group], num_slots=[450], lookahead=6, prefetch_depth=3)
    single = plan_for_one(one, group, batches)
    for plans, (alone, _) in zip(plan_all(group, batches, 3, 150).plans, single, strict=True):
        fetched = [
            row for plan in plans for part in moved_by(plan) for row in part.fetch_rows.tolist()
        ]
        assert sorted(fetched) == sorted(
            row for part in moved_by(alone) for row in part.fetch_rows.tolist()
        )


def test_replicas_that_fit_exactly_are_planned_and_one_less_room_is_refused() -> None:
    group, batches = zipf_trace(10, 90, 400)
    exchanges = [
        exchange_of(plan) for plans in plan_all(group, batches, 3, 60).plans for plan in plans
    ]
    needed = max(
        exchange.replicas_overlapped.num_received + exchange.replicas_urgent.num_received
        for exchange in exchanges
    )
    Replay(plan_all(group, batches, 3, 60, num_replica_slots=needed)).run()
    with pytest.raises(
        ConfigError, match=rf"needs {needed} rows of group 0 .* has room for {needed - 1} replicas"
    ):
        plan_all(group, batches, 3, 60, num_replica_slots=needed - 1)


@pytest.mark.parametrize(
    ("make", "sizes", "num_slots"),
    [(zipf_trace, (40, 16_000, 200_000), 6000), (power_trace, (60, 4000, 30_000), 4500)],
    ids=["zipf", "power"],
)
def test_ranks_share_memory_work_and_traffic_evenly(
    make: Callable[..., Trace], sizes: tuple[int, int, int], num_slots: int
) -> None:
    # Slots owned are memory, rows updated work, rows sent traffic: replicas and gradients together,
    # since replicas alone follow the hottest rows' owners and differ by more. Zipf shows it for ids
    # as skewed as recommenders' are, in caches of four steps' rows; power for a heavy tail without
    # very hot rows, in caches of seven. In much tighter caches work and traffic differ by more
    # (docs/results.md).
    group, batches = make(*sizes)
    owned, updated, sent = (np.zeros(4, np.int64) for _ in range(3))
    for index, plans in enumerate(plan_all(group, batches, 4, num_slots, lookahead=10).plans):
        owned += [
            sum(len(part.fetch_rows) - len(part.evict_rows) for part in moved_by(plan))
            for plan in plans
        ]
        if index >= 20:  # the cache is full
            assert owned.tolist() == [num_slots] * 4
            exchanges = [exchange_of(plan) for plan in plans]
            updated += [
                len(each.apply_urgent.unique_slots) + len(each.apply_overlapped.unique_slots)
                for each in exchanges
            ]
            parts = [
                (
                    each.replicas_urgent,
                    each.replicas_overlapped,
                    each.sync_urgent,
                    each.sync_overlapped,
                )
                for each in exchanges
            ]
            sent += [sum(len(part.send) for part in of_rank) for of_rank in parts]
    assert updated.max() < 1.1 * updated.min()
    assert sent.max() < 1.1 * sent.min()


@pytest.fixture(scope="module")
def two_caches() -> list[Planned]:
    """One trace, planned for a roomy cache and for a tight one."""
    group, batches = zipf_trace(24, 60, 400)
    return [
        plan_all(group, batches, 3, num_slots)
        for num_slots in (60, smallest_cache(group, batches, 3))
    ]


def with_edit(two_caches: list[Planned], edit: Edit) -> list[Planned]:
    """Returns the plans with an edit, once for each step that has a place for it."""
    found = []
    for planned in two_caches:
        for index in range(3, len(planned.plans) - 1):
            step = Step(planned, index)
            if edit(step):
                found.append(
                    replace(
                        planned,
                        plans=[*planned.plans[:index], step.encoded(), *planned.plans[index + 1 :]],
                    )
                )
    assert found, "the trace has no place for it"
    return found


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_wherever_it_is(two_caches: list[Planned], fault: str) -> None:
    edit, message, checked = FAULTS[fault]
    for planned in with_edit(two_caches, edit):
        with pytest.raises(Wrong, match=message):
            Replay(planned).run()
        with pytest.raises(
            PlanError,
            match=rf"step \d+, group 0 \(dim 4\)(, rank \d)?: ({checked}) \(invariant \d of",
        ):
            check(planned)


@pytest.mark.parametrize("counts", ["send_counts", "receive_counts"])
def test_counts_of_too_few_ranks_are_found(two_caches: list[Planned], counts: str) -> None:
    planned = two_caches[0]
    first, *others = planned.plans[3]
    exchange = exchange_of(first)
    short = {counts: getattr(exchange.sync_urgent, counts)[:-1]}
    exchange = replace(exchange, sync_urgent=replace(exchange.sync_urgent, **short))
    first = replace(first, groups=(replace(first.groups[0], exchange=exchange),))
    plans = [*planned.plans[:3], (first, *others), *planned.plans[4:]]
    with pytest.raises(PlanError, match=r"step 3, .*, rank 0: sync_urgent has counts of other"):
        check(replace(planned, plans=plans))


@pytest.mark.parametrize("edit", HARMLESS)
def test_an_edit_that_only_costs_time_is_accepted(two_caches: list[Planned], edit: str) -> None:
    for planned in with_edit(two_caches, HARMLESS[edit]):
        Replay(planned).run()
        check(planned)


def test_only_what_a_step_beside_forces_is_on_the_critical_path(two_caches: list[Planned]) -> None:
    for step in [
        Step(planned, index) for planned in two_caches for index in range(1, len(planned.plans) - 1)
    ]:
        for when in WHEN:
            for (by, user), slots in step.sends[f"replicas_{when}"].items():
                rows = {step.rows_of_replicas[by, user, slot] for slot in slots}
                assert rows & (step.before | step.urgent) == (rows if when == "urgent" else set())
            for owner in step.ranks:
                for parts in step.applies[when][owner].values():
                    row = step.rows[parts[0][0]][parts[0][1]]
                    waits_for_nobody = all(user == owner for user, _ in parts)
                    assert (row in step.after or waits_for_nobody) == (when == "urgent")


def unfenced(plan: StepPlan) -> StepPlan:
    overlapped, urgent = (replace(part, fence_tick=-1) for part in moved_by(plan))
    return replace(plan, groups=(replace(plan.groups[0], overlapped=overlapped, urgent=urgent),))


def without_urgent(plan: StepPlan) -> StepPlan:
    return replace(plan, has_urgent=False)


def short_of_a_contribution(plan: StepPlan) -> StepPlan:
    """Returns a plan whose pieces of urgent updates end before their contributions do."""
    exchange = exchange_of(plan)
    offsets = exchange.apply_urgent.piece_offsets.copy()
    offsets[-1] -= 1
    exchange = replace(exchange, apply_urgent=replace(exchange.apply_urgent, piece_offsets=offsets))
    return replace(plan, groups=(replace(plan.groups[0], exchange=exchange),))


@pytest.mark.parametrize(
    ("fault", "message", "checked"),
    [
        (unfenced, "is fetched before it is written", "does not wait for the write-back of tick"),
        (without_urgent, "has_urgent is not what there is", "has_urgent is not set"),
        (
            short_of_a_contribution,
            "pieces and bags differ",
            "the rows that they are for do not fit",
        ),
    ],
)
def test_a_fault_of_all_plans_is_found(
    fault: Callable[[StepPlan], StepPlan], message: str, checked: str
) -> None:
    group, batches = zipf_trace(40, 60, 400)
    planned = plan_all(group, batches, 3, 14)
    Replay(planned).run()
    planned = replace(
        planned, plans=[tuple(fault(plan) for plan in plans) for plans in planned.plans]
    )
    with pytest.raises(Wrong, match=message):
        Replay(planned).run()
    with pytest.raises(PlanError, match=checked):
        check(planned)
