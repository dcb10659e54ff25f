"""What lets records travel behind compute: streams of a GPU, and host memory that it copies with.

A GPU copies behind compute only from and to pinned memory. Torch's allocator of pinned memory asks
the driver about events each time it is asked for memory, and calls of the driver take turns: beside
a busy trainer's thread that cost a tenth of a millisecond for each transfer (docs/results.md).
Buffers here are used again and again without asking the driver: whoever takes a buffer gives it
back once the device is done with it, too. On a CPU, where a store shares memory with its trainer,
buffers are blocks of that memory: the store's process fills and reads them right there.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from bagpipe.store.base import RecordMemory
from bagpipe.types import Float32Array

_MIN_FLOATS = 1 << 14


class Streams:
    """The streams of one executor on a CUDA device.

    Records leave the cache on `out` and enter it on `into`. `compute` is the trainer's own stream:
    the one that was current at the last `record_compute`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._index = torch.cuda.current_device() if device.index is None else device.index
        self.out: torch.cuda.Stream = torch.cuda.Stream(device)
        self.into: torch.cuda.Stream = torch.cuda.Stream(device)
        self._by_handle = dict[int, torch.cuda.Stream]()
        self._followed: torch.cuda.Event | None = None  # by `out`
        self.compute: torch.cuda.Stream
        self.computed: torch.cuda.Event
        self.record_compute()

    def record_compute(self) -> torch.cuda.Event:
        """Makes `computed` an event after all compute issued so far, and returns it."""
        self.compute = self.current()
        self.computed = self.compute.record_event()
        return self.computed

    def let_out_follow(self) -> None:
        """Lets `out` follow `computed`, once."""
        if self._followed is not self.computed:
            self.out.wait_event(self.computed)
            self._followed = self.computed

    def current(self) -> torch.cuda.Stream:
        """The stream that is current on the device.

        Torch makes another object of it each time, which takes several times as long.
        """
        handle = torch._C._cuda_getCurrentRawStream(self._index)
        stream = self._by_handle.get(handle)
        if stream is None:
            stream = self._by_handle[handle] = torch.cuda.current_stream(self._device)
        return stream

    def on(self, stream: torch.cuda.Stream) -> AbstractContextManager[object]:
        """A context in which a stream of the device is current, entered at once.

        It is `torch.cuda.stream` at a fraction of its price, where the device is the current one.
        """
        if torch.cuda.current_device() != self._index:
            return torch.cuda.stream(stream)
        return _On(stream, self.current())


class _On:
    """A context with another current stream."""

    __slots__ = ("_before", "_stream")

    def __init__(self, stream: torch.cuda.Stream, before: torch.cuda.Stream) -> None:
        self._stream, self._before = stream, before

    def __enter__(self) -> None:
        torch.cuda.set_stream(self._stream)

    def __exit__(self, *exception: object) -> None:
        torch.cuda.set_stream(self._before)


def for_user(tensors: tuple[Tensor, ...], streams: Streams | None) -> tuple[Tensor, ...]:
    """Tensors of a plan's memory for the user, who may keep them.

    That memory, made on another stream, must outlive what compute does with it.
    """
    if tensors and streams is not None:
        tensors[0].record_stream(streams.compute)  # of all, which share it
    # or autograd takes a change of one for a change of all
    return tuple(tensor.data for tensor in tensors)


@dataclass(frozen=True, kw_only=True)
class Buffer:
    """Host memory for records, (num_records, record_width) float32."""

    whole: Tensor
    """(a power of two,); the records are its beginning."""
    shape: tuple[int, int]
    free: deque[Tensor]
    """Where it goes when it is given back."""

    @property
    def tensor(self) -> Tensor:
        """The records for torch."""
        return self.whole.as_strided(self.shape, (self.shape[1], 1))

    @property
    def array(self) -> Float32Array:
        """The records for numpy."""
        array: Float32Array = self.whole.numpy()[: math.prod(self.shape)].reshape(self.shape)
        return array

    def give_back(self) -> None:
        """Neither a thread nor the device uses it any more.

        A buffer that never comes back is freed as any tensor is.
        """
        self.free.append(self.whole)


class Staging:
    """Owns buffers by size; any thread may call it.

    It grows to as many buffers as are in use at one time.
    """

    def __init__(self, device: torch.device, memory: RecordMemory | None = None) -> None:
        """Takes buffers for a CPU from `memory`, which is borrowed until `close`, if there is any.

        For a GPU they are pinned memory of torch's.
        """
        self.is_pinned = device.type == "cuda"
        self._memory = None if self.is_pinned else memory
        # No lock: a deque's operations are atomic.
        self._free: dict[int, deque[Tensor]] = defaultdict(deque)

    def take(self, num_records: int, record_width: int) -> Buffer:
        """A buffer with undefined content; it is the taker's until it gives it back.

        Raises:
            StoreError: The memory that is shared has no room for it.
        """
        num_floats = num_records * record_width
        size = max(_MIN_FLOATS, 1 << (num_floats - 1).bit_length())
        free = self._free[size]
        try:
            whole = free.pop()
        except IndexError:
            whole = self._new(size)
        return Buffer(whole=whole, shape=(num_records, record_width), free=free)

    def close(self) -> None:
        """Gives blocks back to the memory that they are of.

        A buffer that has not come back keeps its block: after a failure nobody has waited for what
        was under way, and the store's process may still read it, or write to it.
        """
        for free in self._free.values():
            while self._memory is not None and free:
                self._memory.give_back(free.pop().numpy())
        self._free.clear()

    def _new(self, size: int) -> Tensor:
        if self._memory is None:
            return torch.empty(size, pin_memory=self.is_pinned)
        return torch.from_numpy(self._memory.take(1, size)[0])
