"""Arrays of the host as tensors on the trainer's device, many by one copy."""

from __future__ import annotations

from collections.abc import Sequence
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
    places = [pa.py_buffer(array).address for array in arrays]  # numpy takes six times as long
    begin = min(places) // _LONGEST_WORD * _LONGEST_WORD
    end = max(place + array.nbytes for place, array in zip(places, arrays, strict=True))
    shared = _shared_memory(arrays)
    if (
        shared is not None
        and end - begin
        <= _MAX_SPREAD * sum(array.nbytes for array in arrays) + len(arrays) * _ALIGNMENT
    ):
        offset = begin - pa.py_buffer(shared).address
        source = torch.from_numpy(shared[offset : offset + end - begin])
    else:
        source, places = _packed(arrays)
        begin = 0
    words = source.to(device, non_blocking=True).view(torch.int32)
    spans = [(place - begin, array.nbytes) for place, array in zip(places, arrays, strict=True)]
    cut = _cut(words, spans)
    return [_as_array(cut[span], array) for span, array in zip(spans, arrays, strict=True)]


def _cut(words: Tensor, spans: Sequence[tuple[int, int]]) -> dict[tuple[int, int], Tensor]:
    """The words of each span, (offset, length) in bytes.

    One call cuts them all, since a call for each takes longer than the copy.
    """
    # Sorting puts an empty span before another one that begins at the same place.
    ordered, lengths, end = (sorted(set(spans)), list[int](), 0)
    for offset, length in ordered:
        if offset < end:  # views of a batch's array that overlap
            return {span: words[span[0] // _WORD : sum(span) // _WORD] for span in ordered}
        lengths += [(offset - end) // _WORD, length // _WORD]
        end = offset + length
    pieces = words.split_with_sizes([*lengths, len(words) - sum(lengths)])
    return dict(zip(ordered, pieces[1::2], strict=True))


def _as_array(words: Tensor, array: MovedArray) -> Tensor:
    tensor = words if array.dtype == np.int32 else words.view(_TORCH_DTYPES[array.dtype])
    return tensor if array.ndim == 1 else tensor.view(array.shape)


_TORCH_DTYPES: Final = {np.dtype(np.int64): torch.int64, np.dtype(np.float32): torch.float32}


def aligned_begins(arrays: Sequence[MovedArray]) -> tuple[list[int], int]:
    """Where each array begins in memory that holds them all, and its size, in bytes."""
    begins, end = list[int](), 0
    for array in arrays:
        begins.append(end)
        end += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    return begins, end


def _packed(arrays: Sequence[MovedArray]) -> tuple[Tensor, list[int]]:
    """One pinned uint8 tensor that holds all arrays, and where each begins in it."""
    begins, end = aligned_begins(arrays)
    pinned = torch.empty(end, dtype=torch.uint8, pin_memory=True)
    for begin, array in zip(begins, arrays, strict=True):
        pinned.numpy()[begin : begin + array.nbytes] = array.reshape(-1).view(np.uint8)
    return pinned, begins


def _shared_memory(arrays: Sequence[MovedArray]) -> UInt8Array | None:
    """The memory map, or pinned tensor, that all arrays are views of, if there is one.

    Such a map is pinned (`bagpipe.embeddings.lookahead`).
    """
    owners = [_owner(array) for array in arrays]
    if isinstance(owners[0], np.ndarray) or any(owner is not owners[0] for owner in owners):
        return None
    if isinstance(owners[0], Tensor):
        return owners[0].numpy().view(np.uint8) if owners[0].is_pinned() else None
    return np.frombuffer(owners[0], np.uint8)  # type: ignore[call-overload,no-any-return]


def _owner(array: MovedArray) -> object:
    owner: object = array
    while isinstance(owner, np.ndarray) and owner.base is not None:
        owner = owner.base
    return owner.obj if isinstance(owner, memoryview) else owner
