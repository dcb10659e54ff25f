"""The arms of the benchmark `trainers`, ranks as threads.

Where sums are exact all end with the same records, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.train.ranks import run_ranks

from bagpipe.cache.device_cache import DeviceCache
from bagpipe.data.base import Batch
from bagpipe.distributed.communicator import Communicator
from bagpipe.jagged import share_of
from bagpipe.lookups import group_lookups, group_rows
from bagpipe.optimizers import SGD
from bagpipe.oracle import dedup
from bagpipe.store import MemoryStore
from bagpipe.types import Float32Array, Group, Int64Array, Jagged, TableConfig, group_tables
from benchmarks.trainers.arms import BagpipeShareArm, CountingCommunicator, Share, TrainersArm
from benchmarks.trainers.peers import (
    HashedArm,
    ReplicatedArm,
    _OnDevice,
    replicated_batch,
    ring_bytes,
)
from benchmarks.trainers.uniques import output_rows_of, plan_uniques
from benchmarks.workloads import make_workload

CPU = torch.device("cpu")
NAMES = ("bagpipe", "no_overlap", "replicated", "hashed", "hashed, sorting")


def make_batches(group: Group, num_batches: int, batch_size: int) -> list[Batch]:
    rng = np.random.default_rng(5)
    made = []
    for _ in range(num_batches):
        ids = np.concatenate(
            [
                (table.num_embeddings * rng.random(batch_size) ** 4).astype(np.int64)
                for table in group.tables
            ]
        )
        sparse = Jagged(keys=group.features, values=ids, batch_size=batch_size)
        made.append(
            Batch(
                dense=np.zeros((batch_size, 1), np.float32),
                sparse=sparse,
                labels=np.zeros(batch_size, np.float32),
            )
        )
    return made


def make_arm(
    name: str, group: Group, batches: list[Batch], communicator: Communicator, cache_rows: int
) -> TrainersArm:
    rank, num_trainers = communicator.rank, communicator.num_trainers
    shares = [Share.of(batch, rank, num_trainers, CPU) for batch in batches]
    workload = replace(make_workload("small", {}, quick=True), cache_rows=cache_rows)
    match name:
        case "replicated":
            every = [
                [share_of(batch.sparse, each, num_trainers) for each in range(num_trainers)]
                for batch in batches
            ]
            planned = [
                replicated_batch(group, each, rank, CPU, step=step)
                for step, each in enumerate(every)
            ]
            return ReplicatedArm(group, shares, planned, communicator, CPU)
        case "hashed":
            return HashedArm(group, shares, communicator, CPU)
        case "hashed, sorting":  # as on CUDA
            arm = HashedArm(group, shares, communicator, CPU)
            arm._finder = _OnDevice(group, shares, num_trainers, arm.cache.num_slots, CPU)
            return arm
    counting = CountingCommunicator.of(communicator, name)
    return BagpipeShareArm(
        name, workload, group, batches, device=CPU, communicator=counting, overlap=name == "bagpipe"
    )


def train(
    name: str,
    group: Group,
    batches: list[Batch],
    num_trainers: int,
    *,
    gradient: Callable[[torch.Tensor], torch.Tensor],
    cache_rows: int = 150,
) -> tuple[Float32Array, list[dict[str, int]]]:
    """All records at the end, and what each rank has sent."""
    rows = np.arange(group.num_rows)
    records = np.empty((len(rows), group.record_width), np.float32)
    MemoryStore(group, 0).fetch(rows, records)
    found = np.empty_like(records)

    def work(communicator: Communicator) -> dict[str, int]:
        arm = make_arm(name, group, batches, communicator, cache_rows)
        arm.load(rows, records)
        communicator.barrier("waiting for rows")
        arm.start()
        for batch in batches:
            arm.next_batch()
            pooled = torch.empty(
                batch.batch_size // num_trainers, len(group.features), group.embedding_dim
            )
            arm.lookup(pooled)
            arm.update(gradient(pooled) * num_trainers)
        own, values = read(arm, rows, communicator)
        found[own] = values
        communicator.barrier("waiting for readers")
        arm.close()
        return dict(arm.sent.of_steps(0, len(batches)))

    return found, run_ranks(num_trainers, work)


def read(
    arm: TrainersArm, rows: Int64Array, communicator: Communicator
) -> tuple[Int64Array, Float32Array]:
    """The rows that this rank knows, and their records."""
    if isinstance(arm, BagpipeShareArm):
        arm.lookahead.close()
        values = np.empty((len(rows), arm.embeddings.groups[0].record_width), np.float32)
        arm.embeddings.stores[0].fetch(rows, values)
        return rows, values
    if isinstance(arm, ReplicatedArm):
        own, slots = (
            rows[communicator.rank :: communicator.num_trainers],
            rows[communicator.rank :: communicator.num_trainers],
        )
    else:
        assert isinstance(arm, HashedArm)
        own = rows[communicator.rank :: communicator.num_trainers]
        slots = own // communicator.num_trainers
    return own, arm.cache.read(torch.from_numpy(slots.astype(np.int32))).numpy()


def exact(pooled: torch.Tensor) -> torch.Tensor:
    """Integers, whatever the weights are."""
    return (torch.arange(pooled.numel()) % 3 - 1.0).view(pooled.shape)


@pytest.mark.parametrize("num_trainers", [2, 4])
def test_all_arms_end_with_the_same_records(num_trainers: int) -> None:
    group = make_workload("small", {}, quick=True).group
    batches = make_batches(group, 12, 16 * num_trainers)
    for gradient, tolerance in ((exact, 0.0), (torch.sin, 1e-5)):
        ends = {
            name: train(name, group, batches, num_trainers, gradient=gradient, cache_rows=900)[0]
            for name in NAMES
        }
        for name in NAMES[1:]:
            np.testing.assert_allclose(
                ends[name], ends["bagpipe"], rtol=tolerance, atol=0.1 * tolerance, err_msg=name
            )


def test_bytes_sent_by_hand() -> None:
    """Rank 0 uses rows 0, 1 and 2 (twice), rank 1 rows 2 and 3, in two steps; rows of 4 floats."""
    (group,) = group_tables(
        [TableConfig(name="t", num_embeddings=4, embedding_dim=4, feature_names=["f"])], SGD(lr=1.0)
    )
    sparse = Jagged(keys=("f",), values=np.array([0, 1, 2, 2, 2, 3, 3, 2]), batch_size=8)
    batch = Batch(dense=np.zeros((8, 1), np.float32), sparse=sparse, labels=np.zeros(8, np.float32))
    sent = {
        name: train(name, group, [batch, batch], 2, gradient=exact, cache_rows=4)[1]
        for name in NAMES
    }
    # The one row that both use travels as replica and as gradient, 16 bytes each, two steps. Its
    # first replica follows no update, its last gradient is needed by no step after: later. Between
    # the two steps both are needed at once.
    assert [
        sum(rank[moment] for rank in sent["bagpipe"]) for moment in ("urgent", "overlapped")
    ] == [
        32,
        32,
    ]
    assert [rank["overlapped"] for rank in sent["no_overlap"]] == [0, 0]
    assert sum(rank["urgent"] for rank in sent["no_overlap"]) == 2 * 2 * 16
    # All four rows are all-reduced: a ring of two sends the buffer once.
    assert (
        [rank["urgent"] for rank in sent["replicated"]]
        == [2 * ring_bytes(4 * 16, 2)] * 2
        == [128, 128]
    )
    # Each rank sends one number and asks the other for one row, 1 and 2: 4 bytes there, 16 back, 16
    # of gradient.
    for name in NAMES[3:]:
        assert [rank["urgent"] for rank in sent[name]] == [2 * (8 + 4 + 16 + 16)] * 2


@pytest.mark.parametrize("is_jagged", [False, True])
@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_rows_found_by_a_sort_give_the_sums_of_the_oracles(is_jagged: bool, kind: str) -> None:
    device = torch.device(kind)
    tables = [
        TableConfig(name=name, num_embeddings=300, embedding_dim=4, feature_names=[name])
        for name in "ab"
    ]
    (group,) = group_tables(tables, SGD(lr=1.0))
    rng, batch_size = np.random.default_rng(3), 700
    lengths = rng.integers(0, 4, 2 * batch_size) if is_jagged else np.ones(2 * batch_size, np.int64)
    ids = (300 * rng.random(int(lengths.sum())) ** 6).astype(np.int64)  # row 0 needs several pieces
    offsets = np.concatenate([[0], np.cumsum(lengths)]) if is_jagged else None
    sparse = Jagged(keys=("a", "b"), values=ids, batch_size=batch_size, offsets=offsets)
    lookups = group_lookups(group, sparse)
    rows = group_rows(group, sparse, lookups)
    output_rows = output_rows_of(batch_size, 2, lookups.bag_offsets)
    on_device = (
        torch.from_numpy(array.astype(np.int32)).to(device) for array in (rows, output_rows)
    )
    plan = plan_uniques(*on_device, step=0, batch_size=batch_size, num_features=2)
    np.testing.assert_array_equal(plan.unique_slots.cpu(), np.unique(rows))
    np.testing.assert_array_equal(plan.unique_slots[plan.lookup_slots.long()].cpu(), rows)
    expected_plan = dedup(group, sparse)
    assert len(plan.long_uniques) == len(expected_plan.long_uniques) > 0
    assert len(plan.piece_offsets) == len(expected_plan.piece_offsets)
    assert int(plan.piece_offsets.diff().max()) <= 128
    grads = torch.from_numpy(rng.integers(-3, 4, (batch_size, 2, 4)).astype(np.float32))
    expected = np.zeros((600, 4), np.float32)
    np.add.at(expected, rows, grads.numpy().reshape(-1, 4)[output_rows])
    cache = DeviceCache(group=group, num_slots=600, device=device)
    sums = cache.sum_by_row(plan, grads.to(device), scale=1.0)
    np.testing.assert_array_equal(sums.cpu(), expected[np.unique(rows)])
