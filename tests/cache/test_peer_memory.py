"""Rows that travel by peer memory are those that an exchange by messages would bring.

It runs without a GPU: memory of the host stands for that of GPUs, and Triton's interpreter runs the
kernel. A rank's launches of one moment are in order, as on a stream; which rank is how far ahead is
drawn by chance.
"""

from __future__ import annotations

import importlib.util
import random
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.cache.peer_ranks import Alike, Host, Turns, peer_memory, use_small_parts
from tests.train.test_trainers import (
    assert_equal,
    curved_loss,
    make_batches,
    make_tables,
    train,
)
from torch import Tensor

from bagpipe.cache import exchange, triton_peer
from bagpipe.cache.device_plan import DeviceRows
from bagpipe.distributed.communicator import Communicator, Moment
from bagpipe.errors import LostError
from bagpipe.optimizers import RowWiseAdagrad
from bagpipe.plan import RowExchange

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="tests/train/test_trainers_gpu.py does it"
)
NUM_VALUES = 40
MOMENTS: tuple[Moment, Moment] = ("urgent", "overlapped")


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_parts(monkeypatch)


@dataclass(kw_only=True)
class Launches:
    """What ranks have asked their devices for, by rank and moment, and not yet got."""

    host: Host
    launch: Callable[..., None]
    streams: dict[tuple[int, int], deque[Any]] = field(default_factory=dict)

    def exchange_rows(self, lane: triton_peer.Lane, *arguments: Any, **options: Any) -> None:
        stream = self.streams.setdefault((lane.rank, lane.flags_at), deque())
        stream.append((lane, arguments, options))

    def run_all(self, chance: random.Random) -> None:
        """Runs all in an order drawn by chance; of those that wait none runs before it can end."""
        while any(self.streams.values()):
            ready = [stream for stream in self.streams.values() if stream and self._can_end(stream)]
            assert ready, "ranks wait for each other"
            lane, arguments, options = chance.choice(ready).popleft()
            self.launch(lane, *arguments, **options)

    def _can_end(self, stream: deque[Any]) -> bool:
        lane, (_, rows, *_), options = stream[0]
        return not options["receives"] or self.host.has_come(lane, rows, options["first"])


def draw_counts(chance: random.Random, num_trainers: int) -> np.ndarray:
    """How many rows go from each rank to each: (N, N); to itself none."""
    counts = np.array(
        [[chance.choice([0, 1, 6]) for _ in range(num_trainers)] for _ in range(num_trainers)]
    )
    np.fill_diagonal(counts, 0)
    return counts


def on_device(rows: RowExchange) -> DeviceRows:
    return DeviceRows(
        send=torch.from_numpy(rows.send),
        send_counts=torch.from_numpy(rows.send_counts),
        receive_counts=torch.from_numpy(rows.receive_counts),
    )


def exchange_at_random(num_trainers: int, width: int, region_rows: int, seed: int) -> None:
    """Exchanges a few messages of each moment and compares what came with what was sent."""
    chance = random.Random(seed)
    host = Host(num_trainers, region_rows * width * 4)
    launches = Launches(host=host, launch=peer_memory.exchange_rows)
    ways = [host.open(Alike(rank, num_trainers)) for rank in range(num_trainers)]
    checks: list[tuple[Tensor, Tensor]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peer_memory, "exchange_rows", launches.exchange_rows)
        for number in range(6):
            counts, moment = draw_counts(chance, num_trainers), chance.choice(MOMENTS)
            values = [
                torch.arange(NUM_VALUES * width, dtype=torch.float32).view(NUM_VALUES, width)
                + 1000 * (number * num_trainers + rank)
                for rank in range(num_trainers)
            ]
            sent = [
                np.array([chance.randrange(10) for _ in range(counts[rank].sum())], np.int32)
                for rank in range(num_trainers)
            ]
            for rank, way in enumerate(ways):
                rows = RowExchange(
                    send=sent[rank],
                    send_counts=counts[rank],
                    receive_counts=counts[:, rank].copy(),
                )
                expected = values[rank].clone()
                parts = [
                    values[other][torch.from_numpy(np.split(each, counts[other].cumsum())[rank])]
                    for other, each in enumerate(sent)
                ]
                expected[11 : 11 + counts[:, rank].sum()] = torch.cat(parts)
                checks.append((values[rank], expected))
                way.exchange(
                    values[rank], 11, on_device(rows), rows, moment=moment, step=number, what="rows"
                )
        launches.run_all(chance)
    for way in ways:
        way.finish()
        way.close(wait=True)
    for found, expected in checks:
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("num_trainers", "width", "region_rows"),
    [(2, 4, 30), (2, 4, 4), (3, 3, 4)],  # one round, and several
)
def test_rows_come_as_by_messages_whoever_is_ahead(
    num_trainers: int, width: int, region_rows: int
) -> None:
    exchange_at_random(num_trainers, width, region_rows, seed=0)


