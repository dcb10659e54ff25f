"""How a plan's arrays are cut out of the one copy that goes to a GPU, tried here without one."""

from __future__ import annotations

from random import Random

import numpy as np
import pyarrow as pa
import torch
from hypothesis import given
from hypothesis import strategies as st

from bagpipe.cache.moved import cut_out


@given(
    st.lists(
        st.tuples(
            st.integers(0, 200),
            st.sampled_from([np.int32, np.float32]),
            st.sampled_from([None, 1, 4]),
        ),
        min_size=1,
        max_size=9,
    ),
    st.randoms(use_true_random=False),
)
def test_arrays_are_cut_out_as_they_were(
    kinds: list[tuple[int, type, int | None]], random: Random
) -> None:
    arrays = []
    for number, (length, dtype, width) in enumerate(kinds):
        values = (np.arange(length * (width or 1)) + 1000 * number).astype(dtype)
        arrays.append(values if width is None else values.reshape(length, width))
    random.shuffle(arrays)
    memory = np.zeros(sum(array.nbytes + 256 for array in arrays) + 256, np.uint8)
    begin, laid = 128, []
    # behind one another with gaps, or none after an empty one, as in a place of shared memory
    for array in arrays:
        laid.append(memory[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape))
        laid[-1][...] = array
        begin += -(-array.nbytes // 256) * 256
    # views of them, which overlap
    laid += [array[1:] for array in laid] + [array[len(array) // 2 :][:0] for array in laid]
    random.shuffle(laid)
    places = [pa.py_buffer(array).address for array in laid]
    first = min(places)
    offset = first - pa.py_buffer(memory).address
    end = max(place + array.nbytes for place, array in zip(places, laid, strict=True)) - first
    words = torch.from_numpy(memory[offset : offset + end]).view(torch.int32)
    begins = [(place - first) // 4 for place in places]
    for tensor, array in zip(cut_out(words, begins, laid), laid, strict=True):
        assert tuple(tensor.shape) == array.shape
        np.testing.assert_array_equal(tensor.numpy(), array)
