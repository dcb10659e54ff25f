"""Ranks as processes, which share gloo, one oracle process and the shard servers that they start,
give what one trainer gives; `test_trainers`: threads.
"""

from __future__ import annotations

import multiprocessing
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from tests.soon import TIMEOUT_S
from tests.train.equality import smallest_caches
from tests.train.test_trainers import (
    Trainer,
    all_records,
    assert_equal,
    curved_loss,
    linear_loss,
    make_batches,
    make_tables,
    plain,
    train,
)

from bagpipe.distributed.communicator import Communicator
from bagpipe.embeddings.collection import EmbeddingBagCollection
from bagpipe.optimizers import Adam
from bagpipe.types import group_tables

NUM_STEPS = 14
OPTIMIZER = Adam(lr=0.05)
RUNS = {"exact": linear_loss, "once": curved_loss, "again": curved_loss}


def run_rank(rank: int, num_trainers: int, file: Path, folder: Path) -> None:
    timeout = timedelta(seconds=TIMEOUT_S)
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=num_trainers, timeout=timeout
    )
    batches, groups = make_batches(NUM_STEPS), group_tables(make_tables(), OPTIMIZER)
    options = {
        "cache": [-(-slots // num_trainers) for slots in smallest_caches(groups, batches)],
        "replicas": [group.num_rows for group in groups],
        "lookahead": 3,
    }
    for name, loss in RUNS.items():
        communicator = Communicator.from_default_group(timeout=timeout)
        embeddings = EmbeddingBagCollection(
            make_tables(), optimizer=OPTIMIZER, seed=11, communicator=communicator
        )
        oracle = {"oracle": "process" if name == "exact" else "thread"}
        plain(
            Trainer(
                embeddings=embeddings,
                loss=loss,
                num_trainers=num_trainers,
                options=options | oracle,
            ),
            batches,
        )
        if rank == 0:
            np.savez(
                folder / f"{name}.npz",
                *(all_records(*each) for each in zip(groups, embeddings.stores, strict=True)),
            )
        communicator.barrier("waiting for rank 0 to have read")
        embeddings.close()
    dist.destroy_process_group()


@pytest.mark.parametrize("num_trainers", [3, pytest.param(8, marks=pytest.mark.soak)])
def test_processes_equal_one_trainer_where_sums_are_exact_and_repeat_to_the_bit_where_not(
    num_trainers: int, tmp_path: Path
) -> None:
    # compiles once what all ranks would compile at a time otherwise
    batches = make_batches(NUM_STEPS)
    expected = train(make_tables(), OPTIMIZER, batches, [(1, NUM_STEPS)], lookahead=3)
    context = multiprocessing.get_context("forkserver")  # which imports once for all
    ranks = [
        context.Process(target=run_rank, args=(rank, num_trainers, tmp_path / "meeting", tmp_path))
        for rank in range(num_trainers)
    ]
    for rank in ranks:
        rank.start()
    try:
        for rank in ranks:
            rank.join(TIMEOUT_S)
        assert [rank.exitcode for rank in ranks] == [0] * num_trainers
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    found = {name: list(np.load(tmp_path / f"{name}.npz").values()) for name in RUNS}
    assert_equal(found["exact"], expected)
    assert_equal(found["again"], found["once"])
    assert not np.array_equal(found["once"][0], found["exact"][0])
