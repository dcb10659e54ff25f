"""What trainers and shard servers send each other: a header and a payload a message.

The header travels as the message's metadata. It has one size, and says of which epoch and instance
the message is, so that nothing of an ended epoch is applied. The payload is one record batch of one
row, whose cells are lists: that way a stream carries the records of every group.

    rows     list<int64>   the rows that are written or asked for, none in an answer
    records  binary        their records, packed: `record_bytes` each; none in a fetch

A mark alone is a message without a payload. A message has at most `PIECE_BYTES` of records, so that
several are under way at a time and neither end needs much memory.

What comes from a network is checked here, before anything of its size is allocated.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from bagpipe.errors import StoreError
from bagpipe.store.base import NO_STEPS, Steps
from bagpipe.types import Float32Array, Group, Int64Array, UInt8Array

VERSION = 1
PIECE_BYTES = 1 << 20
MAX_FETCH_ROWS = PIECE_BYTES // 8
"""Rows that one fetch asks for at most; its answer takes several messages."""
SCHEMA = pa.schema([pa.field("rows", pa.list_(pa.int64())), pa.field("records", pa.binary())])
"""The schema of every stream, in both directions."""

WRITE, FETCH, SNAPSHOT = b"write", b"fetch", b"snapshot"
"""What a stream's descriptor says that it is for."""

_MAGIC = b"bgpp"
_LAYOUT = struct.Struct("<4sHBBIIQ16sQqqIQ")
_MAX_NUMBER = 2**63


class What(enum.IntEnum):
    """What a message is."""

    WRITE = 1
    FETCH = 2
    ANSWER = 3


class Place(enum.IntEnum):
    """Where the records of a fetch go."""

    INLINE = 0
    """Into the answer."""
    STAGING = 1
    """Into the client's own memory on the server's host: `Header.slot` and `offset` say where."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What a message says of itself.

    Raises:
        StoreError: A number is out of range.
    """

    what: What
    epoch: int
    instance: str
    """The server process that is meant, 32 hexadecimal digits."""
    rank: int = 0
    group: int = 0
    number: int = 0
    """The request's number in its stream; the answer has the same."""
    steps: Steps = NO_STEPS
    """The mark of a write, or the fence of a fetch."""
    place: Place = Place.INLINE
    slot: int = 0
    offset: int = 0
    """In bytes, within the slot."""

    def encode(self) -> bytes:
        """The header as it travels."""
        return _LAYOUT.pack(
            _MAGIC,
            VERSION,
            self.what,
            self.place,
            self.rank,
            self.group,
            self.epoch,
            bytes.fromhex(self.instance),
            self.number,
            self.steps.overlapped,
            self.steps.urgent,
            self.slot,
            self.offset,
        )


def decode(metadata: bytes | pa.Buffer | None) -> Header:
    """Reads a header.

    Raises:
        StoreError: It is none, one of another version, or a value in it is out of range.
    """
    size_bytes = 0 if metadata is None else len(metadata)
    if metadata is None or size_bytes != _LAYOUT.size:
        raise StoreError(
            f"a message's header has {size_bytes:,} bytes, must have {_LAYOUT.size}: the other end "
            "is not Bagpipe, or of another version"
        )
    (
        magic,
        version,
        what,
        place,
        rank,
        group,
        epoch,
        instance,
        number,
        overlapped,
        urgent,
        *where,
    ) = _LAYOUT.unpack(memoryview(metadata))
    if magic != _MAGIC or version != VERSION:
        raise StoreError(
            f"a message's header has version {version} and mark {magic!r}, must be version "
            f"{VERSION} and {_MAGIC!r}: use the same version of Bagpipe on both ends"
        )
    values = {"epoch": epoch, "number": number, "offset": where[1]}
    values |= {"overlapped step": overlapped, "urgent step": urgent}
    for name, value in values.items():
        if not (-1 if "step" in name else 0) <= value < _MAX_NUMBER:
            raise StoreError(f"a message's header has {name} {value}, which is out of range")
    try:
        return Header(
            what=What(what),
            epoch=epoch,
            instance=instance.hex(),
            rank=rank,
            group=group,
            number=number,
            steps=Steps(overlapped=overlapped, urgent=urgent),
            place=Place(place),
            slot=where[0],
            offset=where[1],
        )
    except ValueError as error:
        raise StoreError(f"a message's header is wrong: {error}") from error


def piece_rows(group: Group) -> int:
    """How many records of a group one message has at most."""
    return PIECE_BYTES // group.record_bytes


