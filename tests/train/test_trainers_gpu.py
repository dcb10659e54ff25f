"""Two trainers on GPUs give what one gives, to the bit where sums are exact; see `test_trainers`.

Each takes a GPU. Where there is but one they share it, which NCCL allows only to ranks of different
hosts: they claim to be. Peer memory allows it if it is told to.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tests.train.slow_device import KINDS, slow_down
from tests.train.test_trainers import (
    OPTIMIZERS,
    all_records,
    assert_equal,
    linear_loss,
    make_batches,
    make_tables,
)

import bagpipe
from bagpipe.cache.captured import captured_graph
from bagpipe.cache.exchange import Exchange
from bagpipe.cache.executor import Executor
from bagpipe.cache.graph_rows import GraphRows
from bagpipe.distributed.communicator import Communicator
from bagpipe.embeddings.collection import EmbeddingBagCollection
from bagpipe.optimizers import Optimizer
from bagpipe.train.dense_step import DenseStep
from bagpipe.types import group_tables
from benchmarks.trainers.rank import claim_own_host

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NUM_STEPS = 40


def train(
    optimizer: Optimizer,
    slots: Sequence[int],
    communicator: Communicator | None,
    oracle: Literal["thread", "process"],
    way: str = "",
    *,
    in_graphs: bool = False,
) -> list[np.ndarray]:
    """All records after training, by group, then what the rank has looked up, by step and group; on
    the current device.

    Gradients of exact sums do not depend on the rows, so a stale replica shows in lookups alone.
    """
    batches, tables = make_batches(NUM_STEPS), make_tables()
    groups = group_tables(tables, optimizer)
    rank, num_trainers = (
        (0, 1) if communicator is None else (communicator.rank, communicator.num_trainers)
    )
    embeddings = EmbeddingBagCollection(
        tables, optimizer=optimizer, device="cuda", seed=11, communicator=communicator
    )
    replicas = [group.num_rows for group in groups]
    with bagpipe.lookahead(
        batches, embeddings, cache=slots, replicas=replicas, lookahead=4, oracle=oracle
    ) as stream:
        if communicator is not None:
            executor = embeddings.executor
            assert isinstance(executor, Executor)
            assert isinstance(executor._exchange, Exchange)
            assert type(executor._exchange._way).__name__ == way
        looked_up: list[torch.Tensor] = []
        replayed = Replayed(embeddings, num_trainers)
        for number, batch in enumerate(stream):
            early = None
            if number == NUM_STEPS // 4:
                if rank == 0:  # whose device then waits for rows of the other rank
                    early = embeddings(batch).groups
                embeddings.flush()
            # at times on one rank alone
            is_replayed = in_graphs and early is None and number % 7 != rank
            rows = embeddings.rows_in_graph(batch) if is_replayed else None
            if rows is None:
                pooled = early or embeddings(batch).groups
                (linear_loss(pooled) * num_trainers).backward()
            else:
                pooled = replayed.train(rows, batch.batch_size)
            # on the device, which the host may run ahead of
            looked_up += [group.detach().clone() for group in pooled]
            if communicator is not None:  # as the dense part's gradients, in the same order
                communicator.average(torch.ones(1, device="cuda"))
            if number == NUM_STEPS // 2:
                stream.flush()
        assert replayed.num_steps >= NUM_STEPS // 2 or not in_graphs
    # every rank reads all of it; all have written their rows when the stream has ended
    records = [all_records(*each) for each in zip(groups, embeddings.stores, strict=True)]
    if communicator is not None:
        communicator.barrier("waiting for all to have read")
    embeddings.close()
    return [*records, *(each.cpu().numpy() for each in looked_up)]


class Replayed:
    """Steps that a CUDA graph holds whole."""

    def __init__(self, embeddings: EmbeddingBagCollection, num_trainers: int) -> None:
        self._groups, self._num_trainers = embeddings.groups, num_trainers
        self._graphs: dict[GraphRows, tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]] = {}
        self.num_steps = 0

    def train(self, rows: GraphRows, batch_size: int) -> list[torch.Tensor]:
        """Trains the current step; returns what it has looked up."""
        if rows not in self._graphs:
            self._graphs[rows] = self._capture(rows, batch_size)
        graph, pooled = self._graphs[rows]
        rows.replay(graph)
        self.num_steps += 1
        return pooled

    def _capture(
        self, rows: GraphRows, batch_size: int
    ) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
        pooled = [
            torch.zeros(batch_size, len(group.features), group.embedding_dim, device="cuda")
            for group in self._groups
        ]
        rows.warm_up(pooled)
        with captured_graph(torch.cuda.Stream()) as graph:
            rows.lookup(pooled)
            leaves = [each.detach().requires_grad_() for each in pooled]
            loss = linear_loss(leaves) * self._num_trainers
            rows.update(torch.autograd.grad(loss, leaves))
        return graph, pooled


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to train; `slow` is a kind of work that the devices sleep before."""

    optimizer: Optimizer = OPTIMIZERS[1]
    slots: tuple[int, int] = (14, 24)  # so few that rows come late, those that travel among them
    oracle: Literal["thread", "process"] = "thread"
    slow: str = ""
    has_own_host: bool = False  # each rank
    way: Literal["PeerMemory", "Messages"] = "PeerMemory"
    in_graphs: bool = False


