"""What of a batch goes to the device ahead, along with the plan: `bagpipe.lookahead(move=...)`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from bagpipe.cache.device_plan import MovedArray
from bagpipe.errors import UsageError

MakeBatch: TypeAlias = Callable[[Sequence[Tensor]], Any]
"""Makes the batch to hand out of the tensors that its arrays have become."""
Move: TypeAlias = Callable[[Any], tuple[Sequence[MovedArray], MakeBatch]]
"""Takes a batch apart: the arrays that go to the device, and what makes the batch of them again."""


def take_apart(batch: Any, move: Move | None, step: int) -> tuple[Sequence[MovedArray], MakeBatch]:
    """Calls `move` and checks what it returns.

    The device copies words, so an array of another type or layout would arrive as something else.

    Raises:
        UsageError: `move` returned something else than arrays, C-contiguous and of float32 or
            int32, and a function.
    """
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
