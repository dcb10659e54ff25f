"""Means of the dense part's gradients by peer memory, run without a GPU.

Ranks are threads. Memory of the host stands for that of GPUs, and Triton's interpreter runs the
kernel, one launch at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from tests.cache.peer_ranks import (
    Alike,
    Host,
    Turns,
    assert_all_over,
    peer_memory,
    use_small_parts,
)
from tests.cache.test_exchange_graph import as_on_gpus
from tests.train.test_trainers import Trainer, assert_equal, make_batches, make_tables, train
from torch import Tensor

from bagpipe.cache.averaging import PeerAverage
from bagpipe.cache.device_plan import DeviceRows
from bagpipe.cache.executor import Executor
from bagpipe.distributed.communicator import Communicator
from bagpipe.errors import LostError
from bagpipe.optimizers import AdamW
from bagpipe.plan import RowExchange
from bagpipe.train.dense_step import DenseStep
from bagpipe.types import Jagged

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="tests/cache/test_peer_memory_gpu.py does it"
)


def send_a_row(way: Any, rank: int) -> None:
    """From rank 0 to rank 1, as wide as those of embeddings."""
    counts = np.zeros((2, way._traffic["urgent"].lane.num_trainers), np.int64)
    sends, receives = counts
    sends[1], receives[0] = rank == 0, rank == 1
    rows = RowExchange(
        send=np.array([2] * (rank == 0), np.int32), send_counts=sends, receive_counts=receives
    )
    on_device = DeviceRows(
        send=torch.from_numpy(rows.send),
        send_counts=torch.from_numpy(sends),
        receive_counts=torch.from_numpy(receives),
    )
    values = torch.arange(24.0).view(6, 4) + 100 * rank
    way.exchange(values, 5, on_device, rows, moment="urgent", step=3, what="rows")
    if rank == 1:
        assert values[5].tolist() == [8, 9, 10, 11]


def by_call(average: PeerAverage, values: Tensor) -> None:
    average(values)


def as_a_graph(average: PeerAverage, values: Tensor) -> None:
    kept = values.clone()
    average.warm_up(values)
    values.copy_(kept)
    average.launch(values)
    average.note()


def means_of(
    by_rank: Sequence[Sequence[Tensor]],
    ways: Sequence[Callable[[PeerAverage, Tensor], None]],
    region_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Replaces each rank's tensors by their means, one after the other, with rows in between."""
    use_small_parts(monkeypatch)
    host = Host(len(by_rank), region_bytes)
    monkeypatch.setattr(peer_memory, "exchange_rows", Turns(host).exchange_rows)

    def work(rank: int) -> None:
        way = host.open(Alike(rank, len(by_rank)))
        average = PeerAverage(way.launcher, rank, len(by_rank))
        for values in by_rank[rank]:
            ways[rank](average, values)
            send_a_row(way, rank)
        way.finish()
        assert_all_over(way)
        way.close(wait=True)

    with ThreadPoolExecutor(len(by_rank)) as threads:
        list(threads.map(work, range(len(by_rank))))


