"""Blocks of the memory that a trainer shares with shard servers."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bagpipe.errors import StoreError
from bagpipe.server.memory import MOST_BYTES, StagingMemory, map_foreign

PAGE = os.sysconf("SC_PAGE_SIZE")


@given(
    sizes=st.lists(st.tuples(st.integers(0, 3_000), st.integers(1, 9)), max_size=20),
    returned=st.sets(st.integers(0, 19)),
)
def test_blocks_begin_at_pages_and_do_not_overlap(
    sizes: list[tuple[int, int]], returned: set[int]
) -> None:
    memory = StagingMemory(1 << 20)
    held = []
    for number, (num_records, width) in enumerate(sizes):
        try:
            array = memory.take(num_records, width)
        except StoreError:
            continue
        assert (array.shape, array.dtype) == ((num_records, width), np.float32)
        if not array.size:
            memory.give_back(array)
            continue
        offset = memory.offset_of(array)
        assert offset is not None
        assert offset % PAGE == array.ctypes.data % PAGE == 0
        for other in held:
            assert not np.shares_memory(other, array)
        if number in returned:
            memory.give_back(array)
        else:
            held.append(array)
    memory.close()


def test_a_block_given_back_is_taken_again_and_a_full_memory_has_none() -> None:
    memory = StagingMemory(2 * PAGE)
    first, second = memory.take(100, 8), memory.take(1, 1)
    assert first.shape == (100, 8)
    assert second.shape == (1, 1)
    with pytest.raises(StoreError, match="no room for 4 bytes more: 8,192 of 8,192 are taken"):
        memory.take(1, 1)
    memory.give_back(first)
    third = memory.take(3, 8)
    assert memory.offset_of(third) == 0
    with pytest.raises(StoreError, match="no room for 32,000,000 bytes"):
        memory.take(1_000_000, 8)
    memory.close()


def test_arrays_of_other_memory_lie_nowhere() -> None:
    memory = StagingMemory(PAGE)
    assert memory.offset_of(np.zeros((1, 7), np.float32)) is None
    memory.close()


def test_what_one_process_writes_the_other_reads() -> None:
    memory = StagingMemory(3 * PAGE + 1)
    assert memory.size_bytes == 4 * PAGE
    foreign = map_foreign(memory.file)
    array = memory.take(2, 3)
    array[:] = 1.5
    np.testing.assert_array_equal(foreign[:24].view(np.float32), np.full(6, 1.5, np.float32))
    memory.close()
    memory.close()
    foreign[:4].view(np.float32)[:] = 2  # mappings outlive the file
    assert array[0, 0] == 2


def test_more_memory_than_there_can_be_is_refused() -> None:
    with pytest.raises(StoreError, match=r"can't make 9,223,372,036,854,\d+,\d+ bytes of memory"):
        StagingMemory(2**63 - 2 * PAGE)
    assert MOST_BYTES < 2**47
