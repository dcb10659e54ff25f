"""Host memory that records pass through on their way between a store and a device, used again and
again.

A GPU copies behind compute from and to pinned memory alone. Torch's allocator of that asks the
driver about events, each time it is asked for memory, and the driver's calls take turns: a tenth of
a millisecond for each transfer beside a busy trainer's thread (docs/results.md). Here nobody asks
the driver: who takes a buffer gives it back when the device, too, is done with it.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from dataclasses import dataclass

import torch
from torch import Tensor

from bagpipe.types import Float32Array

_MIN_FLOATS = 1 << 14


@dataclass(frozen=True, kw_only=True)
class Buffer:
    """Memory for records, (num_records, record_width) float32."""

    whole: Tensor  # (a power of two,), which the records are the beginning of
    shape: tuple[int, int]

    @property
    def tensor(self) -> Tensor:
        """The records for torch."""
        return self.whole.as_strided(self.shape, (self.shape[1], 1))

    @property
    def array(self) -> Float32Array:
        """The records for numpy."""
        array: Float32Array = self.whole.numpy()[: math.prod(self.shape)].reshape(self.shape)
        return array


class Staging:
    """Owns buffers by size; any thread may call it. It grows to as many as are under way at a
    time.
    """

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        # by size; a deque's operations are atomic
        self._free: dict[int, deque[Tensor]] = defaultdict(deque)

    def take(self, num_records: int, record_width: int) -> Buffer:
        """A buffer whose content is undefined, the taker's until it calls `give_back`."""
        num_floats = num_records * record_width
        size = max(_MIN_FLOATS, 1 << (num_floats - 1).bit_length())
        try:
            whole = self._free[size].pop()
        except IndexError:
            whole = torch.empty(size, pin_memory=self._pinned)
        return Buffer(whole=whole, shape=(num_records, record_width))

    def give_back(self, buffer: Buffer) -> None:
        """Says that neither a thread nor the device uses the buffer any more. One that never comes
        back goes as any tensor does.
        """
        self._free[len(buffer.whole)].append(buffer.whole)
