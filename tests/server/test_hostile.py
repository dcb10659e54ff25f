"""A client that has the token and means harm, or is broken: an error each time, then served on."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr
from tests.server.certificates import TOKEN
from tests.server.shards import fetched, header_of, make_shard, own_rows
from tests.soon import SOON_S
from tests.store_contract import initial, records_of

from bagpipe.server import wire
from bagpipe.server.credentials import Credentials
from bagpipe.server.flight import ShardServer
from bagpipe.server.security import connect
from bagpipe.server.wire import SCHEMA, Header, What

WITHIN_S = SOON_S
KNOWN = Credentials(token=SecretStr(TOKEN))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def server(run_folder: Path) -> Iterator[ShardServer]:
    made = ShardServer(make_shard(1, 3), credentials=KNOWN, run_folder=run_folder)
    made.shard.begin(1, 2)
    yield made
    made.close()


@pytest.fixture(scope="module")
def client(server: ShardServer) -> Iterator[flight.FlightClient]:
    with connect("127.0.0.1", server.port, KNOWN) as made:
        yield made


def called(client: flight.FlightClient, kind: str, body: object) -> list[dict[str, Any]]:
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    options = flight.FlightCallOptions(timeout=WITHIN_S)
    answers = client.do_action(flight.Action(kind, text), options)
    return [json.loads(answer.body.to_pybytes()) for answer in answers]


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(flight.FlightServerError) as caught:
        call()
    text: str = caught.value.extra_info.decode()
    assert "Traceback" not in str(caught.value)
    assert text in str(caught.value)  # an error that is too long for its headers has none
    return text


def sent(
    client: flight.FlightClient, command: bytes, payload: pa.RecordBatch, header: bytes
) -> Any:
    """Sends one message on a stream of its own; returns the answer's metadata, or payload."""
    options = flight.FlightCallOptions(timeout=WITHIN_S)
    descriptor = flight.FlightDescriptor.for_command(command)
    writer, reader = client.do_exchange(descriptor, options)
    try:
        writer.begin(payload.schema)
        writer.write_with_metadata(payload, header)
        writer.done_writing()
        return reader.read_chunk()
    finally:
        try:
            writer.close()
        except pa.ArrowException:
            pass  # the same error again


def is_as_before(server: ShardServer, client: flight.FlightClient) -> None:
    """It answers, and its rows read as nobody has ever written any."""
    (identity,) = called(client, "identify", {})
    assert identity["instance"] == server.shard.instance
    rows = own_rows(server.shard, of=100)
    header = header_of(server.shard, what=What.FETCH)
    got = sent(client, wire.FETCH, wire.pack(rows), header.encode())
    found = np.frombuffer(got.data.column(1).buffers()[2], np.float32).reshape(len(rows), -1)
    np.testing.assert_array_equal(found, initial(server.shard.groups[0], rows))
    assert server.shard.count_written() == [(0, 0)]


def lists(rows: list[Any], records: bytes | None, kind: pa.DataType | None = None) -> Any:
    columns = [pa.array([rows], kind or SCHEMA.field(0).type), pa.array([records], pa.binary())]
    return pa.RecordBatch.from_arrays(columns, ["rows", "records"])


ROW_BYTES = make_shard().groups[0].record_bytes
OWN = int(own_rows(make_shard(1, 3))[0])
FOREIGN = int(own_rows(make_shard(2, 3))[0])
ONE = b"\0" * ROW_BYTES


