"""Memory that is registered with a GPU; on a CPU with a made-up registrar that is as strict."""

from __future__ import annotations

import gc
import logging
import weakref

import numpy as np
import pytest
import torch

from bagpipe.cache.pinned import CudaRegistrar, PinnedMemory
from bagpipe.server.memory import StagingMemory


class FakeRegistrar:
    """Refuses what overlaps with what is registered, as CUDA does, and all beyond a limit."""

    def __init__(self, limit_bytes: int = 1 << 30) -> None:
        self.ranges: dict[int, int] = {}
        self.limit_bytes = limit_bytes
        self.mapping: weakref.ref[object] | None = None

    def register(self, address: int, num_bytes: int) -> str | None:
        for begin, size in self.ranges.items():
            if address < begin + size and begin < address + num_bytes:
                return "cudaErrorHostMemoryAlreadyRegistered"
        if sum(self.ranges.values()) + num_bytes > self.limit_bytes:
            return "cudaErrorMemoryAllocation"
        self.ranges[address] = num_bytes
        return None

    def unregister(self, address: int) -> None:
        assert self.mapping is None or self.mapping() is not None
        del self.ranges[address]


def test_a_range_is_registered_once_and_so_is_what_lies_in_it() -> None:
    registrar, memory = FakeRegistrar(), StagingMemory(1 << 20)
    pinned = PinnedMemory(registrar)
    block, other = memory.take(1, 4_096), memory.take(1, 1_024)
    for _ in range(2):
        assert pinned.pin(block)
        assert pinned.pin(block[0, 100:200])
        assert pinned.pin(other)
    assert registrar.ranges == {each.ctypes.data: each.nbytes for each in (block, other)}
    pinned.unpin()
    assert registrar.ranges == {}
    assert pinned.pin(block)  # again


def test_memory_is_let_go_before_it_is_unmapped() -> None:
    registrar, memory = FakeRegistrar(), StagingMemory(1 << 20)
    pinned = PinnedMemory(registrar)
    assert pinned.pin(memory.take(1, 1_024))
    registrar.mapping = weakref.ref(memory._memory)
    memory.close()
    del memory
    gc.collect()
    assert registrar.mapping() is not None
    pinned.unpin()
    gc.collect()
    assert registrar.mapping() is None
    assert not registrar.ranges


def test_what_the_system_refuses_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    pinned, memory = PinnedMemory(FakeRegistrar(limit_bytes=4_096)), StagingMemory(1 << 20)
    with caplog.at_level(logging.WARNING):
        assert [pinned.pin(memory.take(1, 1_024)) for _ in range(4)] == [True, False, False, False]
    (record,) = caplog.records
    assert "cudaErrorMemoryAllocation" in record.getMessage()
    assert "4096 bytes" in record.getMessage()


@pytest.mark.gpu
def test_a_gpu_copies_with_it_and_a_refusal_leaves_no_error_behind() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    registrar, memory = CudaRegistrar(device), StagingMemory(1 << 20)
    pinned, block = PinnedMemory(registrar), memory.take(300, 65)
    assert pinned.pin(block)
    assert registrar.register(block.ctypes.data, block.nbytes) is not None
    records, shared = torch.rand(300, 65, device=device), torch.from_numpy(block)
    assert shared.is_pinned()
    shared.copy_(records, non_blocking=True)
    torch.cuda.synchronize()
    np.testing.assert_array_equal(block, records.cpu().numpy())
    assert torch.empty(10, pin_memory=True).is_pinned()  # no error is left for it
    pinned.unpin()
    torch.cuda.synchronize()
    assert not shared.is_pinned()
