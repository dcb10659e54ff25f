"""Two trainers on GPUs take the same steps of a dense part whatever graphs hold of it, to the bit.

See `test_trainers_gpu`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tests.train.test_trainers import all_records, assert_equal, make_batches, make_tables
from tests.train.test_trainers_gpu import free_port, join
from torch import Tensor

import bagpipe
from bagpipe.cache.executor import Executor
from bagpipe.distributed.communicator import Communicator
from bagpipe.embeddings.collection import EmbeddingBagCollection
from bagpipe.optimizers import Adagrad
from bagpipe.train.dense_step import DenseStep
from bagpipe.types import Jagged, group_tables

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NUM_STEPS, BATCH_SIZE, LAST_SIZE = 48, 12, 7
STREAMS = (slice(0, NUM_STEPS // 2), slice(NUM_STEPS // 2, NUM_STEPS))
"""One after the other, each with peer memory of its own."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """How the dense part is trained."""

    by_peer_memory: bool = True
    graph: bool = True
    differs: bool = False
    """Whether at times one rank alone replays a graph with rows."""


WAYS = {
    "NCCL, eagerly": Way(by_peer_memory=False, graph=False),
    "NCCL": Way(by_peer_memory=False),
    "peer memory, eagerly": Way(graph=False),
    "peer memory": Way(),
    "peer memory, one rank alone": Way(differs=True),
}
SETTINGS = {"": (False, None), "clipped": (False, 0.3), "a rate that changes": (True, 0.3)}
"""Whether the rate changes, and to which norm gradients are clipped."""


class Trainer:
    """One rank."""

    def __init__(
        self, way: Way, communicator: Communicator, rate_changes: bool, max_grad_norm: float | None
    ) -> None:
        self._way, self._rank, self._rate_changes = way, communicator.rank, rate_changes
        self._device = torch.device("cuda", torch.cuda.current_device())
        communicator.by_peer_memory = way.by_peer_memory
        self.tables, optimizer = make_tables(), Adagrad(lr=0.1)
        self.groups = group_tables(self.tables, optimizer)
        self.embeddings = EmbeddingBagCollection(
            self.tables, optimizer=optimizer, device="cuda", seed=11, communicator=communicator
        )
        torch.manual_seed(3)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(13, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1)
        ).to(self._device)
        self._optimizer = torch.optim.Adagrad(self.model.parameters(), lr=0.1)
        self.said: list[str] = []
        self.step = DenseStep(
            lambda dense, pooled: self.model(torch.cat([dense, pooled], 1)).squeeze(1),
            self._optimizer,
            groups=[(len(group.features), group.embedding_dim) for group in self.groups],
            device=self._device,
            batch_size=BATCH_SIZE // 2,
            graph=way.graph,
            average=communicator.average,
            rate_changes=rate_changes,
            max_grad_norm=max_grad_norm,
            say=self.said.append,
        )
        self.losses: list[Tensor] = []
        self.num_whole = 0
        """Steps that were one graph, of all there is."""

    def train(self, batches: list[Jagged]) -> None:
        """Trains a stream."""
        replicas = [group.num_rows for group in self.groups]
        with bagpipe.lookahead(
            batches, self.embeddings, cache=[30, 24], replicas=replicas, lookahead=4
        ) as stream:
            for batch in stream:
                self._train(batch)
                if len(self.losses) % 20 == 0:
                    stream.flush()

    def _train(self, batch: Jagged) -> None:
        number, size = len(self.losses), batch.batch_size
        executor = self.embeddings.executor
        assert isinstance(executor, Executor)
        assert (executor.dense_average is not None) == self._way.by_peer_memory
        can_replay = self.step.can_replay(size) and (
            not self._way.differs or number % 5 != 2 * self._rank
        )
        rows = self.embeddings.rows_in_graph(batch) if can_replay else None
        if rows is None:
            self.embeddings.lookup(batch, out=self.step.pooled(size))
        whole = BATCH_SIZE if number < NUM_STEPS - 1 else LAST_SIZE
        if self._rate_changes:
            self._optimizer.param_groups[0]["lr"] = 0.1 / (1 + number)
        loss, _ = self.step(
            torch.full((size, 3), 0.1 * (number % 7)),
            (torch.arange(size) + self._rank) % 2 * 1.0,
            2 * size / whole,
            rows=rows,
            update=self.embeddings.update,
            average=executor.dense_average,
        )
        self.losses.append(loss.clone())
        held = self.step._whole
        if rows is not None and held is not None and held.rows is rows:
            assert held.average is executor.dense_average
            assert held.optimizer_graph is None
            self.num_whole += 1


def train(
    way: Way, communicator: Communicator, rate_changes: bool, max_grad_norm: float | None
) -> list[np.ndarray]:
    """Losses, parameters, and all records of the tables."""
    trainer = Trainer(way, communicator, rate_changes, max_grad_norm)
    batches = make_batches(NUM_STEPS, BATCH_SIZE, LAST_SIZE)
    for part in STREAMS:
        trainer.train(batches[part])
    assert not trainer.said, trainer.said
    assert (trainer.num_whole >= NUM_STEPS // 4) == (way.graph and way.by_peer_memory)
    trainer.step.count_replays()
    for state in trainer.step._optimizer.state.values():
        assert float(state["step"]) == NUM_STEPS
    records = [
        all_records(*each) for each in zip(trainer.groups, trainer.embeddings.stores, strict=True)
    ]
    communicator.barrier("waiting for all to have read")
    trainer.embeddings.close()
    parameters = [each.detach().cpu().numpy() for each in trainer.model.parameters()]
    return [torch.stack(trainer.losses).cpu().numpy(), *parameters, *records]


def run_rank(rank: int, num_trainers: int, port: int, path: str) -> None:
    join(rank, num_trainers, port)
    for setting, (rate_changes, max_grad_norm) in SETTINGS.items():
        for name, way in WAYS.items():
            communicator = Communicator.from_default_group(timeout=timedelta(seconds=60))
            found = train(way, communicator, rate_changes, max_grad_norm)
            np.savez(f"{path}/{setting}-{name}-{rank}.npz", *found)
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all ways give on two ranks, of one start of two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run_rank, args=(2, free_port(), str(folder)), nprocs=2)
    return folder


def load(folder: Path, setting: str, name: str) -> list[list[np.ndarray]]:
    """Of both ranks."""
    found = []
    for rank in range(2):
        with np.load(folder / f"{setting}-{name}-{rank}.npz") as file:
            found.append([file[each] for each in file.files])
    return found


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", list(WAYS)[1:])
def test_two_ranks_take_the_steps_of_eager_ones_that_average_by_nccl(
    name: str, setting: str, of_two: Path
) -> None:
    found, expected = load(of_two, setting, name), load(of_two, setting, "NCCL, eagerly")
    for one, other in zip(found, expected, strict=True):
        assert_equal(one, other)
    first, second = found
    assert not np.array_equal(first[0], second[0])  # losses of other samples
    assert_equal(first[1:], second[1:])


def test_clipping_and_rates_change_what_is_trained(of_two: Path) -> None:
    of_settings = [load(of_two, setting, "peer memory")[0][1] for setting in SETTINGS]
    assert not np.array_equal(of_settings[0], of_settings[1])
    assert not np.array_equal(of_settings[1], of_settings[2])