@pytest.mark.parametrize(
    ("num_trainers", "sizes", "region_bytes"),
    [
        (2, (1, 2000, 1), 1 << 14),
        (2, (512, 3000), 2048),  # a part is six rows, a region two
        (3, (1000, 700, 1000), 4096),
        (5, (300,), 4096),  # some own padding alone
    ],
)
def test_all_ranks_get_the_mean_in_the_order_of_ranks(
    num_trainers: int,
    sizes: tuple[int, ...],
    region_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sums are not exact, so a sum in another order shows."""
    random = torch.Generator().manual_seed(1)
    by_rank = [[torch.randn(size, generator=random) for size in sizes] for _ in range(num_trainers)]
    expected = []
    for each in zip(*by_rank, strict=True):
        total = each[0] / num_trainers
        for other in each[1:]:
            total = total + other / num_trainers
        expected.append(total)
    ways = [(by_call, as_a_graph)[rank % 2] for rank in range(num_trainers)]
    means_of(by_rank, ways, region_bytes, monkeypatch)
    for means in by_rank:
        for found, mean in zip(means, expected, strict=True):
            assert torch.equal(found, mean)


def test_a_rank_that_is_waited_for_in_vain_is_told_with_the_step() -> None:
    way = Host(2, 4096).open(Alike(0, 2), timeout_s=0.0)
    average = PeerAverage(way.launcher, 0, 2)
    average.step = 7
    average(torch.ones(3))  # returns: the thread that looks has ended the waiting
    for call in (average.note, lambda: average(torch.ones(3))):
        with pytest.raises(
            LostError,
            match=r"rank 0: exchanging the dense part's gradients of step 7 failed.* rank 1 for",
        ):
            call()
    way.close(wait=False)


NUM_STEPS = 14


def dense_losses(averages: list[PeerAverage | None], found: dict[int, list[Any]]) -> Any:
    """A loop that trains a dense part, too: at times rows are updated as a graph does it, and by
    calls on the other rank.

    Fills `averages`, and by rank losses and parameters.
    """
    torch.manual_seed(1)
    layers = [torch.nn.Linear(4 + 2 * 3, 40) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())

    def loop(trainer: Trainer, batches: Sequence[Jagged]) -> None:
        embeddings = trainer.embeddings
        assert isinstance(embeddings.peers, Communicator)
        rank, losses = embeddings.peers.rank, []
        layer = layers[rank]
        step = DenseStep(
            lambda dense, pooled: layer(pooled).sin().sum(1),
            torch.optim.Adagrad(layer.parameters(), lr=0.1),
            groups=[(len(group.features), group.embedding_dim) for group in embeddings.groups],
            device=torch.device("cpu"),
            batch_size=6,
            average=embeddings.peers.average,
            max_grad_norm=0.5,
        )
        with trainer.stream(batches) as stream:
            for number, batch in enumerate(stream):
                executor, size = embeddings.executor, batch.batch_size
                assert isinstance(executor, Executor)
                average = executor.dense_average
                averages.append(average)
                assert average is None or average.step == number
                rows = None if number % 4 == rank else embeddings.rows_in_graph(batch)
                if rows is None:
                    embeddings.lookup(batch, out=step.pooled(size))
                loss, _ = step(
                    torch.ones(size, 3),
                    (torch.arange(size) % 2).float(),
                    size * 2 / (12 if number < NUM_STEPS - 1 else 7),
                    rows=rows,
                    update=embeddings.update,
                    average=average,
                )
                losses.append(float(loss))
        found[rank] = [losses, *(each.detach().numpy() for each in layer.parameters())]

    return loop


def test_a_dense_part_trains_as_with_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    averages: dict[str, list[PeerAverage | None]] = {"messages": [], "peer memory": []}
    of_ranks: dict[str, dict[int, list[Any]]] = {}
    records = []
    for way, seen in averages.items():
        if way == "peer memory":
            held = as_on_gpus(monkeypatch)
        of_ranks[way] = {}
        loop = dense_losses(seen, of_ranks[way])
        options = {"loop": loop, "cache": [400, 50], "lookahead": 3}
        optimizer, batches = AdamW(lr=0.05, weight_decay=0.5), make_batches(NUM_STEPS)
        records.append(train(make_tables(), optimizer, batches, [(2, NUM_STEPS)], **options))
    assert_equal(*records)
    for rank in range(2):
        assert_equal(of_ranks["peer memory"][rank], of_ranks["messages"][rank])
    assert_equal(of_ranks["messages"][0][1:], of_ranks["messages"][1][1:])
    assert set(averages["messages"]) == {None}
    assert min(held.counts.values()) >= 5
    by_rank = set(averages["peer memory"])
    assert len(by_rank) == 2
    for average in by_rank:  # the stream is over: nothing keeps its memory
        assert average is not None
        assert not average._rooms
        assert average._launcher is None
