"""Buffers that pass between threads and a device."""

from __future__ import annotations

import numpy as np
import pytest

from bagpipe.cache.overlap import Staging


def test_a_buffer_is_one_memory_for_torch_and_numpy() -> None:
    buffer = Staging(pinned=False).take(3, 5)
    buffer.array[:] = np.arange(15).reshape(3, 5)
    assert buffer.tensor.is_contiguous()
    assert buffer.tensor.tolist() == buffer.array.tolist()


def test_what_is_given_back_is_taken_again_and_nothing_else() -> None:
    staging = Staging(pinned=False)
    first, second = staging.take(300, 65), staging.take(300, 65)
    assert first.whole.data_ptr() != second.whole.data_ptr()
    staging.give_back(first)
    third = staging.take(270, 65)  # of the same size, rounded up
    assert third.whole.data_ptr() == first.whole.data_ptr()
    assert third.array.shape == (270, 65)
    assert staging.take(270, 65).whole.data_ptr() not in {
        first.whole.data_ptr(),
        second.whole.data_ptr(),
    }


@pytest.mark.parametrize("num_records", [0, 1, 16_384, 16_385, 100_000])
def test_buffers_hold_what_is_asked_for(num_records: int) -> None:
    buffer = Staging(pinned=False).take(num_records, 1)
    assert buffer.array.shape == (num_records, 1)
    assert len(buffer.whole) < 2 * max(num_records, 1 << 14)
