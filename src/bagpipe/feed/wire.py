"""How an item crosses from one process to another.

Its arrays go through shared memory, all else in one message. The message is a header, (offset,
length) of each array in the item's place, and the pickles of the item's parts, one after the other
(pickle protocol 5). Every step is packed and unpacked while other threads wait for the GIL, so
arrays are described by type and shape alone, in half the time that numpy's own way takes.
"""

from __future__ import annotations

import copyreg
import io
import mmap
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from struct import Struct
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from bagpipe.native.memory import copy_all
from bagpipe.types import Int64Array, UInt8Array

RELEASED, STOP = b"released", b"stop"
"""Messages to the oracle process: one more item's place is free; no more items are wanted."""
NOTE_SPANS, NOTE_NO_SPANS = b"note", b"note no more"
"""Messages to it, too: where its trainer begins and ends a trace (`bagpipe.feed.noted`)."""
ITEM, FAILURE = b"i", b"f"
"""What messages from the oracle process begin with."""
_ALIGNMENT = 256
_HEADER = Struct("<6q")


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What ended the stream; without an error it just ended."""

    error: BaseException | None = None
    cause: BaseException | None = None
    trace: str = ""
    loader_end: bytes = b""
    """Where the loader is once all is read, of one that has a state."""


@dataclass(frozen=True, kw_only=True)
class Region:
    """A part of a shared file, cut into places of one size."""

    begin: int
    place_bytes: int
    num_places: int

    @property
    def num_bytes(self) -> int:
        return self.place_bytes * self.num_places

    def place(self, number: int) -> slice:
        """The place of an item in the region's memory."""
        begin = number % self.num_places * self.place_bytes
        return slice(begin, begin + self.place_bytes)


def map_region(file: int, region: Region) -> UInt8Array:
    """The region's memory: (num_bytes,)."""
    return np.frombuffer(mmap.mmap(file, region.num_bytes, offset=region.begin), np.uint8)


@dataclass(frozen=True, kw_only=True)
class Packed:
    """An item of two parts, ready to be sent; the first part's arrays come first."""

    pickles: bytes
    buffers: Sequence[memoryview]
    num_first: int  # buffers of the first part
    spans: Int64Array  # (num_buffers, 2) offset in the item's place, and bytes

    @classmethod
    def of(cls, first: object, second: object) -> Packed:
        """Packs both parts; their arrays are only borrowed."""
        file, found = io.BytesIO(), list[pickle.PickleBuffer]()
        pickler = pickle.Pickler(file, protocol=5, buffer_callback=found.append)
        pickler.dispatch_table = {**copyreg.dispatch_table, np.ndarray: _describe_array}
        pickler.dump(first)
        num_first = len(found)
        pickler.dump(second)
        buffers = [buffer.raw() for buffer in found]
        spans, end = [], 0
        for buffer in buffers:
            spans += [end, buffer.nbytes]
            end += -(-buffer.nbytes // _ALIGNMENT) * _ALIGNMENT
        return cls(
            pickles=file.getvalue(),
            buffers=buffers,
            num_first=num_first,
            spans=np.array(spans, np.int64).reshape(-1, 2),
        )

    @property
    def num_bytes(self) -> int:
        """How large a place the item needs; at least 1, since there are no empty places."""
        return max(1, int(self.spans[-1].sum())) if len(self.spans) else 1

    def write(self, place: UInt8Array) -> None:
        """Copies the arrays into the item's place; raises ValueError if that is too small."""
        if self.num_bytes > len(place):
            raise ValueError(f"an item of {self.num_bytes:,} bytes for a place of {len(place):,}")
        # numpy takes six times as long to tell an address
        sources = [pa.py_buffer(buffer).address for buffer in self.buffers]
        copy_all(
            np.array(sources, np.int64),
            pa.py_buffer(place).address + self.spans[:, 0],
            self.spans[:, 1],
        )

    def message(self, number: int, region: Region) -> bytes:
        """The message of this item, for `Received.of`; `number` counts a trainer's items."""
        header = _HEADER.pack(
            number,
            region.begin,
            region.place_bytes,
            region.num_places,
            self.num_first,
            len(self.spans),
        )
        return header + self.spans.tobytes() + self.pickles


@dataclass(frozen=True, kw_only=True)
class Received:
    """An item as its message describes it."""

    number: int
    region: Region
    num_first: int
    spans: Int64Array
    pickles: memoryview

    @classmethod
    def of(cls, message: bytes) -> Received:
        """Reads the message of an item."""
        number, begin, place_bytes, num_places, num_first, num_spans = _HEADER.unpack_from(message)
        spans = np.frombuffer(message, np.int64, 2 * num_spans, _HEADER.size).reshape(-1, 2)
        return cls(
            number=number,
            region=Region(begin=begin, place_bytes=place_bytes, num_places=num_places),
            num_first=num_first,
            spans=spans,
            pickles=memoryview(message)[_HEADER.size + spans.nbytes :],
        )

    def load(self, place: UInt8Array, *, copy_second: bool) -> tuple[Any, Any]:
        """Makes both parts; their arrays are views of the item's place.

        With `copy_second` those of the second part are copies.
        """
        unpickler = pickle.Unpickler(
            io.BytesIO(self.pickles), buffers=self._arrays(place, copy_second)
        )
        return unpickler.load(), unpickler.load()

    def _arrays(self, place: UInt8Array, copy_second: bool) -> Iterator[UInt8Array]:
        for index, (begin, length) in enumerate(self.spans.tolist()):
            array = place[begin : begin + length]
            yield array.copy() if copy_second and index >= self.num_first else array


def _describe_array(array: npt.NDArray[Any]) -> tuple[Any, ...]:
    """Tells pickle how to make an array again.

    An array that has more to it than a type and a shape goes numpy's own way.
    """
    dtype = array.dtype
    if dtype.kind not in "biufc" or not dtype.isnative or not array.flags.c_contiguous:
        return array.__reduce_ex__(pickle.HIGHEST_PROTOCOL)  # type: ignore[return-value]
    memory = pickle.PickleBuffer(array)  # type: ignore[arg-type]
    if array.ndim == 1:
        return np.frombuffer, (memory, dtype.char)
    return _make_array, (memory, dtype.char, array.shape)


def _make_array(memory: memoryview, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    return np.frombuffer(memory, dtype).reshape(shape)