_NO_ROWS = np.empty(0, np.int64)
_NO_BYTES = np.empty(0, np.uint8)
_BOUNDS = struct.Struct("<ii")


def _rows_column(rows: Int64Array) -> pa.Array:
    values = pa.Array.from_buffers(pa.int64(), len(rows), [None, pa.py_buffer(rows)])
    bounds = pa.py_buffer(_BOUNDS.pack(0, len(rows)))
    return pa.Array.from_buffers(SCHEMA.field(0).type, 1, [None, bounds], children=[values])


def _records_column(data: UInt8Array) -> pa.Array:
    bounds = pa.py_buffer(_BOUNDS.pack(0, len(data)))
    return pa.Array.from_buffers(SCHEMA.field(1).type, 1, [None, bounds, pa.py_buffer(data)])


_NO_ROWS_COLUMN, _NO_RECORDS_COLUMN = _rows_column(_NO_ROWS), _records_column(_NO_BYTES)


def pack(rows: Int64Array = _NO_ROWS, records: UInt8Array = _NO_BYTES) -> pa.RecordBatch:
    """The payload of rows (n,) and the bytes of records; the arrays are not copied."""
    columns = [
        _rows_column(rows) if len(rows) else _NO_ROWS_COLUMN,
        _records_column(records) if len(records) else _NO_RECORDS_COLUMN,
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def unpack(
    payload: pa.RecordBatch | None, *, most_rows: int, most_bytes: int
) -> tuple[Int64Array, UInt8Array]:
    """The rows (n,) and the bytes of records of a payload; the latter are not copied.

    No payload has no rows and no records.

    Raises:
        StoreError: It is not such a payload, or larger than allowed.
    """
    if payload is None:
        return _NO_ROWS, _NO_BYTES
    try:
        payload.validate(full=True)
    except pa.ArrowInvalid as error:
        raise StoreError(f"a message's payload is damaged: {error}") from error
    if not payload.schema.equals(SCHEMA) or payload.num_rows != 1:
        raise StoreError(
            f"a message's payload has {payload.num_rows} lines of columns {payload.schema.names}, "
            f"must have 1 line of {SCHEMA.names} as lists of int64 and binary"
        )
    rows, records = payload.columns
    values = rows.values
    if rows.null_count or records.null_count or values.null_count:
        raise StoreError("a message's payload has empty cells, must have none")
    _, row_bounds, *_ = rows.buffers()
    _, byte_bounds, data = records.buffers()
    first_row, end_row = _BOUNDS.unpack_from(row_bounds, 4 * rows.offset)
    first_byte, end_byte = _BOUNDS.unpack_from(byte_bounds, 4 * records.offset)
    if end_row - first_row > most_rows or end_byte - first_byte > most_bytes:
        raise StoreError(
            f"a message has {end_row - first_row:,} rows and {end_byte - first_byte:,} bytes of "
            f"records, may have {most_rows:,} and {most_bytes:,}"
        )
    found = _NO_ROWS
    if end_row > first_row:
        found = values.to_numpy(zero_copy_only=True)[first_row:end_row]
        if not found.flags.aligned:  # a message begins anywhere in what gRPC has read
            found = found.copy()
    if end_byte == first_byte or data is None:
        return found, _NO_BYTES
    return found, np.frombuffer(data, np.uint8, end_byte - first_byte, first_byte)


def as_records(data: UInt8Array, num_records: int, group: Group) -> Float32Array:
    """The bytes of a payload as records (num_records, record_width), not a copy.

    They are to be copied as they are: most begin between words, since a message begins anywhere in
    what gRPC has read. Making them even would take as long as writing them.

    Raises:
        StoreError: They are not as many.
    """
    if data.nbytes != num_records * group.record_bytes:
        raise StoreError(
            f"a message has {data.nbytes:,} bytes of records for {num_records:,} rows of "
            f"{group.name}, must have {group.record_bytes} for each"
        )
    return data.view(np.float32).reshape(num_records, group.record_width)


def room(num_records: int, group: Group) -> Float32Array:
    """Memory for records of a message: (num_records, record_width), not set."""
    # Arrow's pool keeps what is freed, where fresh pages would cost as much as the copy.
    buffer = pa.allocate_buffer(num_records * group.record_bytes)
    return np.frombuffer(buffer, np.float32).reshape(num_records, group.record_width)


def as_bytes(records: Float32Array) -> UInt8Array:
    """Records (n, record_width) as the bytes of a payload, not a copy."""
    return records.reshape(-1).view(np.uint8)
