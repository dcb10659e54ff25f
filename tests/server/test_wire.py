"""Headers and payloads: what is read is what was written, and nothing else is taken."""

from __future__ import annotations

import dataclasses
import struct
from contextlib import suppress

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.store_contract import make_group, records_of

from bagpipe.errors import StoreError
from bagpipe.server import wire
from bagpipe.server.wire import Header, Place, What
from bagpipe.store import Steps

STEPS = st.integers(-1, 2**63 - 1)
HEADERS = st.builds(
    Header,
    what=st.sampled_from(What),
    epoch=st.integers(0, 2**63 - 1),
    instance=st.binary(min_size=16, max_size=16).map(bytes.hex),
    rank=st.integers(0, 2**32 - 1),
    group=st.integers(0, 2**32 - 1),
    number=st.integers(0, 2**63 - 1),
    steps=st.builds(Steps, overlapped=STEPS, urgent=STEPS),
    place=st.sampled_from(Place),
    slot=st.integers(0, 2**32 - 1),
    offset=st.integers(0, 2**63 - 1),
)
HEADER = Header(what=What.FETCH, epoch=1, instance="00" * 16)


@given(HEADERS)
def test_a_header_is_read_as_it_was_written(header: Header) -> None:
    assert wire.decode(pa.py_buffer(header.encode())) == header


@given(st.binary(max_size=200) | HEADERS.map(Header.encode).map(lambda data: data[:-1]))
def test_other_bytes_are_no_header(data: bytes) -> None:
    with pytest.raises(StoreError, match="header"):
        wire.decode(data)


@given(HEADERS, st.integers(0, 10**6), st.integers(0, 255))
def test_an_altered_header_is_a_header_or_an_error(header: Header, place: int, byte: int) -> None:
    data = bytearray(header.encode())
    data[place % len(data)] = byte
    with suppress(StoreError):
        assert wire.decode(bytes(data)).encode() == bytes(data)


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"epoch": 2**63}, f"epoch {2**63}"),
        ({"number": 2**64 - 1}, "number"),
        ({"steps": Steps(urgent=-2)}, "urgent step -2"),
        ({"what": 9}, "9 is not a valid What"),
        ({"place": 7}, "7 is not a valid Place"),
    ],
)
def test_values_out_of_range_are_refused(change: dict[str, object], facts: str) -> None:
    data = dataclasses.replace(HEADER, **change).encode()  # type: ignore[arg-type]
    with pytest.raises(StoreError, match=facts):
        wire.decode(data)


@pytest.mark.parametrize("size_bytes", [None, 0, 3])
def test_a_missing_or_short_header_is_named(size_bytes: int | None) -> None:
    data = None if size_bytes is None else bytes(size_bytes)
    with pytest.raises(StoreError, match=rf"has {size_bytes or 0} bytes, must have 76"):
        wire.decode(data)


def test_a_payload_is_read_as_it_was_packed_and_not_copied() -> None:
    group, rows = make_group(), np.array([4, 9, 1_000])
    records = records_of(rows)
    payload = wire.pack(rows, records.view(np.uint8).reshape(-1))
    found, data = wire.unpack(payload, most_rows=3, most_bytes=84)
    np.testing.assert_array_equal(found, rows)
    read = wire.as_records(data, 3, group)
    np.testing.assert_array_equal(read, records)
    assert np.shares_memory(found, rows)
    assert np.shares_memory(read, records)


def test_no_payload_and_an_empty_one_have_no_rows() -> None:
    for payload in (None, wire.pack()):
        rows, data = wire.unpack(payload, most_rows=0, most_bytes=0)
        assert (rows.dtype, len(rows), len(data)) == (np.int64, 0, 0)


ROWS, RECORDS = pa.list_(pa.int64()), pa.binary()


def batch_of(rows: object, records: object, types: tuple[object, object] = (ROWS, RECORDS)):  # type: ignore[no-untyped-def]
    return pa.record_batch(
        [pa.array(rows, types[0]), pa.array(records, types[1])], names=["rows", "records"]
    )


def damaged() -> pa.RecordBatch:
    """As it comes from a network: its list ends beyond its values."""
    data = wire.pack(np.arange(77)).serialize().to_pybytes()
    begin = data.rindex(struct.pack("<ii", 0, 77))
    data = data[:begin] + struct.pack("<ii", 0, 1_000) + data[begin + 8 :]
    return pa.ipc.read_record_batch(data, wire.SCHEMA)


@pytest.mark.parametrize(
    ("payload", "facts"),
    [
        (batch_of([[1, 2, 3]], [b""]), "has 3 rows and 0 bytes of records, may have 2 and 8"),
        (batch_of([[1]], [bytes(9)]), "has 1 rows and 9 bytes of records, may have 2 and 8"),
        (batch_of([[1], [2]], [b"", b""]), "has 2 lines of columns"),
        (batch_of([], []), "has 0 lines of columns"),
        (batch_of([None], [b""]), "has empty cells"),
        (batch_of([[1]], [None]), "has empty cells"),
        (batch_of([[1, None]], [b""]), "has empty cells"),
        (
            batch_of([[1]], [b""], (pa.list_(pa.int32()), RECORDS)),
            "must have 1 line of .*lists of int64",
        ),
        (batch_of([[1]], [b""], (ROWS, pa.large_binary())), "must have 1 line of"),
        (batch_of([1], [b""], (pa.int64(), RECORDS)), "must have 1 line of"),
        (damaged(), "payload is damaged: .*"),
    ],
)
def test_other_payloads_are_refused(payload: pa.RecordBatch, facts: str) -> None:
    with pytest.raises(StoreError, match=facts):
        wire.unpack(payload, most_rows=2, most_bytes=8)


def test_a_part_of_a_longer_payload_is_read_in_place() -> None:
    payload = batch_of([[7], [8, 9]], [b"abcd", b"efgh"]).slice(1)
    rows, data = wire.unpack(payload, most_rows=2, most_bytes=8)
    assert (rows.tolist(), bytes(data)) == ([8, 9], b"efgh")


def test_records_of_another_size_are_refused() -> None:
    with pytest.raises(StoreError, match=r"has 55 bytes of records for 2 rows of group 2"):
        wire.as_records(np.zeros(55, np.uint8), 2, make_group())


def test_records_that_lie_between_words_are_read() -> None:
    data = np.zeros(29, np.uint8)[1:]
    assert wire.as_records(data, 1, make_group()).shape == (1, 7)


def test_a_message_holds_about_a_megabyte_and_the_largest_record() -> None:
    for dim, most in ((6, 37_449), (16_384, 15)):
        assert wire.piece_rows(make_group(10, dim)) == most
