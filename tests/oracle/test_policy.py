"""The seam of eviction policies: the oracle plans with any of them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import reference, strategies

from bagpipe.errors import ConfigError
from bagpipe.feed.stream import StreamOptions, plan_stream
from bagpipe.optimizers import SGD
from bagpipe.oracle import Oracle
from bagpipe.oracle.policy import POLICIES
from bagpipe.topology import Topology
from bagpipe.types import Group, Jagged, TableConfig, group_tables


@given(
    strategies.group_traces(), st.integers(0, 20), st.integers(1, 10), st.sampled_from([1, 2, 3])
)
@settings(max_examples=strategies.examples(30), deadline=None)
def test_plans_of_another_policy_keep_the_invariants_and_fetch_no_less(
    trace: tuple[Group, list[Jagged]], extra_slots: int, lookahead: int, num_trainers: int
) -> None:
    group, batches = trace
    largest = max(1, *(len(reference.unique_rows(group, batch)) for batch in batches))

    def num_fetched(policy: str) -> int:
        options = StreamOptions(
            groups=(group,),
            num_slots=(-(-largest // num_trainers) + extra_slots,),
            lookahead=lookahead,
            prefetch_depth=0,
            dedup_threads=1,
            check=True,
            policy=policy,
            topology=Topology(
                num_trainers=num_trainers,
                ranks=tuple(range(num_trainers)),
                num_replica_slots=(largest,),
            ),
        )
        return sum(
            len(moved.fetch_rows)
            for ranks in plan_stream(batches, options)
            for planned in ranks
            for moved in (planned.plan.groups[0].overlapped, planned.plan.groups[0].urgent)
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(POLICIES, "lru", reference.LeastRecentlyUsed)
        lru = num_fetched("lru")
    assert lru >= len({row for batch in batches for row in reference.unique_rows(group, batch)})
    if lookahead >= len(batches) and num_trainers == 1:
        assert lru >= num_fetched("min")


def test_a_policy_that_there_is_not_is_refused() -> None:
    (group,) = group_tables(
        [TableConfig(name="t", num_embeddings=9, embedding_dim=4, feature_names=["f"])], SGD(lr=1.0)
    )
    with pytest.raises(ConfigError, match=r"no eviction policy is called 'fifo'.*\['min'\]"):
        Oracle([group], num_slots=[4], policy="fifo")
