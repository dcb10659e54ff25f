"""The linker may run ahead, and its numbers wrap round, without a trace in the plans."""

from __future__ import annotations

import numpy as np
import pytest
from tests.oracle.test_cacher import zipf_batches
from tests.planning import checked_for_one, deduped

from bagpipe.native.pipeline import BackgroundIterator
from bagpipe.optimizers import SGD
from bagpipe.oracle import Cacher, Oracle, checked
from bagpipe.oracle.linker import Linker
from bagpipe.oracle.ranks import RankPlanner
from bagpipe.plan import GroupPlan
from bagpipe.types import Jagged, TableConfig, group_tables


@pytest.mark.parametrize("num_slots", [100, 150, 600])
def test_plans_do_not_depend_on_how_far_linking_is_ahead(num_slots: int) -> None:
    group, batches = zipf_batches(60)

    def plan(ahead: int) -> list[GroupPlan]:
        oracle = Oracle([group], num_slots=[num_slots], lookahead=8)
        linked = BackgroundIterator(
            oracle.link(deduped(group, batches)), ahead=ahead, name="linker"
        )
        planned = checked([group], [num_slots], oracle.plan(linked))
        return [plan.groups[0] for (plan,), _ in planned]

    for one, other in zip(plan(1), plan(50), strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("first_occurrence", [2**31 - 1000, 2**30 - 1000])
def test_plans_do_not_depend_on_the_numbers_of_occurrences(first_occurrence: int) -> None:
    group, batches = zipf_batches(60)

    def plan(first_occurrence: int) -> list[GroupPlan]:
        cacher = Cacher(group, num_slots=120, max_lookahead=10, prefetch_depth=2)
        cacher.linker._next_occurrence = first_occurrence
        batches_of_group = [batch.groups[0] for batch in deduped(group, batches)]
        for batch in batches_of_group[:10]:
            cacher.admit(cacher.linker.link(batch))
        plans = []
        for batch in batches_of_group[10:]:
            cacher.admit(cacher.linker.link(batch))
            planner = RankPlanner(group, cacher.plan(), step=0, num_slots=120, num_replicas=0)
            plans.append(planner.plan(0))
        return plans

    for one, other in zip(plan(0), plan(first_occurrence), strict=True):
        assert_same(one, other)


def test_the_linker_forgets_what_is_so_old_that_it_could_be_taken_for_something_new() -> None:
    (group,) = group_tables(
        [TableConfig(name="t", num_embeddings=1000, embedding_dim=4, feature_names=["f"])],
        SGD(lr=1.0),
    )
    linker = Linker(group)
    rows = [
        Jagged(keys=("f",), values=np.arange(10) + 10 * number, batch_size=10)
        for number in range(100)
    ]
    first, *others = (batch.groups[0] for batch in deduped(group, rows))
    linker.link(first)
    for _ in range(2):  # as if so many occurrences had passed; a sweep takes 2**28
        linker._next_occurrence += 2**29
        linker._num_swept = 0.0
        linker._sweep(2**28)
    assert (linker.link(first).previous == -1).all()
    assert all((linker.link(batch).previous == -1).all() for batch in others)
    assert (linker.link(first).previous >= 0).all()


def test_numbers_of_occurrences_wrap_round_and_their_ring_grows_unseen() -> None:
    group, batches = zipf_batches(200)

    def plans(first_occurrence: int, ring_size: int) -> list[GroupPlan]:
        oracle = Oracle([group], num_slots=[150], lookahead=20)
        (cacher,) = oracle._policies
        assert isinstance(cacher, Cacher)
        cacher.linker._next_occurrence = first_occurrence
        cacher.linker.next_uses = np.empty((ring_size, 2), np.int32)
        cacher._slots_of_uses = np.empty(ring_size, np.int32)
        return [plan.groups[0] for plan, _ in checked_for_one(oracle, group, 150, batches)]

    for one, other in zip(plans(0, 1 << 16), plans(2**31 - 3000, 4), strict=True):
        np.testing.assert_array_equal(one.lookup_slots, other.lookup_slots)
        np.testing.assert_array_equal(one.overlapped.fetch_rows, other.overlapped.fetch_rows)


def assert_same(one: GroupPlan, other: GroupPlan) -> None:
    np.testing.assert_array_equal(one.lookup_slots, other.lookup_slots)
    for mine, theirs in ((one.overlapped, other.overlapped), (one.urgent, other.urgent)):
        assert mine.fence_tick == theirs.fence_tick
        for name in ("evict_rows", "evict_slots", "fetch_rows", "fetch_slots"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name))
