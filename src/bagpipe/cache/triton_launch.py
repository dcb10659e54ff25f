"""How the Triton kernels are launched, and what they have in common.

A call of a `triton.jit` function binds and classifies each argument anew. That took 50 us of the
trainer's thread, five times a step (docs/results.md). What a kernel's variants depend on is known
here, so a variant is looked up by that and launched directly. What varies from step to step (sizes,
learning rate, where a plan's arrays begin) is never compiled in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

Argument: TypeAlias = Tensor | int | float | None

VARYING = (
    "num_bags num_features batch_size num_uniques num_pieces num_long search_step num_records step "
    "seed_low seed_high "
    "address moved_rows size room num_rows num_slots num_tiles num_words num_offsets max_pieces "
    "num_entries max_near old_room "
    "max_further max_long max_offsets num_plans num_batches max_lookups max_bags max_uniques "
    "rank first_slot first_row end_row region_bytes flags_at regions_at stop_address done_address "
    "send_counts receive_counts clock firsts send_stride to_stride from_stride firsts_stride "
    "slots bag_offsets bag_scales lookup_weights unique_slots bags bag_weights piece_offsets "
    "long_uniques long_offsets"
).split()
"""Arguments whose value, or for a plan's arrays whose alignment, must not start a compilation."""
_LONG = 1 << 31
"""Integers from here on are passed in 64 bits."""
_NOTHING: AbstractContextManager[None] = nullcontext()
_ALIGNMENT = 16
"""Bytes: Triton compiles in whether an address is a multiple of it."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A program's tile, and its warps."""

    rows: int
    columns: int
    num_warps: int

    def count(self, num_rows: int) -> int:
        """How many tiles cover `num_rows` rows."""
        return -(-num_rows // self.rows)


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How much one program works on.

    A tile has `elements` elements, but at least one row, and each thread has `per_thread` of them.
    """

    elements: int
    per_thread: int

    def of(self, width: int) -> Tile:
        """The tile for rows of `width` elements."""
        return _tile(self.elements, self.per_thread, width)


@cache
def _tile(elements: int, per_thread: int, width: int) -> Tile:
    columns = triton.next_power_of_2(width)  # Triton takes no other size
    rows = max(1, elements // columns)
    return Tile(
        rows=rows, columns=columns, num_warps=min(max(rows * columns // (32 * per_thread), 1), 16)
    )


def device_function(function: Callable[..., Any]) -> Any:
    """A decorator for functions that kernels call."""
    return triton.jit(do_not_specialize=VARYING)(function)


class Kernel:
    """A decorator for kernels: their parameters are arguments, then constants (`tl.constexpr`)."""

    def __init__(self, function: Callable[..., Any], *, is_specialized: bool = True) -> None:
        self.function = function
        arguments = signature(function).parameters.values()
        names = [each.name for each in arguments if "constexpr" not in str(each.annotation)]
        varying = VARYING if is_specialized else names
        self._jit = triton.jit(do_not_specialize=varying)(function)
        self.is_compiled = isinstance(self._jit, JITFunction)  # else Triton's interpreter runs it
        self._variants: dict[tuple[Any, ...], Any] = {}

    def launch(
        self,
        num_programs: int,
        arguments: tuple[Argument, ...],
        constants: Mapping[str, object],
        num_warps: int,
    ) -> None:
        """Runs the kernel on the current stream, without fusing multiply-adds.

        Args:
            num_programs: The size of the grid.
            arguments: In the order of the kernel's parameters; tensors are on the current device.
            constants: By the kernel's parameters, in their order.
            num_warps: Of each program.
        """
        if not self.is_compiled:
            self._jit[(num_programs,)](*arguments, **constants)
            return
        # What the code depends on; in line, since calls would take the trainer's thread 5 us more.
        kinds = [
            argument.dtype
            if isinstance(argument, Tensor)
            else _LONG
            if isinstance(argument, int) and argument >= _LONG
            else type(argument)
            for argument in arguments
        ]
        device = torch.cuda.current_device()
        key = (device, num_warps, *constants.values(), *kinds)
        variant = self._variants.get(key)
        if variant is None:
            options = {"num_warps": num_warps, "enable_fp_fusion": False}
            variant = self._jit.warmup(*arguments, **constants, **options, grid=(num_programs,))
            _ = variant[(num_programs, 1, 1)]  # loads it before another thread finds it half loaded
            self._variants[key] = variant
        # Addresses, since for a tensor Triton asks the driver whether the device can reach it.
        passed = [
            argument.data_ptr() if isinstance(argument, Tensor) else argument
            for argument in arguments
        ]
        # What `variant[grid](...)` does, without what it makes anew for hooks: those of profilers.
        stream = torch._C._cuda_getCurrentRawStream(device)
        variant.run(
            *(num_programs, 1, 1, stream, variant.function, variant.packed_metadata),
            *(None, None, None, *passed, *constants.values()),
        )


def element_kernel(function: Callable[..., Any]) -> Kernel:
    """A decorator for kernels whose threads read and write single elements, at any address.

    Nothing is known of alignment, so no array is given a layout of its own, of several elements
    side by side. Else values would go from one layout to another through shared memory.
    """
    return Kernel(function, is_specialized=False)


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """A context in which the tensor's device is the current one."""
    index = tensor.get_device()  # below 0 on a CPU; takes a third of the time of `device`
    if index < 0 or index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(index)


def aligned(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy if it starts at an odd address.

    The layout of a tile may depend on the address, and the order of a tree sum on the layout.
    """
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


@device_function
def sum_rows(
    source: tl.tensor,
    indices: tl.tensor,
    scales: tl.tensor,
    factors: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    DIM: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNROLL: tl.constexpr,
) -> tl.tensor:
    """The sum of `source[indices[begin:end]]` for each row of the tile, in that order.

    Each summand is multiplied by `scales[index]` and by its one of `factors[begin:end]`, unless
    these are None. Rows of `source` have DIM columns and begin STRIDE elements apart.
    """
    columns = tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, tl.max(end - begin, axis=0), UNROLL):
        for ahead in tl.static_range(UNROLL):
            position = begin + start + ahead
            is_row = position < end
            index = tl.load(indices + position, mask=is_row, other=0).to(tl.int64)
            inside = is_row[:, None] & (columns < DIM)[None, :]
            values = tl.load(
                source + index[:, None] * STRIDE + columns[None, :], mask=inside, other=0.0
            ).to(tl.float32)
            if scales is not None:
                values *= tl.load(scales + index, mask=is_row, other=0.0)[:, None]
            if factors is not None:
                values *= tl.load(factors + position, mask=is_row, other=0.0)[:, None]
            total += values
    return total
