"""Buffers that pass between threads and a device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bagpipe.cache.overlap import Staging
from bagpipe.server.memory import StagingMemory

CPU = torch.device("cpu")


def test_a_buffer_is_one_memory_for_torch_and_numpy() -> None:
    buffer = Staging(CPU).take(3, 5)
    buffer.array[:] = np.arange(15).reshape(3, 5)
    assert buffer.tensor.is_contiguous()
    assert buffer.tensor.tolist() == buffer.array.tolist()


def test_what_is_given_back_is_taken_again_and_nothing_else() -> None:
    staging = Staging(CPU)
    first, second = staging.take(300, 65), staging.take(300, 65)
    assert first.whole.data_ptr() != second.whole.data_ptr()
    first.give_back()
    third = staging.take(270, 65)  # of the same size, rounded up
    assert third.whole.data_ptr() == first.whole.data_ptr()
    assert third.array.shape == (270, 65)
    assert staging.take(270, 65).whole.data_ptr() not in {
        first.whole.data_ptr(),
        second.whole.data_ptr(),
    }


@pytest.mark.parametrize("num_records", [0, 1, 16_384, 16_385, 100_000])
def test_buffers_hold_what_is_asked_for(num_records: int) -> None:
    buffer = Staging(CPU).take(num_records, 1)
    assert buffer.array.shape == (num_records, 1)
    assert len(buffer.whole) < 2 * max(num_records, 1 << 14)


def test_buffers_of_memory_that_is_shared_lie_in_it_and_go_back_to_it() -> None:
    memory = StagingMemory(1 << 20)
    places = set()
    for _ in range(3):
        staging = Staging(CPU, memory)
        first, second = staging.take(300, 65), staging.take(300, 65)
        first.tensor.fill_(1)
        second.array[:] = 2
        assert (first.array == 1).all()
        places |= {memory.offset_of(first.array), memory.offset_of(second.array)}
        first.give_back()
        second.give_back()
        staging.close()
    assert None not in places
    assert len(places) == 2


def test_a_buffer_that_has_not_come_back_is_nobody_elses_after_the_end() -> None:
    """After a failure the store's process may still read it, or write to it."""
    memory = StagingMemory(1 << 20)
    staging = Staging(CPU, memory)
    back, gone = staging.take(300, 65), staging.take(300, 65)
    back.give_back()
    staging.close()
    places = {memory.offset_of(Staging(CPU, memory).take(300, 65).array) for _ in range(3)}
    assert memory.offset_of(back.array) in places
    assert memory.offset_of(gone.array) not in places
