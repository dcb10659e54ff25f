"""Ranks in one process whose peer memory is plain memory of the host."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.soon import TIMEOUT_S
from torch import Tensor

from bagpipe.cache.device_plan import DeviceRows
from bagpipe.cache.ring import RowsByClock
from bagpipe.cache.triton_launch import Tiling
from bagpipe.distributed.waiting import naming_failures

peer_memory = pytest.importorskip("bagpipe.cache.peer_memory")
from bagpipe.cache import triton_peer  # noqa: E402
from bagpipe.cache.peer_buffers import PeerBuffers  # noqa: E402


def use_small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs, which share a message of few rows."""
    monkeypatch.setattr(peer_memory, "_NUM_PROGRAMS", {"urgent": 4, "overlapped": 2})
    monkeypatch.setattr(triton_peer, "_TILE", Tiling(elements=8, per_thread=8))
    triton_peer._constants.cache_clear()


class Host:
    """The buffers of all ranks of a host."""

    def __init__(self, num_trainers: int, region_bytes: int) -> None:
        self.layout = peer_memory.PeerLayout(num_trainers=num_trainers, region_bytes=region_bytes)
        self.owned = [
            torch.zeros(self.layout.num_bytes // 8, dtype=torch.int64) for _ in range(num_trainers)
        ]

    def open(self, communicator: Any, *, timeout_s: float | None = None) -> Any:
        """A rank's peer memory."""
        buffers = PeerBuffers(
            own=self.owned[communicator.rank].view(torch.uint8),
            addresses=tuple(owned.data_ptr() for owned in self.owned),
            handle=self.owned,
        )
        return peer_memory.PeerMemory(communicator, self.layout, buffers, timeout_s=timeout_s)

    def has_come(self, lane: triton_peer.Lane, rows: DeviceRows | RowsByClock, first: int) -> bool:
        """Whether a rank's flags say that all rows of a round are there."""
        at = lane.flags_at // 8
        flags = self.owned[lane.rank][at : at + lane.rounds.numel()].view(lane.rounds.shape)
        counts = torch.maximum(rows.send_counts, rows.receive_counts)
        if isinstance(rows, RowsByClock):
            counts = counts[int(rows.clock) % len(counts)]
        counts[lane.rank] = 0  # a place left free
        return bool((flags > lane.rounds)[counts > first].all())


def assert_all_over(way: Any) -> None:
    """The device has counted as many launches as the host."""
    for traffic in way._traffic.values():
        lane = traffic.lane
        others = torch.arange(lane.num_trainers) != lane.rank
        assert (lane.done[others] == traffic.num_issued).all()
    way.look()
    assert not any(traffic.issued for traffic in way._traffic.values())


class Alike:
    """What a rank's peer memory asks its communicator for."""

    def __init__(self, rank: int, num_trainers: int) -> None:
        self.rank, self.num_trainers = rank, num_trainers
        self.timeout = timedelta(seconds=TIMEOUT_S)
        self.waiter = SimpleNamespace(raise_if_gone=lambda: None)
        self.lockstep = SimpleNamespace(raise_if_failed=lambda: None)

    def naming(self, what: str) -> AbstractContextManager[None]:
        return naming_failures(self.rank, self.num_trainers, what)


class Turns:
    """Lets ranks that are threads launch one after the other, since Triton's interpreter is no
    program for threads: who would wait on a device for rows that have not come lets others go.
    """

    def __init__(self, host: Host) -> None:
        self._host, self.turn = host, threading.Condition()
        self._launch = triton_peer.exchange_rows

    def exchange_rows(
        self,
        lane: triton_peer.Lane,
        values: Tensor,
        rows: DeviceRows | RowsByClock,
        *place: int,
        **options: Any,
    ) -> None:
        with self.turn:
            if options.get("receives"):
                come = partial(self._host.has_come, lane, rows, options["first"])
                assert self.turn.wait_for(come, TIMEOUT_S)
            self._launch(lane, values, rows, *place, **options)
            self.turn.notify_all()
