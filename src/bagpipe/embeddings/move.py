"""What of a batch goes to the device ahead, along with the plan: `bagpipe.lookahead(move=...)`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from bagpipe.cache.moved import MovedArray, aligned_begins
from bagpipe.cache.overlap import Buffer, Staging
from bagpipe.errors import UsageError

MakeBatch: TypeAlias = Callable[[Sequence[Tensor]], Any]
"""Makes the batch to hand out of the tensors that its arrays have become."""
Move: TypeAlias = Callable[[Any], tuple[Sequence[MovedArray], MakeBatch]]
"""Takes a batch apart: the arrays that go to the device, and what makes the batch of them again."""


@dataclass(frozen=True, kw_only=True)
class TakenApart:
    """A batch whose arrays have been copied to one piece of memory."""

    arrays: Sequence[MovedArray]
    make_batch: MakeBatch
    buffer: Buffer | None
    """Their memory, which is used again; None: it is the user's, whose tensors share it."""

    def give_back(self) -> None:
        """The device reads the arrays no more."""
        if self.buffer is not None:
            self.buffer.give_back()


def packed_apart(move: Move, staging: Staging, batch: Any, step: int) -> TakenApart:
    """Takes a batch apart and copies its arrays to a buffer of `staging`. Any thread may call it.

    Raises:
        UsageError: As `take_apart`.
    """
    arrays, make_batch = take_apart(batch, move, step)
    begins, num_bytes = aligned_begins(arrays)
    buffer = staging.take(-(-num_bytes // 4), 1)
    memory = buffer.whole.numpy()
    packed = [
        memory[begin // 4 : (begin + array.nbytes) // 4].view(array.dtype).reshape(array.shape)
        for begin, array in zip(begins, arrays, strict=True)
    ]
    for copy, array in zip(packed, arrays, strict=True):
        copy[...] = array
    return TakenApart(
        arrays=packed, make_batch=make_batch, buffer=buffer if staging.is_pinned else None
    )


def take_apart(batch: Any, move: Move | None, step: int) -> tuple[Sequence[MovedArray], MakeBatch]:
    """Calls `move` and checks what it returns.

    The device copies words, so an array of another type or layout would arrive as something else.

    Raises:
        UsageError: `move` returned something else than arrays, C-contiguous and of float32 or
            int32, and a function.
    """
    if isinstance(batch, TakenApart):
        return batch.arrays, batch.make_batch
    if move is None:
        return (), lambda tensors: batch
    moved: object = move(batch)
    if not (
        isinstance(moved, tuple)
        and len(moved) == 2
        and isinstance(moved[0], Sequence)
        and callable(moved[1])
    ):
        raise UsageError(
            f"step {step}: move returned a {type(moved).__name__}, must return (arrays, a function "
            "of their tensors)"
        )
    for index, array in enumerate(moved[0]):
        is_array = isinstance(array, np.ndarray)
        if (
            not is_array
            or array.dtype not in (np.int32, np.float32)
            or not array.flags.c_contiguous
        ):
            found = (
                f"{array.dtype} with strides {array.strides}"
                if is_array
                else f"a {type(array).__name__}"
            )
            raise UsageError(
                f"step {step}: array {index} of move is {found}, must be a C-contiguous numpy "
                "array of float32 or int32: convert it in hand_out, as by "
                "np.ascontiguousarray(x, np.float32)"
            )
    return moved