@pytest.mark.parametrize(
    ("payload", "fact"),
    [
        (lists([-1], ONE), "row"),
        (lists([2**62], ONE), "row"),
        (lists([FOREIGN], ONE), "row"),
        (lists([OWN], ONE[:-1]), f"has {ROW_BYTES - 1:,} bytes of records for 1 rows"),
        (lists([OWN], b""), "has 0 bytes of records for 1 rows"),
        (lists([], ONE), "bytes of records for 0 rows"),
        (lists([OWN], None), "empty cells"),
        (lists([None], ONE), "empty cells"),
        (lists([OWN] * 200_000, b""), "200,000 rows"),
        (lists([], bytes(3 << 20)), "3,145,728 bytes"),
        (lists([OWN], ONE, pa.list_(pa.int32())), "must have 1 line"),
        (lists(["x" * 10], ONE, pa.list_(pa.string())), "must have 1 line"),
        (pa.record_batch({"a": [1]}), "must have 1 line"),
        (pa.record_batch({"a": pa.array(["x"]).dictionary_encode()}), "must have 1 line"),
        (pa.RecordBatch.from_arrays([], []), "must have 1 line"),
        (pa.concat_batches([lists([OWN], ONE)] * 2), "has 2 lines"),
        (lists([OWN], ONE).slice(0, 0), "has 0 lines"),
    ],
)
def test_a_payload_that_is_none(
    server: ShardServer, client: flight.FlightClient, payload: pa.RecordBatch, fact: str
) -> None:
    header = replace(header_of(server.shard), rank=0)
    server.shard.serving._writing_ranks.clear()  # each rank may have one stream only
    assert fact in refused(lambda: sent(client, wire.WRITE, payload, header.encode()))
    is_as_before(server, client)


HEADERS: list[tuple[Callable[[Header], bytes], str]] = [
    (lambda header: b"", "has 0 bytes"),
    (lambda header: header.encode()[:-1], "bytes, must have"),
    (lambda header: header.encode() + b"\0", "bytes, must have"),
    (lambda header: bytes(1 << 20), "1,048,576 bytes"),
    (lambda header: b"x" + header.encode()[1:], "same version"),
    (lambda header: header.encode()[:4] + b"\xff\xff" + header.encode()[6:], "same version"),
    (lambda header: replace(header, epoch=2).encode(), "epoch 2 is not served"),
    (lambda header: replace(header, instance="0" * 32).encode(), "another life"),
    (lambda header: replace(header, rank=2).encode(), "no rank 2"),
    (lambda header: replace(header, group=7).encode(), "group 7"),
    (lambda header: replace(header, what=What.FETCH).encode(), "FETCH"),
    (lambda header: replace(header, place=wire.Place.STAGING).encode(), "STAGING"),
]


@pytest.mark.parametrize(("make", "fact"), HEADERS)
def test_a_header_that_is_none(
    server: ShardServer, client: flight.FlightClient, make: Callable[[Header], bytes], fact: str
) -> None:
    server.shard.serving._writing_ranks.clear()
    header = make(header_of(server.shard))
    assert fact in refused(lambda: sent(client, wire.WRITE, lists([OWN], ONE), header))
    is_as_before(server, client)


