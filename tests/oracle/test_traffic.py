"""What travels between trainers, counted by hand and by plain sets.

Also: what is sent is received, and one trainer's dry run is as it was.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from rich.console import Console

from bagpipe.errors import ConfigError
from bagpipe.optimizers import Adagrad
from bagpipe.oracle.dry_run import DryRun, Grid, dry_run, replay
from bagpipe.oracle.dry_run_view import (
    as_dict,
    render_points,
    render_smallest,
    render_traffic,
)
from bagpipe.oracle.merge import MergedGroup
from bagpipe.oracle.oracle import Oracle
from bagpipe.oracle.row_trace import Trace, read_trace
from bagpipe.oracle.traffic import (
    GRADIENT,
    OVERLAPPED,
    REPLICA,
    URGENT,
    Balance,
    Traffic,
    hashed_owners,
    owned_rows,
    sent_rows,
)
from bagpipe.plan import GroupPlan, RowExchange
from bagpipe.types import DataType, Group, Jagged, TableConfig, group_tables

NUM_TRAINERS = 4
NUM_BATCHES = 50


def one_group(num_rows: int, data_type: DataType = "fp32") -> tuple[Group, ...]:
    table = TableConfig(
        name="a", num_embeddings=num_rows, embedding_dim=4, feature_names=["a"], data_type=data_type
    )
    return group_tables([table], Adagrad(lr=0.1))


def two_groups() -> tuple[Group, ...]:
    return group_tables(
        [
            TableConfig(name="a", num_embeddings=600, embedding_dim=4, feature_names=["a"]),
            TableConfig(name="b", num_embeddings=400, embedding_dim=2, feature_names=["b"]),
        ],
        Adagrad(lr=0.1),
    )


def batches_of(*ids: Sequence[int]) -> Iterator[Jagged]:
    for values in ids:
        yield Jagged(keys=("a",), values=np.array(values, np.int64), batch_size=len(values))


def random_batches(num_batches: int = NUM_BATCHES, batch_size: int = 32) -> Iterator[Jagged]:
    generator = np.random.default_rng(0)
    for _ in range(num_batches):
        skewed = generator.random(2 * batch_size) ** 3
        ids = np.concatenate([600 * skewed[:batch_size], 400 * skewed[batch_size:]]).astype(
            np.int64
        )
        yield Jagged(keys=("a", "b"), values=ids, batch_size=batch_size)


def counted(trace: Trace, cache_rows: int, num_steps: int) -> Traffic:
    """Counts all steps, without a warm-up."""
    grid = Grid(cache_rows=[cache_rows], lookaheads=[2], num_steps=num_steps, warmup_steps=0)
    traffic = replay(trace, grid, cache_rows, 2).traffic
    assert traffic is not None
    return traffic


@pytest.fixture(scope="module")
def trace() -> Trace:
    return read_trace(
        two_groups(), random_batches(), max_batches=NUM_BATCHES, num_trainers=NUM_TRAINERS
    )


@pytest.fixture(scope="module")
def result(trace: Trace) -> DryRun:
    return dry_run(trace, Grid(cache_rows=[4, 40, 250], lookaheads=[1, 10], num_steps=40))


def steps(trace: Trace, cache_rows: int) -> Iterator[tuple[int, list[GroupPlan], MergedGroup]]:
    """Yields the plans of all ranks and the global batch, step by step and group by group."""
    topology = trace.topology(range(trace.num_trainers))
    oracle = Oracle(trace.groups, num_slots=trace.slots(cache_rows), lookahead=3, topology=topology)
    for plans, batch in oracle.plan(oracle.link(trace.batches)):
        for group, merged in enumerate(batch.groups):
            yield plans[0].step, [plan.groups[group] for plan in plans], merged


def test_rows_that_one_rank_alone_uses_never_travel() -> None:
    # Ranks 0 and 1 use rows 0, 1 and rows 2, 3, over and over; each is fetched by the rank that
    # uses it.
    trace = read_trace(one_group(8), batches_of(*[[0, 1, 2, 3]] * 3), max_batches=3, num_trainers=2)
    traffic = counted(trace, 2, 3)
    assert traffic.rows.tolist() == [[0, 0], [0, 0]]
    assert (traffic.num_uniques, traffic.num_uses, traffic.local_share) == (12, 12, 1.0)
    assert (traffic.critical_share, traffic.rows_over_copies) == (0.0, 0.0)
    assert traffic.copies_rows == 12  # each reaches the one other trainer
    assert traffic.owned.ratio(2) == traffic.fetched.ratio(2) == 1.0


@pytest.mark.parametrize(("data_type", "replica"), [("fp32", 16), ("bf16", 8)])
def test_a_shared_row_goes_to_and_fro_urgently_or_overlapped(
    data_type: DataType, replica: int
) -> None:
    # Both ranks use row 0 in each of three steps, so one of them owns it. Its replica is overlapped
    # before step 0 only, since nothing has changed the row before. Its gradient is overlapped after
    # step 2 only, since nobody needs the row after that. Rows 1 to 6 fill the batches. Each is used
    # by one rank alone, so it does not travel: rank 0 has ids 0 and 1, rank 1 has 0 and 2, then 0
    # and 3, and so on.
    trace = read_trace(
        one_group(8, data_type),
        batches_of([0, 1, 0, 2], [0, 3, 0, 4], [0, 5, 0, 6]),
        max_batches=3,
        num_trainers=2,
    )
    traffic = counted(trace, 4, 3)
    assert traffic.rows[REPLICA, OVERLAPPED] == 1
    assert traffic.rows[REPLICA, URGENT] == 2
    assert traffic.rows[GRADIENT, URGENT] == 2
    assert traffic.rows[GRADIENT, OVERLAPPED] == 1
    assert traffic.sent_bytes.tolist() == [[replica, 2 * replica], [16, 32]]
    assert traffic.critical_share == pytest.approx(2 / 3)
    assert (traffic.num_uniques, traffic.num_uses) == (9, 12)
    assert traffic.local_share == pytest.approx(9 / 12)
    assert (traffic.copies_rows, traffic.copies_bytes) == (9, 9 * 16)
    assert traffic.rows_over_copies == pytest.approx(6 / 9)


def test_rows_that_pause_a_step_travel_behind_compute() -> None:
    # Both ranks use row 0 in steps 0 and 2 and row 1 in steps 1 and 3: no step needs what the one
    # before has changed.
    trace = read_trace(
        one_group(4), batches_of([0, 0], [1, 1], [0, 0], [1, 1]), max_batches=4, num_trainers=2
    )
    traffic = counted(trace, 1, 4)
    assert traffic.rows.tolist() == [[4, 0], [4, 0]]
    assert (traffic.critical_share, traffic.local_share) == (0.0, 0.5)
    assert traffic.sent.ratio(2) == 1.0  # the owner sends the replica, the other the gradient
    assert traffic.owned.ratio(2) == 2.0  # one row a step, so that one rank owns all of it


def test_hashed_owners_by_hand() -> None:
    owners = hashed_owners(np.arange(4), 2).tolist()
    users = [(0, 0), (1, 1), (2, 0), (3, 1)]  # (row, rank); row 0 is also used by rank 1
    expected = sum(owners[row] != rank for row, rank in [*users, (0, 1)])
    trace = read_trace(one_group(4), batches_of([0, 2, 2, 1, 3, 0]), max_batches=1, num_trainers=2)
    traffic = counted(trace, 3, 1)
    assert traffic.num_uses == 5
    assert traffic.hashed_rows == 2 * expected
    assert traffic.hashed_bytes == expected * (16 + 16)
    # row 0 alone goes to and fro
    assert traffic.bytes_over_hashed == pytest.approx(2 / (2 * expected))


def test_hashed_owners_are_even() -> None:
    counts = np.bincount(hashed_owners(np.arange(0, 10**6, 10), 8).astype(np.int64), minlength=8)
    assert counts.max() / counts.mean() < 1.02


def test_what_is_sent_is_received_and_each_row_has_one_owner(trace: Trace) -> None:
    names = {
        (REPLICA, OVERLAPPED): "replicas_overlapped",
        (REPLICA, URGENT): "replicas_urgent",
        (GRADIENT, OVERLAPPED): "sync_overlapped",
        (GRADIENT, URGENT): "sync_urgent",
    }
    for _, plans, batch in steps(trace, 60):
        sent = sent_rows(plans)
        for kind, name in names.items():
            exchanges: list[RowExchange] = [getattr(plan.exchange, name) for plan in plans]
            assert sent[kind].T.tolist() == [
                exchange.receive_counts.tolist() for exchange in exchanges
            ]
            assert sent[kind].sum() == sum(len(exchange.send) for exchange in exchanges)
        assert np.trace(sent.sum(axis=(0, 1))) == 0  # nobody sends itself anything
        # A use that is not local takes a replica from the owner, and a gradient back to it.
        assert (sent[REPLICA].sum(axis=0) == sent[GRADIENT].sum(axis=0).T).all()
        assert owned_rows(plans).sum() == len(batch.unique_rows)


def test_totals_equal_those_of_plain_sets(trace: Trace) -> None:
    traffic = counted(trace, 60, NUM_BATCHES)
    num_uniques = num_uses = hashed_rows = 0
    for jagged in random_batches():
        for feature, group in enumerate(two_groups()):
            ids = jagged.values[32 * feature : 32 * (feature + 1)]
            owners = hashed_owners(np.arange(group.num_rows), NUM_TRAINERS)
            shares = [set(ids[8 * rank : 8 * (rank + 1)].tolist()) for rank in range(NUM_TRAINERS)]
            num_uniques += len(set().union(*shares))
            num_uses += sum(len(share) for share in shares)
            hashed_rows += 2 * sum(
                owners[row] != rank for rank, share in enumerate(shares) for row in share
            )
    assert (traffic.num_uniques, traffic.num_uses, traffic.hashed_rows) == (
        num_uniques,
        num_uses,
        hashed_rows,
    )
    assert traffic.rows.sum() == round(2 * num_uses * (1 - traffic.local_share))
    assert traffic.copies_rows == 3 * num_uniques


def test_the_report_adds_up_all_ranks(trace: Trace) -> None:
    grid = Grid(cache_rows=[60], lookaheads=[3], num_steps=NUM_BATCHES, warmup_steps=0)
    report = replay(trace, grid, 60, 3).report
    assert report is not None
    fetched = sum(
        len(plan.overlapped.fetch_rows) + len(plan.urgent.fetch_rows)
        for _, plans, _ in steps(trace, 60)
        for plan in plans
    )
    assert report.num_fetched == fetched
    assert report.num_uniques == round(trace.uniques_per_step * NUM_BATCHES)
    assert report.peak_slots == sum(trace.slots(60))


def test_balance() -> None:
    balance = Balance()
    assert balance.ratio(2) == 1.0
    balance.add(np.array([3, 1]))
    balance.add(np.array([1, 3]))
    # each step waits for its slowest, though both have the same in all
    assert balance.ratio(2) == pytest.approx(6 / 4)


def test_one_trainer_is_as_ever() -> None:
    alone = read_trace(two_groups(), random_batches(), max_batches=NUM_BATCHES)
    grid = Grid(cache_rows=[120], lookaheads=[5], num_steps=40)
    point = replay(alone, grid, 120, 5)
    assert point.traffic is None
    result = dry_run(alone, grid)
    values = as_dict(result)
    assert "num_trainers" not in values
    assert "traffic" not in values["points"][0]
    assert "trainers" not in printed(result)


def test_the_cache_of_all_trainers_together_holds_what_one_large_one_does(trace: Trace) -> None:
    grid = Grid(cache_rows=[60], lookaheads=[5], num_steps=40)
    report = replay(trace, grid, 60, 5).report
    alone = read_trace(two_groups(), random_batches(), max_batches=NUM_BATCHES)
    report_alone = replay(alone, grid, 240, 5).report
    assert report is not None
    assert report_alone is not None
    assert report.num_uniques == report_alone.num_uniques
    # Not the same: with several trainers rows settle one step after, and so stay a little longer.
    assert report.num_fetched == pytest.approx(report_alone.num_fetched, rel=0.05)


def test_the_smallest_cache_of_each_trainer_lies_on_the_border(
    trace: Trace, result: DryRun
) -> None:
    for lookahead, rows in result.smallest.items():
        assert replay(trace, result.grid, rows, lookahead).never_stalls
        assert not replay(trace, result.grid, rows - max(1, rows // 20), lookahead).never_stalls


def test_table_and_json(result: DryRun) -> None:
    text = printed(result)
    assert "Sent between 4 trainers a step" in text
    values = json.loads(json.dumps(as_dict(result)))
    assert values["num_trainers"] == NUM_TRAINERS
    small, *rest = values["points"][:3]
    assert small["too_small_for_batch_of"] > 2
    for point in rest:
        traffic = point["traffic"]
        kinds = (
            "replicas_urgent",
            "replicas_overlapped",
            "gradients_urgent",
            "gradients_overlapped",
        )
        assert sum(traffic[f"{kind}_rows_per_step"] for kind in kinds) == pytest.approx(
            traffic["sent_rows_per_step"]
        )
        assert sum(traffic[f"{kind}_bytes_per_step"] for kind in kinds) == pytest.approx(
            traffic["sent_bytes_per_step"]
        )
        assert 0 < traffic["critical_share_of_bytes"] < 1
        assert 0 < traffic["sent_bytes_over_hashed"] < 1


def test_too_many_trainers_are_refused() -> None:
    with pytest.raises(ConfigError, match="65 trainers, must be from 1 to 64"):
        read_trace(two_groups(), random_batches(), max_batches=1, num_trainers=65)


def printed(result: DryRun) -> str:
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(render_points(result), render_smallest(result))
    if result.num_trainers > 1:
        console.print(render_traffic(result))
    return console.export_text()
