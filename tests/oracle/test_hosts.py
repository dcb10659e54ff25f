"""Plans for trainers on several hosts.

Each host has the records of its own rows, and caches only those.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests import reference, strategies
from tests.oracle.rank_replay import Replay, check, exchange_of, moved_by, plan_all
from tests.oracle.test_shards import zipf_trace

from bagpipe.errors import CacheTooSmallError, ConfigError, PlanError
from bagpipe.feed.stream import BatchAdapter, StreamOptions, plan_stream
from bagpipe.oracle import dedup, shards
from bagpipe.oracle.dry_run import Grid, dry_run
from bagpipe.oracle.row_trace import read_trace
from bagpipe.plan import StepPlan
from bagpipe.topology import Topology, shards_of
from bagpipe.types import Group, Jagged

LAYOUTS = [(2, 2), (4, 2), (6, 2), (4, 4), (8, 4), (8, 8)]


def home_of(row: int, num_hosts: int) -> int:
    return reference.shard_of(row) // (8 // num_hosts)


def smallest_cache(
    group: Group, batches: Sequence[Jagged], num_trainers: int, num_hosts: int
) -> int:
    """The fewest slots with which each trainer can do."""
    needed = max(
        shards.num_slots_needed(dedup(group, batch).unique_rows, group.num_rows, num_hosts)
        for batch in batches
    )
    return max(1, -(-needed // num_trainers))


@given(
    trace=st.one_of(
        strategies.group_traces(),
        st.builds(zipf_trace, st.sampled_from([40, 700]), st.integers(1, 15), st.integers(1, 60)),
    ),
    layout=st.sampled_from(LAYOUTS),
    is_cut=st.booleans(),
    extra=st.sampled_from([0, 3, 300]),
    lookahead=st.integers(1, 12),
    depth=st.integers(0, 3),
    overlap=st.booleans(),
)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_each_host_caches_its_own_rows_as_the_naive_oracle_would(
    trace: tuple[Group, list[Jagged]],
    layout: tuple[int, int],
    is_cut: bool,
    extra: int,
    lookahead: int,
    depth: int,
    overlap: bool,
) -> None:
    (group, batches), (num_trainers, num_hosts) = trace, layout
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "MIN_SLOTS", 1 if is_cut else 1 << 15)
        num_slots = smallest_cache(group, batches, num_trainers, num_hosts) + extra
        planned = plan_all(
            group,
            batches,
            num_trainers,
            num_slots,
            num_hosts=num_hosts,
            lookahead=lookahead,
            depth=depth,
            overlap=overlap,
        )
        bounds = shards.slot_bounds(num_trainers * num_slots, group.num_rows, num_hosts)
    Replay(planned).run()
    check(planned)
    num_shards, host_ranks = len(bounds) - 1, num_trainers // num_hosts
    assert num_shards == (8 if is_cut else num_hosts)
    assert bounds[:: num_shards // num_hosts].tolist() == [
        host * host_ranks * num_slots for host in range(num_hosts + 1)
    ]
    for shard, shard_slots in enumerate(np.diff(bounds).tolist()):
        host = shard * num_hosts // num_shards
        rows = [
            [
                row
                for row in reference.in_order(row for rows in step for row in rows)
                if home_of(row, num_shards) == shard
            ]
            for step in planned.lookups
        ]
        naive = reference.naive_oracle(
            rows, num_slots=shard_slots, lookahead=lookahead, prefetch_depth=depth + 1
        )
        for plans, (fetched, evicted) in zip(planned.plans, naive, strict=True):
            moved = [
                part
                for plan in plans[host * host_ranks : (host + 1) * host_ranks]
                for part in moved_by(plan)
            ]
            mine = [
                [row for row in part.fetch_rows.tolist() if home_of(row, num_shards) == shard]
                for part in moved
            ]
            assert sorted(row for part in mine for row in part) == sorted(fetched)
            gone = {
                row
                for part in moved
                for row in part.evict_rows.tolist()
                if home_of(row, num_shards) == shard
            }
            assert gone == evicted
    for plans in planned.plans:
        for rank, plan in enumerate(plans):
            for part in moved_by(plan):
                rows = [*part.fetch_rows.tolist(), *part.evict_rows.tolist()]
                assert all(home_of(row, num_hosts) == rank // host_ranks for row in rows)


def test_each_host_plans_the_same_for_its_ranks_as_for_all() -> None:
    group, batches = zipf_trace(700, 12, 60)
    every, own = (
        plan_all(group, batches, 4, 90, num_hosts=2, ranks=ranks) for ranks in (None, (2, 3))
    )
    for plans, parts in zip(every.plans, own.plans, strict=True):
        np.testing.assert_equal(
            [asdict(plan) for plan in plans[2:]], [asdict(part) for part in parts]
        )


@pytest.mark.parametrize("hand_out", [None, lambda batch: batch], ids=["all", "ids"])
def test_hosts_look_ahead_alike_where_the_window_grows_until_memory_is_full(hand_out: Any) -> None:
    """Whatever they hand out to their own ranks, whose shares differ.

    In one share all bags are large.
    """
    group, _ = zipf_trace(30_000, 1, 1)
    rng = np.random.default_rng(0)
    lengths = np.repeat([1, 1, 100, 1], 10)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    # many ids and few rows, else always others
    num_rows = np.repeat(np.where(lengths > 1, 50, 30_000), lengths)
    batches = [
        Jagged(keys=("f",), values=rng.integers(0, num_rows), batch_size=40, offsets=offsets)
        for _ in range(60)
    ]

    def plans_for(ranks: tuple[int, ...]) -> list[tuple[StepPlan, ...]]:
        topology = Topology(num_trainers=4, num_hosts=2, ranks=ranks, num_replica_slots=(30_000,))
        options = StreamOptions(
            groups=(group,), num_slots=(60,), lookahead_bytes=500_000, topology=topology
        )
        with closing(plan_stream(batches, options, BatchAdapter(hand_out=hand_out))) as steps:
            return [tuple(planned.plan for planned in step) for step in steps]

    every, first, second = (plans_for(ranks) for ranks in ((0, 1, 2, 3), (0, 1), (2, 3)))
    # it has grown, and stopped for memory
    assert 8 < max(plans[0].lookahead for plans in every) < 30
    for plans, one, other in zip(every, first, second, strict=True):
        np.testing.assert_equal(
            [asdict(plan) for plan in plans],
            [asdict(replace(plan, joint_hash=None)) for plan in (*one, *other)],
        )
        # by which hosts see at run time that they plan alike
        assert one[0].joint_hash == other[0].joint_hash is not None


def test_slots_of_the_joint_cache_are_those_of_the_hosts_ranks() -> None:
    found = [
        [shards.slot_at(place, 6, 6, 3) for place in range(host * 6, host * 6 + 6)]
        for host in range(3)
    ]
    assert found == [[0, 1, 6, 7, 12, 13], [2, 3, 8, 9, 14, 15], [4, 5, 10, 11, 16, 17]]
    assert [shards.slot_at(place, 20, 4, 1) for place in range(20)] == list(range(20))


@pytest.mark.parametrize("num_hosts", [1, 2, 4, 8])
def test_homes_are_those_of_the_reference(num_hosts: int) -> None:
    rows = np.random.default_rng(1).integers(0, 10**12, 5000)
    assert shards_of(rows, num_hosts).tolist() == [home_of(row, num_hosts) for row in rows.tolist()]
    assert np.bincount(shards_of(rows, num_hosts)).min() > 0.85 * 5000 / num_hosts


def test_a_row_fetched_on_another_host_is_found() -> None:
    group, batches = zipf_trace(700, 12, 60)
    planned = plan_all(group, batches, 4, 90)  # for one host
    check(planned)
    with pytest.raises(
        PlanError, match=r"rank \d: a row is fetched whose record another host has \(invariant 6"
    ):
        check(replace(planned, topology=replace(planned.topology, num_hosts=2)))


def test_a_batch_that_would_overflow_one_host_is_refused_with_a_size_that_holds_it() -> None:
    group, batches = zipf_trace(3000, 1, 400)
    num_uniques = len(reference.unique_rows(group, batches[0]))
    with pytest.raises(
        CacheTooSmallError, match=r"give the cache of each of the 2 trainers at least (\d+) rows"
    ) as caught:
        plan_all(group, batches, 2, -(-num_uniques // 2), num_hosts=2)
    assert f"at least {-(-caught.value.num_needed // 2)} rows" in str(caught.value)
    assert num_uniques < caught.value.num_needed < 1.5 * num_uniques
    plan_all(group, batches, 2, caught.value.num_needed // 2, num_hosts=2)
    with pytest.raises(CacheTooSmallError):
        plan_all(group, batches, 2, caught.value.num_needed // 2 - 1, num_hosts=2)


@pytest.mark.parametrize("num_hosts", [1, 2, 4])
def test_a_dry_run_counts_what_leaves_a_host_and_knows_the_smallest_cache(num_hosts: int) -> None:
    group, batches = zipf_trace(3000, 12, 400)
    trace = read_trace([group], batches, max_batches=12, num_trainers=4, num_hosts=num_hosts)
    grid = Grid(cache_rows=[trace.smallest_cache], lookaheads=[6], num_steps=12, warmup_steps=0)
    (point,) = dry_run(trace, grid, find_smallest=False).points
    assert point.traffic is not None
    planned = plan_all(group, batches, 4, trace.smallest_cache, num_hosts=num_hosts)
    # (senders, receivers), all rows of one size
    counts = np.sum(
        [
            [
                sum(
                    getattr(exchange_of(plan), name).send_counts
                    for name in (
                        "replicas_urgent",
                        "replicas_overlapped",
                        "sync_urgent",
                        "sync_overlapped",
                    )
                )
                for plan in plans
            ]
            for plans in planned.plans
        ],
        axis=0,
    )
    leaves = np.array(
        [
            [sender * num_hosts // 4 != receiver * num_hosts // 4 for receiver in range(4)]
            for sender in range(4)
        ]
    )
    assert point.traffic.between_hosts_share == pytest.approx(counts[leaves].sum() / counts.sum())
    assert (point.traffic.between_hosts_share > 0) == (num_hosts > 1)
    with pytest.raises(CacheTooSmallError):
        plan_all(group, batches, 4, trace.smallest_cache - 1, num_hosts=num_hosts)


@pytest.mark.parametrize(
    ("num_trainers", "num_hosts", "message"),
    [
        (3, 3, "3 hosts: rows can be divided among 1, 2, 4 or 8"),
        (6, 4, "6 trainers on 4 hosts: start as many on each"),
        (2, 0, "0"),
    ],
)
def test_hosts_that_can_not_share_evenly_are_refused(
    num_trainers: int, num_hosts: int, message: str
) -> None:
    group, _ = zipf_trace(40, 1, 4)
    topology = Topology(
        num_trainers=num_trainers, num_hosts=num_hosts, ranks=(0,), num_replica_slots=(9,)
    )
    with pytest.raises(ConfigError, match=message):
        topology.check([group])
