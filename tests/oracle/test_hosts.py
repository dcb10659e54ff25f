"""Plans for trainers on several hosts: each host plans for its own ranks, and all plan alike."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from tests import reference
from tests.oracle.rank_replay import exchange_of, plan_all
from tests.oracle.test_shards import zipf_trace

from bagpipe.errors import CacheTooSmallError, ConfigError
from bagpipe.feed.stream import BatchAdapter, StreamOptions, plan_stream
from bagpipe.oracle.dry_run import Grid, dry_run
from bagpipe.oracle.row_trace import read_trace
from bagpipe.plan import StepPlan
from bagpipe.topology import Topology, shards_of
from bagpipe.types import Jagged


def test_each_host_plans_the_same_for_its_ranks_as_for_all() -> None:
    group, batches = zipf_trace(700, 12, 60)
    every, own = (plan_all(group, batches, 4, 90, ranks=ranks) for ranks in (None, (2, 3)))
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
        topology = Topology(num_trainers=4, ranks=ranks, num_replica_slots=(30_000,))
        options = StreamOptions(
            groups=(group,), num_slots=(60,), lookahead_bytes=500_000, topology=topology
        )
        with closing(plan_stream(batches, options, BatchAdapter(hand_out=hand_out))) as steps:
            return [tuple(planned.plan for planned in step) for step in steps]

    every, first, second = (plans_for(ranks) for ranks in ((0, 1, 2, 3), (0,), (1, 2, 3)))
    # it has grown, and stopped for memory
    assert 8 < max(plans[0].lookahead for plans in every) < 30
    for plans, one, other in zip(every, first, second, strict=True):
        np.testing.assert_equal(
            [asdict(plan) for plan in plans],
            [asdict(replace(plan, joint_hash=None)) for plan in (*one, *other)],
        )
        # by which hosts see at run time that they plan alike
        assert one[0].joint_hash == other[0].joint_hash is not None


@pytest.mark.parametrize("num_shards", [1, 2, 4, 8])
def test_shards_are_those_of_the_reference(num_shards: int) -> None:
    rows = np.random.default_rng(1).integers(0, 10**12, 5000)
    found = shards_of(rows, num_shards)
    assert found.tolist() == [reference.shard_of(row) // (8 // num_shards) for row in rows.tolist()]
    assert np.bincount(found).min() > 0.85 * 5000 / num_shards


@pytest.mark.parametrize("num_hosts", [1, 2, 3])
def test_a_dry_run_counts_what_leaves_a_host_and_knows_the_smallest_cache(num_hosts: int) -> None:
    group, batches = zipf_trace(3000, 12, 400)
    trace = read_trace([group], batches, max_batches=12, num_trainers=4, num_hosts=num_hosts)
    grid = Grid(cache_rows=[trace.smallest_cache], lookaheads=[6], num_steps=12, warmup_steps=0)
    (point,) = dry_run(trace, grid, find_smallest=False).points
    assert point.traffic is not None
    planned = plan_all(group, batches, 4, trace.smallest_cache)
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
        plan_all(group, batches, 4, trace.smallest_cache - 1)


@pytest.mark.parametrize("num_hosts", [0, 3])
def test_a_dry_run_refuses_hosts_without_trainers(num_hosts: int) -> None:
    group, batches = zipf_trace(40, 1, 4)
    with pytest.raises(ConfigError, match=f"{num_hosts} hosts for 2 trainers, must be from 1"):
        read_trace([group], batches, max_batches=1, num_trainers=2, num_hosts=num_hosts)