@settings(max_examples=40, deadline=None)
@given(data=st.binary(max_size=200), header=st.binary(max_size=200), whole=st.booleans())
def test_any_bytes(
    server: ShardServer, client: flight.FlightClient, data: bytes, header: bytes, whole: bool
) -> None:
    proper = bytearray(header_of(server.shard, what=What.FETCH).encode())
    if whole:  # a header of the right size, some of whose bytes are others
        for index, byte in enumerate(header):
            if byte % 3 == 0:
                proper[index % len(proper)] = byte
        header = bytes(proper)
    rows = list(struct.unpack(f"<{len(data) // 8}q", data[: len(data) // 8 * 8]))
    try:
        sent(client, wire.FETCH, lists(rows, data), header)
    except (flight.FlightError, StopIteration):
        pass
    is_as_before(server, client)


@pytest.mark.parametrize("command", [b"", b"x", b"write ", b"\xff", b"x" * 100_000])
def test_a_stream_that_is_none(
    server: ShardServer, client: flight.FlightClient, command: bytes
) -> None:
    told = refused(lambda: sent(client, command, lists([OWN], ONE), b""))
    assert "must be one of" in told
    is_as_before(server, client)


@pytest.mark.parametrize(
    "path", ["/", "/etc", "{run}/../other", "../other", "{run}/link", "link/x", "", ".", "{run}/\0"]
)
def test_files_outside_of_the_runs_folder_are_out_of_reach(
    server: ShardServer, client: flight.FlightClient, run_folder: Path, path: str
) -> None:
    other = run_folder.parent / "other"
    other.mkdir(exist_ok=True)
    if not (run_folder / "link").exists():
        (run_folder / "link").symlink_to(other)
    folder = path.format(run=run_folder)
    cut = {"epoch": 1, "number": 1, "folder": folder}
    told = refused(lambda: called(client, "cut", cut))
    assert f"is not in log.folder = {str(run_folder.resolve())!r}" in told
    checkpoint = {"name": "1.1", "folder": folder, "files": [[]]}
    begin = {"epoch": 2, "num_ranks": 1, "run": "", "checkpoint": checkpoint}
    assert "is not in log.folder" in refused(lambda: called(client, "begin", begin))
    file = {"name": "../../other/x", "size_bytes": 1, "xxh3_128": "", "shard": 0, "num_shards": 1}
    file |= {"num_records": 1, "is_whole": True}
    checkpoint |= {"folder": "step", "files": [[file]]}
    assert "other/x" in refused(lambda: called(client, "begin", begin))
    assert list(other.iterdir()) == []
    assert server.shard.epoch == 1
    is_as_before(server, client)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("identify", b""),
        ("identify", b"\xff\xfe"),
        ("identify", b"[" * 100_000),
        ("identify", b"[" + b"1," * 100_000 + b"1]"),
        ("identify", {"x" * 100_000: 1}),
        ("begin", {"epoch": 2, "num_ranks": 2**70, "run": "", "checkpoint": None}),
        ("begin", {"epoch": -1, "num_ranks": 1, "run": "", "checkpoint": None}),
        ("begin", {"epoch": 2, "num_ranks": 1, "run": "x" * 100_000, "checkpoint": None}),
        ("begin", {"epoch": 2, "num_ranks": 1, "run": "", "checkpoint": {"files": [1] * 10_000}}),
        ("clear", {"epoch": 1, "instance": "0" * 31, "group": 0}),
        ("clear", {"epoch": 1, "instance": "0" * 32, "group": 0}),
        ("cut", {"epoch": 9, "number": 1, "folder": "{run}"}),
        ("committed", {"epoch": 9, "number": 1}),
        ("__class__", {}),
        ("x" * 100_000, {}),
        ("é" * 100_000, {}),
    ],
)
def test_a_call_that_is_none(
    server: ShardServer, client: flight.FlightClient, run_folder: Path, kind: str, body: Any
) -> None:
    if isinstance(body, dict) and "folder" in body:
        body = body | {"folder": str(run_folder)}
    assert refused(lambda: called(client, kind, body))
    is_as_before(server, client)


def test_a_call_larger_than_any(server: ShardServer, client: flight.FlightClient) -> None:
    told = refused(lambda: called(client, "identify", b" " * (17 << 20)))
    assert "has 17,825,792 bytes, may have 16,777,216" in told


@pytest.mark.parametrize("command", [wire.WRITE, wire.FETCH, wire.SNAPSHOT])
@pytest.mark.parametrize("token", [None, "wrong" * 4])
def test_strangers_reach_no_stream_and_no_call(command: bytes, token: str | None) -> None:
    stranger = Credentials(token=None if token is None else SecretStr(token))
    shard = make_shard()
    shard.begin(1, 1)
    rows = own_rows(shard, of=9)
    shard.write(header_of(shard), rows, records_of(rows))
    what = What.WRITE if command == wire.WRITE else What.FETCH
    with (
        ShardServer(shard, credentials=KNOWN) as server,
        connect("127.0.0.1", server.port, stranger) as client,
    ):
        payload = wire.pack(rows, bytes_of(rows) if command == wire.WRITE else NO_BYTES)
        header = header_of(shard, what=what).encode()
        with pytest.raises(flight.FlightUnauthenticatedError):
            sent(client, command, payload, header)
        for kind in ("identify", "begin", "cut", "committed", "abandon", "clear"):
            with pytest.raises(flight.FlightUnauthenticatedError):
                called(client, kind, {})
        assert shard.epoch == 1
        np.testing.assert_array_equal(
            fetched(shard, header_of(shard, what=What.FETCH), rows), records_of(rows)
        )
        server.close()


NO_BYTES = np.empty(0, np.uint8)


def bytes_of(rows: Any) -> Any:
    return np.zeros_like(records_of(rows)).view(np.uint8).reshape(-1)
