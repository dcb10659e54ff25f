"""All ranks have peer memory or none has, whichever of them lacks what."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.soon import ends_soon
from tests.train.ranks import run_ranks

from bagpipe.cache import peer_buffers
from bagpipe.cache.peer_buffers import NoPeerMemoryError, PeerBuffers, open_buffers
from bagpipe.distributed.communicator import Communicator

DEVICE = torch.device("cpu")


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank seems to have a GPU that reaches the other one."""
    monkeypatch.setattr(peer_buffers, "_look", lambda uuids, device: None)
    monkeypatch.setattr(peer_buffers, "_uuid", str)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setenv(peer_buffers._NO_MULTICAST, "1")  # ranks here have one environment


def fail(_: object) -> Any:
    raise RuntimeError("out of\nmemory")


class Symmetric:
    """Torch's module, to one rank; `made` holds the buffers of all."""

    def __init__(
        self, rank: int, made: dict[int, torch.Tensor], **faults: Callable[..., Any]
    ) -> None:
        self._rank, self._made = rank, made
        self._SymmetricMemory = SimpleNamespace(
            empty_strided_p2p=faults.get("allocate", self._allocate)
        )
        self.rendezvous = faults.get("meet", self._meet)

    def _allocate(self, size: Any, stride: Any, dtype: torch.dtype, device: object) -> torch.Tensor:
        self._made[self._rank] = torch.full(size, 7, dtype=dtype)
        return self._made[self._rank]

    def _meet(self, own: torch.Tensor, group: object) -> Any:
        return SimpleNamespace(get_buffer=lambda rank, size, dtype: self._made[rank])


def open_all(monkeypatch: pytest.MonkeyPatch, **faults_of_1: Callable[..., Any]) -> list[Any]:
    """What each of two ranks gets, or why it gets nothing."""
    made: dict[int, torch.Tensor] = {}

    def means(communicator: Communicator) -> Symmetric:
        rank = communicator.rank
        return Symmetric(rank, made, **(faults_of_1 if rank == 1 else {}))

    monkeypatch.setattr(peer_buffers, "_means", means)
    with ends_soon():
        return run_ranks(2, opened)


def opened(communicator: Communicator) -> PeerBuffers | str:
    try:
        return open_buffers(communicator, DEVICE, 64)
    except NoPeerMemoryError as reason:
        return str(reason)


@pytest.mark.usefixtures("two_gpus")
def test_each_rank_knows_the_zeros_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = open_all(monkeypatch)
    assert first.addresses == second.addresses
    assert [each.own.data_ptr() for each in (first, second)] == list(first.addresses)
    assert not any(each.own.any() for each in (first, second))


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("what", ["allocate", "meet"])
def test_what_fails_on_one_is_told_on_all(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = {what: lambda *_: fail(_)}
    assert open_all(monkeypatch, **faults) == ["rank 1: out of memory"] * 2


def test_ranks_of_several_hosts_and_those_told_not_to_have_none() -> None:
    def by_messages(communicator: Communicator) -> PeerBuffers | str:
        communicator.by_peer_memory = False
        return opened(communicator)

    assert run_ranks(2, opened, num_hosts=2) == ["the trainers are on 2 hosts"] * 2
    refused = "rank 0: its communicator has by_peer_memory=False"
    assert run_ranks(2, by_messages) == [refused] * 2


def test_a_gpu_that_does_not_reach_another_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_buffers, "_uuid", lambda device: f"GPU-{device.index}")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda own, other: other == 0)
    look, own = peer_buffers._look, torch.device("cuda", 1)
    look(["GPU-0", "GPU-1"], own)
    for uuids, reason in (
        (["GPU-1", "GPU-1"], "shares its GPU"),
        (["GPU-2", "GPU-1"], "does not see the GPU of rank 0"),
    ):
        with pytest.raises(NoPeerMemoryError, match=reason):
            look(uuids, own)
    with pytest.raises(NoPeerMemoryError, match="does not reach that of rank 1"):
        look(["GPU-0", "GPU-1"], torch.device("cuda", 0))