def with_fault(monkeypatch: pytest.MonkeyPatch, folder: Path, right: str, wrong: str) -> None:
    """Lets ranks use a kernel with a line of it changed."""
    text = Path(triton_peer.__file__).read_text()
    assert text.count(right) == 1
    path = folder / "faulty.py"
    path.write_text(text.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("faulty", path)
    assert spec is not None
    assert spec.loader is not None
    faulty = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "faulty", faulty)  # where a dataclass looks for types
    spec.loader.exec_module(faulty)
    faulty._TILE = triton_peer._TILE
    monkeypatch.setattr(peer_memory, "exchange_rows", faulty.exchange_rows)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("(in_round % 2)", "(in_round * 0)"),  # a region is written a round early
        ("tl.minimum(num_sent, num_rows)", "tl.minimum(num_sent, num_rows) - 1"),
        (
            "tl.where(others < peer, from_all, 0)) + first_row",
            "tl.where(others < peer, to_all, 0)) + first_row",
        ),
        ("in_round, sem=", "in_round - 1, sem="),  # a flag is left out
        ("has_come < in_round, 0,", "has_come > in_round, 0,"),
    ],
    ids=["region early", "row left out", "wrong begin", "flag left out", "nothing taken"],
)
def test_planted_faults_are_found(
    right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_fault(monkeypatch, tmp_path, right, wrong)
    with pytest.raises(AssertionError):
        exchange_at_random(3, 4, 4, seed=0)


def lone_message(way: Any) -> None:
    """Rank 0 of 2 waits for a row of rank 1."""
    rows = RowExchange(
        send=np.empty(0, np.int32), send_counts=np.array([0, 0]), receive_counts=np.array([0, 1])
    )
    way.exchange(
        torch.zeros(4, 4), 2, on_device(rows), rows, moment="urgent", step=7, what="gradients"
    )


def test_a_rank_that_sends_nothing_is_waited_for_no_longer_than_the_timeout() -> None:
    way = Host(2, 64).open(Alike(0, 2), timeout_s=0.0)
    lone_message(way)  # returns: the thread that looks has ended the waiting
    for call in (way.finish, lambda: lone_message(way)):
        with pytest.raises(
            LostError, match=r"rank 0: exchanging gradients of step 7 failed.* rank 1 for"
        ):
            call()
    way.close(wait=False)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ("waiter.raise_if_gone", "the process of rank 1 has ended"),
        ("lockstep.raise_if_failed", "rank 1 has failed: ValueError"),
    ],
)
def test_a_rank_that_failed_or_whose_process_has_ended_is_told(
    asked: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look() -> None:
        raise RuntimeError(reason)

    monkeypatch.setattr(peer_memory, "_LOOK_FOR_FAILED_AFTER_S", 0.0)
    communicator = Alike(0, 2)
    whom, name = asked.split(".")
    setattr(getattr(communicator, whom), name, look)
    way = Host(2, 64).open(communicator)
    lone_message(way)
    with pytest.raises(LostError, match=rf"of step 7 failed.*{reason}"):
        way.finish()
    way.close(wait=False)


def test_a_stream_that_fails_ends_its_waiting() -> None:
    way = Host(2, 64).open(Alike(0, 2))
    way.close(wait=False)
    lone_message(way)


def test_training_equals_that_by_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums are not exact, so a sum in another order shows."""

    def trained() -> list[np.ndarray]:
        return train(
            make_tables(),
            RowWiseAdagrad(lr=0.1),
            make_batches(6),
            [(3, 6)],
            loss=curved_loss,
            lookahead=3,
        )

    expected = trained()
    monkeypatch.setattr(peer_memory, "_NUM_PROGRAMS", {"urgent": 2, "overlapped": 2})
    host = Host(3, 160)  # ten rows of the wider tables: at times several rounds
    turns, opened = Turns(host), list[Any]()

    def way(communicator: Communicator, *_: object) -> Any:
        opened.append(host.open(communicator))
        return opened[-1]

    monkeypatch.setattr(exchange, "way_for", way)
    monkeypatch.setattr(peer_memory, "exchange_rows", turns.exchange_rows)
    assert_equal(trained(), expected)
    assert (
        sum(traffic.num_issued for way in opened for traffic in way._traffic.values()) > 3 * 6 * 4
    )