_BY_PEER_MEMORY = {
    **{type(optimizer).__name__: Case(optimizer=optimizer) for optimizer in OPTIMIZERS},
    **{f"slow {kind}": Case(slow=kind) for kind in KINDS},
    "oracle in a process": Case(slots=(30, 24), oracle="process"),
}
CASES = {
    **_BY_PEER_MEMORY,
    **{f"{name} by NCCL": replace(case, way="Messages") for name, case in _BY_PEER_MEMORY.items()},
    **{
        f"{name} in graphs": replace(case, in_graphs=True) for name, case in _BY_PEER_MEMORY.items()
    },
    "two hosts": Case(slots=(18, 24), has_own_host=True, way="Messages"),
    "an oracle process on each of two hosts": Case(
        slots=(30, 50), has_own_host=True, oracle="process", way="Messages"
    ),
}


def join(rank: int, num_trainers: int, port: int) -> torch.device:
    """Makes the default process group and this rank's device current."""
    num_devices = torch.cuda.device_count()
    if num_devices < num_trainers:
        claim_own_host(rank)
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    device = torch.device("cuda", rank % num_devices)
    torch.cuda.set_device(device)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl",
        init_method=address,
        rank=rank,
        world_size=num_trainers,
        timeout=timedelta(seconds=60),
    )
    return device


def run_rank(rank: int, num_trainers: int, port: int, path: str) -> None:
    join(rank, num_trainers, port)
    for name, case in CASES.items():
        with pytest.MonkeyPatch.context() as patch:
            if case.slow:
                slow_down(case.slow, patch.setattr)
            communicator = Communicator.from_default_group(
                host=f"host {rank}" if case.has_own_host else None, timeout=timedelta(seconds=60)
            )
            communicator.by_peer_memory = case.way == "PeerMemory"
            np.savez(
                f"{path}/{name}-{rank}.npz",
                *train(
                    case.optimizer,
                    case.slots,
                    communicator,
                    case.oracle,
                    case.way,
                    in_graphs=case.in_graphs,
                ),
            )
    dist.barrier()
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all cases give on two ranks; one start of two processes for all of them, since it takes
    most of the time.
    """
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run_rank, args=(2, free_port(), str(folder)), nprocs=2)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_one_to_the_bit_where_sums_are_exact(name: str, of_two: Path) -> None:
    expected = train(CASES[name].optimizer, [400, 50], None, "thread")
    with np.load(of_two / f"{name}-0.npz") as first, np.load(of_two / f"{name}-1.npz") as second:
        names = list(first.files)
        found = [first[each] for each in names[:2]] + [
            np.concatenate([first[each], second[each]]) for each in names[2:]
        ]
    assert_equal(found, expected)


def take_dense_steps(rank: int, num_trainers: int, port: int, path: str, graph: bool) -> None:
    """Saves the losses and parameters of a few steps of a dense part whose gradients NCCL
    averages.
    """
    device = join(rank, num_trainers, port)
    communicator = Communicator.from_default_group(timeout=timedelta(seconds=60))
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1)).to(
        device
    )
    said: list[str] = []
    step = DenseStep(
        lambda dense, pooled: model(pooled).squeeze(1),
        torch.optim.Adagrad(model.parameters()),
        groups=[(2, 4)],
        device=device,
        batch_size=16,
        graph=graph,
        average=communicator.average,
        say=said.append,
    )
    losses = []
    for number in range(8):
        step.pooled(16)[0].copy_(
            (torch.arange(128, device=device).view(16, 2, 4) + 7 * number + 3 * rank) % 11 / 11
        )
        losses.append(float(step(torch.ones(16, 3), torch.ones(16) * rank)[0]))
    assert not said, said
    np.savez(
        f"{path}/{rank}.npz",
        np.array(losses),
        *(parameter.detach().cpu().numpy() for parameter in model.parameters()),
    )
    dist.barrier()
    dist.destroy_process_group()


def test_graphs_of_two_ranks_average_as_eager_does(tmp_path: Path) -> None:
    found = []
    for graph in (False, True):
        folder = tmp_path / f"graph-{graph}"
        folder.mkdir()
        torch.multiprocessing.spawn(
            take_dense_steps, args=(2, free_port(), str(folder), graph), nprocs=2
        )
        found.append([np.load(folder / f"{rank}.npz") for rank in range(2)])
    for eager, captured in zip(*found, strict=True):
        assert_equal(
            [captured[name] for name in captured.files], [eager[name] for name in eager.files]
        )
    first, second = found[0]
    assert_equal(
        [first[name] for name in first.files[1:]], [second[name] for name in second.files[1:]]
    )
