"""Two trainers on two GPUs give what one gives, to the bit where sums are exact; see `test_trainers`."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tests.train.test_trainers import OPTIMIZERS, all_records, assert_equal, linear_loss, make_batches, make_tables

import bagpipe
from bagpipe.cache.collection import EmbeddingBagCollection
from bagpipe.cache.communicator import Communicator
from bagpipe.types import Optimizer, group_tables

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]

NUM_STEPS = 40


def train(
    optimizer: Optimizer, slots: Sequence[int], communicator: Communicator | None, oracle: Literal["thread", "process"]
) -> list[np.ndarray]:
    """All records after training, by group, then what the rank has looked up, by step and group; on the current device.

    Gradients of exact sums do not depend on the rows, so a stale replica shows in lookups alone.
    """
    batches, tables = make_batches(NUM_STEPS), make_tables()
    groups = group_tables(tables, optimizer)
    num_trainers = 1 if communicator is None else communicator.num_trainers
    embeddings = EmbeddingBagCollection(tables, optimizer=optimizer, device="cuda", seed=11, communicator=communicator)
    replicas = [group.num_rows for group in groups]
    with bagpipe.lookahead(batches, embeddings, cache=slots, replicas=replicas, lookahead=4, oracle=oracle) as stream:
        looked_up: list[np.ndarray] = []
        for number, batch in enumerate(stream):
            pooled = embeddings(batch).groups
            looked_up += [group.detach().cpu().numpy() for group in pooled]
            (linear_loss(pooled) * num_trainers).backward()
            if number == NUM_STEPS // 2:
                stream.flush()
    return [*(all_records(*each) for each in zip(groups, embeddings.stores, strict=True)), *looked_up]  # type: ignore[arg-type]


def run_rank(rank: int, num_trainers: int, port: int, path: str, arguments: tuple[Any, ...]) -> None:
    torch.cuda.set_device(rank)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", init_method=address, rank=rank, world_size=num_trainers, timeout=timedelta(seconds=60)
    )
    optimizer, slots, oracle = arguments
    found = train(optimizer, slots, Communicator.from_default_group(timeout=timedelta(seconds=60)), oracle)
    np.savez(f"{path}/{rank}.npz", *found)
    dist.barrier()
    dist.destroy_process_group()


def train_on_two(folder: Path, *arguments: Any) -> list[np.ndarray]:
    """As `train`, with what both ranks have looked up, one behind the other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(run_rank, args=(2, port, str(folder), arguments), nprocs=2)  # type: ignore[no-untyped-call]
    with np.load(folder / "0.npz") as first, np.load(folder / "1.npz") as second:
        names = list(first.files)
        return [first[name] for name in names[:2]] + [np.concatenate([first[name], second[name]]) for name in names[2:]]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: type(optimizer).__name__)
def test_two_gpus_equal_one_to_the_bit_where_sums_are_exact(optimizer: Optimizer, tmp_path: Path) -> None:
    expected = train(optimizer, [400, 50], None, "thread")
    assert_equal(train_on_two(tmp_path, optimizer, [14, 24], "thread"), expected)


def test_an_oracle_in_a_process_feeds_two_gpus(tmp_path: Path) -> None:
    optimizer = OPTIMIZERS[1]
    expected = train(optimizer, [400, 50], None, "thread")
    assert_equal(train_on_two(tmp_path, optimizer, [30, 24], "process"), expected)
