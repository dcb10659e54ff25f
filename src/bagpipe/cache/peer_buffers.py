"""Memory of each rank's GPU that the others of its host write to: torch's symmetric memory.

All ranks ask for it together, and all have it or none has. After each thing that may fail on one of
them they tell each other whether it did, so that nobody waits for a rank that has given up.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from bagpipe.distributed.communicator import Communicator

_OK = "ok"
_MAY_SHARE = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"
"""Torch's variable: whether ranks may share a GPU, as tests do."""
_NO_MULTICAST = "TORCH_SYMM_MEM_DISABLE_MULTICAST"
"""Torch's variable. Rows go to one rank each, and setting multicast up fails on some hosts."""

ResultT = TypeVar("ResultT")


class NoPeerMemoryError(Exception):
    """Why rows can't travel by peer memory; the same on all ranks."""


@dataclass(frozen=True, kw_only=True)
class PeerBuffers:
    """One rank's buffer, and how its device reaches those of all ranks."""

    own: Tensor
    """(num_bytes,) uint8 on the device, zeros."""
    addresses: tuple[int, ...]
    """Of each rank's buffer."""
    handle: object = None
    """Keeps the others' buffers within reach."""


def open_buffers(communicator: Communicator, device: torch.device, num_bytes: int) -> PeerBuffers:
    """Makes a buffer of `num_bytes` on each rank, filled with zeros on all when it returns.

    All ranks must call it, with the same size.

    Raises:
        NoPeerMemoryError: a GPU does not reach another one's memory, or torch has no means.
        LostError: a rank is gone.
    """
    num_hosts = communicator.hosts.num_hosts
    if num_hosts > 1:
        raise NoPeerMemoryError(f"the trainers are on {num_hosts} hosts")
    symmetric = _together(communicator, "its means of peer memory", lambda: _means(communicator))
    uuids = communicator.gather_texts("its GPU", _uuid(device))
    _together(communicator, "whether its GPU reaches the others", lambda: _look(uuids, device))

    def allocate() -> Tensor:
        # Not `symmetric.empty`, whose pool may hand out memory of other sizes on other ranks.
        make = symmetric._SymmetricMemory.empty_strided_p2p
        own: Tensor = make((num_bytes,), (1,), torch.uint8, device)
        return own.zero_()

    def meet() -> PeerBuffers:
        with _without_multicast():
            handle = symmetric.rendezvous(own, communicator.now)
        buffers = [
            own if rank == communicator.rank else handle.get_buffer(rank, own.shape, own.dtype)
            for rank in range(communicator.num_trainers)
        ]
        torch.cuda.synchronize(device)  # the zeros are there before anybody writes
        return PeerBuffers(
            own=own,
            addresses=tuple(buffer.data_ptr() for buffer in buffers),
            handle=(handle, buffers),
        )

    own = _together(communicator, "whether it has memory for others", allocate)
    return _together(communicator, "whether it reaches the others' memory", meet)


def _together(communicator: Communicator, what: str, work: Callable[[], ResultT]) -> ResultT:
    """What `work` returns, once it has returned on all ranks; raises where it failed on any."""
    failure, result = _OK, None
    try:
        result = work()
    except Exception as error:  # whatever it is, the others must not wait
        failure = " ".join(str(error).split())[:300] or type(error).__name__
    for rank, told in enumerate(communicator.gather_texts(what, failure)):
        if told != _OK:
            raise NoPeerMemoryError(f"rank {rank}: {told}")
    return result  # type: ignore[return-value]


def _means(communicator: Communicator) -> Any:
    """The module of symmetric memory."""
    if not communicator.by_peer_memory:
        raise NoPeerMemoryError("its communicator has by_peer_memory=False")
    if not isinstance(communicator.now, torch.distributed.ProcessGroup):
        raise NoPeerMemoryError("its process group is not one of torch.distributed.new_group")
    from torch.distributed import _symmetric_memory

    return _symmetric_memory


@contextmanager
def _without_multicast() -> Iterator[None]:
    before = os.environ.get(_NO_MULTICAST)
    os.environ[_NO_MULTICAST] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_NO_MULTICAST, None)
        else:
            os.environ[_NO_MULTICAST] = before


def _uuid(device: torch.device) -> str:
    return str(getattr(torch.cuda.get_device_properties(device), "uuid", device))


def _look(uuids: list[str], device: torch.device) -> None:
    """Looks whether this rank's device reaches those of all ranks."""
    own = _uuid(device)
    if uuids.count(own) > 1 and os.environ.get(_MAY_SHARE) != "1":
        raise NoPeerMemoryError("shares its GPU with another rank")
    seen = {_uuid(torch.device("cuda", index)): index for index in range(torch.cuda.device_count())}
    for rank, uuid in enumerate(uuids):
        if uuid not in seen:
            raise NoPeerMemoryError(f"does not see the GPU of rank {rank} (CUDA_VISIBLE_DEVICES)")
        if uuid != own and not torch.cuda.can_device_access_peer(device, seen[uuid]):
            raise NoPeerMemoryError(f"its GPU does not reach that of rank {rank}")
