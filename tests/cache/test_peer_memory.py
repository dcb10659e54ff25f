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
from functools import partial
from pathlib import Path
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
from bagpipe.cache.ring import RowsByClock
from bagpipe.distributed.communicator import Communicator, Moment
from bagpipe.errors import LostError
from bagpipe.optimizers import RowWiseAdagrad
from bagpipe.plan import RowExchange

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="tests/train/test_trainers_gpu.py does it"
)
NUM_VALUES, NUM_MESSAGES, FIRST_STEP = 40, 6, 100
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
        _, rows, *_ = arguments
        self.ask(
            lane,
            partial(self.launch, lane, *arguments, **options),
            lambda: not options["receives"] or self.host.has_come(lane, rows, options["first"]),
        )

    def ask(
        self, lane: triton_peer.Lane, call: Callable[..., object], can_end: Callable[[], bool]
    ) -> None:
        self.streams.setdefault((lane.rank, lane.flags_at), deque()).append((call, can_end))

    def run_all(self, chance: random.Random) -> None:
        """Runs all in an order drawn by chance; of those that wait none runs before it can end."""
        while any(self.streams.values()):
            ready = [stream for stream in self.streams.values() if stream and stream[0][1]()]
            assert ready, "ranks wait for each other"
            call, _ = chance.choice(ready).popleft()
            call()


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


def make_rings(num_trainers: int) -> RowsByClock:
    """Of a place for each message; what no message fills is wrong."""
    headers = torch.zeros(NUM_MESSAGES, 2 * num_trainers + 1, dtype=torch.int64)
    return RowsByClock(
        send=torch.full((NUM_MESSAGES, 6 * num_trainers), NUM_VALUES - 1, dtype=torch.int32),
        send_counts=headers[:, :num_trainers],
        receive_counts=headers[:, num_trainers:-1],
        firsts=headers[:, -1],
        clock=torch.zeros(1, dtype=torch.int64),
    )


def fill(rings: RowsByClock, rows: RowExchange, first_received: int, step: int) -> None:
    place = step % len(rings.firsts)
    rings.send[place, : len(rows.send)] = torch.from_numpy(rows.send)
    rings.send_counts[place] = torch.from_numpy(rows.send_counts)
    rings.receive_counts[place] = torch.from_numpy(rows.receive_counts)
    rings.firsts[place] = first_received


def exchange_at_random(num_trainers: int, width: int, region_rows: int, seed: int) -> None:
    """Exchanges a few messages of each moment and compares what came with what was sent.

    Each rank takes each message from arrays of its own, or from rings.
    """
    chance = random.Random(seed)
    host = Host(num_trainers, region_rows * width * 4)
    launches = Launches(host=host, launch=peer_memory.exchange_rows)
    ways = [host.open(Alike(rank, num_trainers)) for rank in range(num_trainers)]
    rings = [{moment: make_rings(num_trainers) for moment in MOMENTS} for _ in ways]
    for way, by_moment in zip(ways, rings, strict=True):
        for moment in MOMENTS:
            way.warm_up(torch.zeros(1, width), by_moment[moment], moment)
    checks: list[tuple[Tensor, Tensor]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peer_memory, "exchange_rows", launches.exchange_rows)
        for number in range(NUM_MESSAGES):
            counts, moment = draw_counts(chance, num_trainers), chance.choice(MOMENTS)
            step, first_received = FIRST_STEP + number, chance.choice([11, 15])
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
                expected[first_received : first_received + counts[:, rank].sum()] = torch.cat(parts)
                checks.append((values[rank], expected))
                if chance.random() < 0.5:
                    own_rings = rings[rank][moment]
                    fill(own_rings, rows, first_received, step)
                    tick = partial(own_rings.clock.fill_, step)
                    launches.ask(way._traffic[moment].lane, tick, lambda: True)
                    way.launch(values[rank], own_rings, moment)
                    way.note(moment, step, "rows")
                else:
                    way.exchange(
                        *(values[rank], first_received, on_device(rows), rows),
                        moment=moment,
                        step=step,
                        what="rows",
                    )
        launches.run_all(chance)
    for way in ways:
        way.finish()
        assert_all_over(way)
        way.close(wait=True)
    for found, expected in checks:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("num_trainers", "width", "region_rows"),
    [(2, 4, 30), (2, 4, 4), (3, 3, 4)],  # one round, and several
)
def test_rows_come_as_by_messages_whoever_is_ahead(
    num_trainers: int, width: int, region_rows: int, seed: int
) -> None:
    exchange_at_random(num_trainers, width, region_rows, seed)


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
        ("tl.minimum(num_sent - first, num_rows)", "tl.minimum(num_sent - first, num_rows) - 1"),
        (
            "tl.where(others < peer, from_all, 0)) + first_slot",
            "tl.where(others < peer, to_all, 0)) + first_slot",
        ),
        ("in_round, sem=", "in_round - 1, sem="),  # a flag is left out
        ("has_come < in_round, 0,", "has_come > in_round, 0,"),
        ("tl.load(clock) % num_plans", "tl.load(clock) % (num_plans - 1)"),
        ("place * firsts_stride", "place"),
        ("    number = tl.load(launches + twin) + 1", "    number = tl.load(rounds + twin) + 1"),
    ],
    ids=[
        *("region early", "row left out", "wrong begin", "flag left out", "nothing taken"),
        *("wrong place", "wrong first", "rounds counted"),
    ],
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


def lone_launch(way: Any) -> None:
    """The same from rings."""
    rings = make_rings(2)
    rings.receive_counts[0, 1] = 1
    way.note("urgent", 7, "gradients")
    way.launch(torch.zeros(4, 4), rings, "urgent")


@pytest.mark.parametrize("ask", [lone_message, lone_launch])
def test_a_rank_that_sends_nothing_is_waited_for_no_longer_than_the_timeout(
    ask: Callable[[Any], None],
) -> None:
    way = Host(2, 64).open(Alike(0, 2), timeout_s=0.0)
    ask(way)  # returns: the thread that looks has ended the waiting
    for call in (way.finish, lambda: ask(way)):
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
