"""Arrays of the host as tensors on the trainer's device, many by one copy."""

from __future__ import annotations

from collections.abc import Sequence
from operator import add
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from bagpipe.types import UInt8Array

MovedArray: TypeAlias = npt.NDArray[np.int32] | npt.NDArray[np.int64] | npt.NDArray[np.float32]
"""What moves to the device: 1-D arrays of a plan, arrays of any shape of a batch; C-contiguous."""

_ALIGNMENT = 256
_WORD, _LONGEST_WORD = 4, 8
_MAX_SPREAD = 1.5
"""How many times their own bytes arrays may spread over and still be copied from where they are."""


def to_device(array: MovedArray, device: torch.device) -> Tensor:
    """An array as a tensor on `device`.

    On a CPU it is the same memory. On a GPU it is a copy through pinned memory, which the host does
    not wait for.
    """
    (tensor,) = all_to_device([array], device)
    return tensor


def all_to_device(arrays: Sequence[MovedArray], device: torch.device) -> list[Tensor]:
    """`to_device` of several arrays by one copy.

    A copy costs its thread a dozen calls, which take about 40 us where threads compete. Arrays that
    lie close together in shared memory, as in a plan of the oracle process, are copied from where
    they are. On a GPU all tensors share one piece of memory.
    """
    if device.type == "cpu" or not arrays:
        return [torch.from_numpy(array) for array in arrays]
    words, begins = words_to_device(arrays, device)
    return cut_out(words, begins, arrays)


def words_to_device(arrays: Sequence[MovedArray], device: torch.device) -> tuple[Tensor, list[int]]:
    """Arrays on `device` by one copy, as for `all_to_device`; at least one.

    Returns:
        A piece of memory as int32, and at which of its words each array begins.
    """
    places = [pa.py_buffer(array).address for array in arrays]  # numpy takes six times as long
    sizes = [array.nbytes for array in arrays]
    begin = min(places) // _LONGEST_WORD * _LONGEST_WORD
    end = max(map(add, places, sizes))
    shared = _shared_memory(arrays[0])
    offset = 0 if shared is None else begin - pa.py_buffer(shared).address
    if (
        shared is not None
        and 0 <= offset <= len(shared) - (end - begin)  # all arrays are in it
        and end - begin <= _MAX_SPREAD * sum(sizes) + len(arrays) * _ALIGNMENT
    ):
        source = torch.from_numpy(shared[offset : offset + end - begin])
    else:
        source, places = _packed(arrays, is_pinned=device.type == "cuda")
        begin = 0
    words = source.to(device, non_blocking=True).view(torch.int32)
    return words, [(place - begin) // _WORD for place in places]


def cut_out(words: Tensor, begins: Sequence[int], arrays: Sequence[MovedArray]) -> list[Tensor]:
    """Arrays out of `words_to_device`, each by its beginning."""
    return [_as_array(words, begin, array) for begin, array in zip(begins, arrays, strict=True)]


def _as_array(words: Tensor, begin: int, array: MovedArray) -> Tensor:
    part = words[begin : begin + array.nbytes // _WORD]
    if array.dtype != np.int32:
        part = part.view(_TORCH_DTYPES[array.dtype])
    return part if array.ndim == 1 else part.view(array.shape)


_TORCH_DTYPES: Final = {np.dtype(np.int64): torch.int64, np.dtype(np.float32): torch.float32}


def aligned_begins(arrays: Sequence[MovedArray]) -> tuple[list[int], int]:
    """Where each array begins in memory that holds them all, and its size, in bytes."""
    begins, end = list[int](), 0
    for array in arrays:
        begins.append(end)
        end += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    return begins, end


def _packed(arrays: Sequence[MovedArray], *, is_pinned: bool) -> tuple[Tensor, list[int]]:
    """One uint8 tensor that holds all arrays, and where each begins in it."""
    begins, end = aligned_begins(arrays)
    packed = torch.empty(end, dtype=torch.uint8, pin_memory=is_pinned)
    whole = packed.numpy()
    for begin, array in zip(begins, arrays, strict=True):
        whole[begin : begin + array.nbytes] = array.reshape(-1).view(np.uint8)
    return packed, begins


def _shared_memory(array: MovedArray) -> UInt8Array | None:
    """The memory map, or pinned tensor, that an array is a view of, if there is one.

    Such a map is pinned (`bagpipe.embeddings.lookahead`).
    """
    owner = _owner(array)
    if isinstance(owner, np.ndarray):
        return None
    if isinstance(owner, Tensor):
        return owner.numpy().view(np.uint8) if owner.is_pinned() else None
    return np.frombuffer(owner, np.uint8)  # type: ignore[call-overload,no-any-return]


def _owner(array: MovedArray) -> object:
    owner: object = array
    while isinstance(owner, np.ndarray) and owner.base is not None:
        owner = owner.base
    return owner.obj if isinstance(owner, memoryview) else owner
