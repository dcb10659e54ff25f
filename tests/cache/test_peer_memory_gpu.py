"""Two GPUs bring each other by peer memory what NCCL brings, at sizes of real steps.

Where there is but one GPU both ranks share it. They then take turns on it, so it takes longer.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tests.train.test_trainers_gpu import free_port, join

from bagpipe.cache.averaging import PeerAverage
from bagpipe.cache.captured import captured_graph
from bagpipe.cache.device_plan import DeviceRows
from bagpipe.cache.moved import all_to_device
from bagpipe.cache.ring import RowsByClock
from bagpipe.cache.ways import Messages, Way
from bagpipe.distributed.communicator import Communicator, Moment
from bagpipe.errors import LostError
from bagpipe.plan import RowExchange

if TYPE_CHECKING:
    from bagpipe.cache.peer_memory import PeerMemory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NUM_ROWS, WIDTH, MOST = 60_000, 64, 20_000
NUM_MESSAGES, NUM_STEPS, NUM_PLACES = 200, 60, 4
NUM_GRADIENTS = (9, 1_000_003)
MOMENTS: tuple[Moment, Moment] = ("urgent", "overlapped")


def open_way(communicator: Communicator, device: torch.device, region_rows: int) -> PeerMemory:
    from bagpipe.cache.peer_buffers import open_buffers
    from bagpipe.cache.peer_memory import PeerLayout, PeerMemory

    layout = PeerLayout(
        num_trainers=communicator.num_trainers, region_bytes=region_rows * WIDTH * 4
    )
    buffers = open_buffers(communicator, device, layout.num_bytes)
    return PeerMemory(communicator, layout, buffers)


def message(number: int, rank: int) -> RowExchange:
    """What a rank of two exchanges; both draw the same numbers."""
    chance = np.random.default_rng(number)
    sizes = chance.choice([0, 1, 700, MOST - 1], 2)
    sent = [chance.integers(0, NUM_ROWS - 2 * MOST, size).astype(np.int32) for size in sizes]
    send_counts, receive_counts = np.zeros(2, np.int64), np.zeros(2, np.int64)
    send_counts[1 - rank], receive_counts[1 - rank] = sizes[rank], sizes[1 - rank]
    return RowExchange(send=sent[rank], send_counts=send_counts, receive_counts=receive_counts)


def exchange_all(way: Way, device: torch.device, rank: int) -> list[torch.Tensor]:
    """All messages, of each moment on a stream of its own, while the ranks are slowed by chance."""
    chance = random.Random(rank)
    streams: dict[Moment, torch.cuda.Stream] = {
        "urgent": torch.cuda.Stream(device),
        "overlapped": torch.cuda.Stream(device),
    }
    values = {
        moment: (
            torch.arange(NUM_ROWS * WIDTH, dtype=torch.float32, device=device).view(-1, WIDTH)
            + 0.25 * rank
        )
        for moment in streams
    }
    torch.cuda.synchronize(device)
    sums = []
    for number in range(NUM_MESSAGES):
        moment: Moment = random.Random(number).choice(["urgent", "overlapped"])
        with torch.cuda.stream(streams[moment]):
            if chance.random() < 0.2:
                torch.cuda._sleep(chance.randrange(2_000_000))
            rows = message(number, rank)
            send, *counts = all_to_device(
                [rows.send, rows.send_counts, rows.receive_counts], device
            )
            on_device = DeviceRows(send=send, send_counts=counts[0], receive_counts=counts[1])
            first = NUM_ROWS - MOST
            way.exchange(
                values[moment],
                first,
                on_device,
                rows,
                moment=moment,
                step=number,
                what="rows",
            )
            come = values[moment][first : first + rows.num_received]
            sums.append(come.double().sum(0))
            # what is sent later depends on what came
            values[moment][: rows.num_received].lerp_(come, 0.5)
    way.finish()
    torch.cuda.synchronize(device)
    return [*sums, *values.values()]


def make_rings(device: torch.device) -> dict[Moment, RowsByClock]:
    clock = torch.zeros(1, dtype=torch.int64, device=device)
    rings = {}
    for moment in MOMENTS:
        headers = torch.zeros(NUM_PLACES, 5, dtype=torch.int64, device=device)
        rings[moment] = RowsByClock(
            send=torch.zeros(NUM_PLACES, MOST, dtype=torch.int32, device=device),
            send_counts=headers[:, :2],
            receive_counts=headers[:, 2:4],
            firsts=headers[:, 4],
            clock=clock,
        )
    return rings


def capture(
    way: PeerMemory,
    values: Mapping[Moment, torch.Tensor],
    rings: Mapping[Moment, RowsByClock],
    stream: torch.cuda.Stream,
) -> torch.cuda.CUDAGraph:
    """A graph of a step's messages, of both moments."""
    for moment in MOMENTS:
        way.warm_up(values[moment], rings[moment], moment)
    with captured_graph(stream) as graph:
        for moment in MOMENTS:
            way.launch(values[moment], rings[moment], moment)
        rings["urgent"].clock.add_(1)
    return graph


