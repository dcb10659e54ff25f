"""Caches cut into shards: each shard plans as a small cache of its own would.

Only large caches are cut, unless a test says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests import reference, strategies
from tests.oracle.rank_replay import Replay, check, plan_all
from tests.planning import checked_for_one, deduped

from bagpipe.errors import CacheTooSmallError
from bagpipe.native.jit import threaded
from bagpipe.optimizers import SGD
from bagpipe.oracle import Cacher, Oracle, dedup, shards
from bagpipe.oracle.dry_run import Grid, replay
from bagpipe.oracle.eviction import loops
from bagpipe.oracle.row_trace import Trace
from bagpipe.plan import GroupPlan
from bagpipe.types import Group, Jagged, TableConfig, group_tables


@pytest.fixture
def cut_always() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "MIN_SLOTS", 1)
        yield


def slots_needed(group: Group, batches: Sequence[Jagged]) -> int:
    return max(
        1,
        *(
            shards.num_slots_needed(dedup(group, batch).unique_rows, group.num_rows)
            for batch in batches
        ),
    )


def plans_of(
    group: Group, batches: Sequence[Jagged], num_slots: int, **options: int
) -> list[GroupPlan]:
    oracle = Oracle([group], num_slots=[num_slots], **options)
    return [plan.groups[0] for plan, _ in checked_for_one(oracle, group, num_slots, batches)]


def fetched(plans: Sequence[GroupPlan]) -> list[set[int]]:
    return [
        {*plan.overlapped.fetch_rows.tolist(), *plan.urgent.fetch_rows.tolist()} for plan in plans
    ]


def evicted(plans: Sequence[GroupPlan]) -> list[set[int]]:
    return [
        {*plan.overlapped.evict_rows.tolist(), *plan.urgent.evict_rows.tolist()} for plan in plans
    ]


def zipf_trace(num_rows: int, num_batches: int, batch_size: int) -> tuple[Group, list[Jagged]]:
    (group,) = group_tables(
        [TableConfig(name="t", num_embeddings=num_rows, embedding_dim=4, feature_names=["f"])],
        SGD(lr=1.0),
    )
    rng = np.random.default_rng(7)
    ids = [(num_rows * rng.random(batch_size) ** 4).astype(np.int64) for _ in range(num_batches)]
    return group, [Jagged(keys=("f",), values=values, batch_size=batch_size) for values in ids]


@given(
    trace=st.one_of(
        strategies.group_traces(),
        st.builds(zipf_trace, st.sampled_from([40, 700]), st.integers(1, 20), st.integers(1, 60)),
    ),
    extra_slots=st.sampled_from([0, 3, 20, 800]),
    lookahead=st.integers(1, 30),
    prefetch_depth=st.integers(0, 4),
)
@settings(
    max_examples=strategies.examples(80),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_each_shard_fetches_and_evicts_as_the_naive_oracle_of_a_small_cache(
    cut_always: None,
    trace: tuple[Group, list[Jagged]],
    extra_slots: int,
    lookahead: int,
    prefetch_depth: int,
) -> None:
    group, batches = trace
    num_slots = slots_needed(group, batches) + extra_slots
    plans = plans_of(group, batches, num_slots, lookahead=lookahead, prefetch_depth=prefetch_depth)
    bounds = shards.slot_bounds(num_slots, group.num_rows)
    assert (bounds[0], bounds[-1], len(bounds)) == (0, num_slots, shards.NUM_SHARDS + 1)
    expected_fetched: list[set[int]] = [set() for _ in batches]
    expected_evicted: list[set[int]] = [set() for _ in batches]
    for shard, shard_slots in enumerate(np.diff(bounds).tolist()):
        rows = [
            [row for row in reference.unique_rows(group, batch) if reference.shard_of(row) == shard]
            for batch in batches
        ]
        naive = reference.naive_oracle(
            rows, num_slots=shard_slots, lookahead=lookahead, prefetch_depth=prefetch_depth
        )
        for step, (fetched_rows, evicted_rows) in enumerate(naive):
            expected_fetched[step].update(fetched_rows)
            expected_evicted[step].update(evicted_rows)
    assert fetched(plans) == expected_fetched
    assert evicted(plans) == expected_evicted


@given(
    trace=st.builds(zipf_trace, st.sampled_from([40, 700]), st.integers(1, 12), st.integers(1, 60)),
    num_trainers=st.sampled_from([2, 3, 8]),
    extra_slots=st.integers(0, 5),
    depth=st.integers(0, 3),
    overlap=st.booleans(),
)
@settings(
    max_examples=strategies.examples(30),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_several_trainers(
    cut_always: None,
    trace: tuple[Group, list[Jagged]],
    num_trainers: int,
    extra_slots: int,
    depth: int,
    overlap: bool,
) -> None:
    group, batches = trace
    num_slots = -(-slots_needed(group, batches) // num_trainers) + extra_slots
    planned = plan_all(group, batches, num_trainers, num_slots, depth=depth, overlap=overlap)
    Replay(planned).run()
    check(planned)


def test_shards_together_fetch_nearly_what_one_cache_would() -> None:
    group, batches = zipf_trace(400_000, 40, 30_000)
    assert shards.MIN_SLOTS == 32_768
    plans, uncut = (
        plans_of(group, batches, num_slots, lookahead=10) for num_slots in (32_768, 32_767)
    )
    num_fetched, num_fetched_uncut = (sum(map(len, fetched(of))) for of in (plans, uncut))
    assert sum(map(len, evicted(plans))) > 100_000
    assert num_fetched == pytest.approx(num_fetched_uncut, rel=0.01)


def test_plans_are_the_same_for_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    group, batches = zipf_trace(200_000, 12, 60_000)
    shared = plans_of(group, batches, 40_000, lookahead=3)
    for name in ("plan", "admit"):
        monkeypatch.setattr(loops, name, threaded(getattr(loops, name).__wrapped__, num_threads=1))
    for one, other in zip(shared, plans_of(group, batches, 40_000, lookahead=3), strict=True):
        np.testing.assert_equal(asdict(one), asdict(other))


def test_a_cache_of_all_rows_never_evicts(cut_always: None) -> None:
    group, batches = zipf_trace(3000, 30, 400)
    assert not any(evicted(plans_of(group, batches, 3000, lookahead=4)))


def test_a_batch_that_would_overflow_one_shard_is_refused_with_a_size_that_holds_it(
    cut_always: None,
) -> None:
    group, (batch,) = zipf_trace(3000, 1, 400)
    num_uniques = len(reference.unique_rows(group, batch))
    with pytest.raises(
        CacheTooSmallError,
        match=rf"{num_uniques + 1} slots in shards, of which one would overflow: give",
    ) as caught:
        plans_of(group, [batch], num_uniques + 1, lookahead=1)
    assert num_uniques + 1 < caught.value.num_needed < 2 * num_uniques
    plans_of(group, [batch], caught.value.num_needed, lookahead=1)


def test_a_dry_run_knows_how_large_a_cache_must_be_for_its_shards() -> None:
    group, batches = zipf_trace(400_000, 4, 60_000)
    trace = Trace(groups=(group,), batches=tuple(deduped(group, batches)))
    assert (
        trace.smallest_cache
        > max(len(reference.unique_rows(group, batch)) for batch in batches)
        > shards.MIN_SLOTS
    )
    grid = Grid(cache_rows=[trace.smallest_cache], lookaheads=[1], num_steps=len(batches))
    assert replay(trace, grid, trace.smallest_cache, 1).report is not None


def test_every_cache_of_the_size_that_an_error_names_holds_the_batch() -> None:
    """That holds, too, where a cache of one shard has room but a larger one of several has not."""
    (group,) = group_tables(
        [TableConfig(name="t", num_embeddings=400_000, embedding_dim=4, feature_names=["f"])],
        SGD(lr=1.0),
    )
    batch = Jagged(
        keys=("f",),
        values=np.random.default_rng(0).permutation(400_000)[:32_700],
        batch_size=32_700,
    )
    with pytest.raises(CacheTooSmallError) as caught:
        plans_of(group, [batch], 30_000, lookahead=1)
    assert 32_768 < caught.value.num_needed < 34_000
    for num_slots in range(caught.value.num_needed, caught.value.num_needed + 30):
        plans_of(group, [batch], num_slots, lookahead=1)


def test_a_shard_without_enough_slots_is_an_error_and_no_plan(
    cut_always: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That holds whatever let the batch pass, and whichever thread plans the shard."""
    monkeypatch.setattr(Cacher, "check_fits", lambda cacher, linked: None)
    group, batches = zipf_trace(3000, 5, 400)
    with pytest.raises(AssertionError, match="a shard could not be planned"):
        plans_of(
            group,
            batches,
            max(len(reference.unique_rows(group, batch)) for batch in batches),
            lookahead=1,
        )
