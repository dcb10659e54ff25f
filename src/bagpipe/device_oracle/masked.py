"""Masked values and writes, in operations that neither wait for the host nor crowd one address."""

from __future__ import annotations

import torch
from torch import Tensor

from bagpipe.device_oracle.state import SPARE


def pick(condition: Tensor, values: Tensor, other: float) -> Tensor:
    """`values` where the condition holds, else a number.

    `torch.where` would copy the number to the device and wait for that.
    """
    return values.masked_fill(~condition, other)


def spread(condition: Tensor, index: Tensor, size: int) -> Tensor:
    """Where to write in `size` elements: `index` (n,) where it holds, else somewhere behind them.

    There are SPARE elements behind them.
    """
    place = torch.arange(len(index), device=index.device) & (SPARE - 1)
    return torch.where(condition, index, place + size)


def scattered(size: int, condition: Tensor, index: Tensor, values: Tensor | int) -> Tensor:
    """Zeros (size,), with values where the condition holds; of `values`' type, or int32."""
    dtype = values.dtype if isinstance(values, Tensor) else torch.int32
    into = torch.zeros(size + SPARE, dtype=dtype, device=index.device)
    return into.scatter_(0, spread(condition, index, size), values)[:size]