def exchange_by_graphs(
    way: PeerMemory | Messages, device: torch.device, rank: int
) -> list[torch.Tensor]:
    """A message of each moment in each step; peer memory's of two steps of three are a graph's."""
    chance, stream, rings = random.Random(rank), torch.cuda.Stream(device), make_rings(device)
    values = {
        moment: torch.arange(NUM_ROWS * WIDTH, dtype=torch.float32, device=device).view(-1, WIDTH)
        + 0.25 * rank
        for moment in MOMENTS
    }
    torch.cuda.synchronize(device)
    graph = None if isinstance(way, Messages) else capture(way, values, rings, stream)
    sums = []
    with torch.cuda.stream(stream):
        for step in range(NUM_STEPS):
            if chance.random() < 0.2:
                torch.cuda._sleep(chance.randrange(2_000_000))
            first, place, is_replayed = NUM_ROWS - MOST - step, step % NUM_PLACES, step % 3 > 0
            messages = {
                moment: message(2 * step + MOMENTS.index(moment), rank) for moment in MOMENTS
            }
            for moment, rows in messages.items():
                ring = rings[moment]
                send, to, from_ = all_to_device(
                    [rows.send, rows.send_counts, rows.receive_counts], device
                )
                ring.send[place, : len(send)] = send
                ring.send_counts[place], ring.receive_counts[place] = to, from_
                ring.firsts[place].fill_(first)
                if graph is None or not is_replayed:
                    on_device = DeviceRows(send=send, send_counts=to, receive_counts=from_)
                    way.exchange(
                        *(values[moment], first, on_device, rows),
                        moment=moment,
                        step=step,
                        what="rows",
                    )
            if graph is not None and is_replayed:
                graph.replay()
                for moment in MOMENTS:
                    way.note(moment, step, "rows")
            else:
                rings["urgent"].clock.add_(1)
            for moment, rows in messages.items():
                come = values[moment][first : first + rows.num_received]
                sums.append(come.double().sum(0))
                values[moment][: rows.num_received].lerp_(come, 0.5)
    way.finish()
    torch.cuda.synchronize(device)
    return [*sums, *values.values()]


def average_all(
    average: PeerAverage | Callable[[torch.Tensor], None], device: torch.device, rank: int
) -> list[torch.Tensor]:
    """Means of a few tensors; peer memory's of two steps of three are a graph's, not always on both
    ranks.
    """
    chance, stream, means = random.Random(rank), torch.cuda.Stream(device), []
    for size in NUM_GRADIENTS:
        values, graph = torch.zeros(size, device=device), None
        torch.cuda.synchronize(device)
        if isinstance(average, PeerAverage):
            average.warm_up(values)
            torch.cuda.synchronize(device)
            with captured_graph(stream) as graph:
                average.launch(values)
        with torch.cuda.stream(stream):
            for step in range(NUM_STEPS):
                if chance.random() < 0.2:
                    torch.cuda._sleep(chance.randrange(2_000_000))
                random_numbers = torch.Generator(device).manual_seed(2 * step + rank)
                values.copy_(torch.randn(size, generator=random_numbers, device=device))
                if isinstance(average, PeerAverage):
                    average.step = step
                if isinstance(average, PeerAverage) and graph is not None and (step + rank) % 3:
                    graph.replay()
                    average.note()
                else:
                    average(values)
                means.append(values.clone())
        torch.cuda.synchronize(device)
    return means


def run_rank(rank: int, port: int) -> None:
    from tests.cache.peer_ranks import assert_all_over

    device = join(rank, 2, port)
    for region_rows in (MOST, 3000):
        communicator = Communicator.from_default_group(timeout=timedelta(seconds=60))
        way = open_way(communicator, device, region_rows)
        for exchange in (exchange_all, exchange_by_graphs):
            found = exchange(way, device, rank)
            assert_all_over(way)
            expected = exchange(Messages(communicator), device, rank)
            for number, (one, other) in enumerate(zip(found, expected, strict=True)):
                assert torch.equal(one, other), (
                    f"{exchange.__name__}: message {number} of regions of {region_rows} rows"
                )
        means = average_all(PeerAverage(way.launcher, rank, 2), device, rank)
        assert_all_over(way)
        expected = average_all(communicator.average, device, rank)
        for number, (one, other) in enumerate(zip(means, expected, strict=True)):
            assert torch.equal(one, other), f"mean {number} by regions of {region_rows} rows"
        way.close(wait=True)
    dist.barrier()
    dist.destroy_process_group()


def test_peer_memory_brings_what_nccl_brings() -> None:
    torch.multiprocessing.spawn(run_rank, args=(free_port(),), nprocs=2)


def leave_other_waiting(rank: int, port: int, folder: str) -> None:
    """Rank 1 ends while rank 0's device waits for its rows."""
    device = join(rank, 2, port)
    communicator = Communicator.from_default_group(timeout=timedelta(seconds=60))
    way = open_way(communicator, device, MOST)
    exchange_all(way, device, rank)
    if rank == 1:
        os._exit(0)
    started = time.monotonic()
    with pytest.raises(LostError, match=r"rank 0: exchanging rows of step .* rank 1 has ended"):
        exchange_all(way, device, rank)
    way.close(wait=False)
    torch.cuda.synchronize(device)  # it comes back
    Path(folder, "seconds").write_text(f"{time.monotonic() - started}")
    os._exit(0)  # a process group with a rank that is gone can't be ended


def test_a_rank_that_ends_leaves_no_gpu_waiting(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(leave_other_waiting, args=(free_port(), str(tmp_path)), nprocs=2)
    assert float((tmp_path / "seconds").read_text()) < 50
