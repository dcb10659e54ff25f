"""Shared staging: records go right into a trainer's memory."""

from __future__ import annotations

import secrets
import socket
import threading
from contextlib import closing
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from tests.server.shards import header_of, make_shard
from tests.server.staged import EPOCH, GONE, GROUP, NUM_RANKS, Host, place
from tests.soon import SOON_S, TIMEOUT_S, wait_until
from tests.store_contract import initial, records_of, rows_of

from bagpipe.errors import StoreError
from bagpipe.server import calls
from bagpipe.server.flight import ShardServer
from bagpipe.server.staging import (
    MAX_ROWS,
    MAX_UNDER_WAY,
    StagingStream,
    is_near,
)
from bagpipe.server.wire import What
from bagpipe.store.base import Steps

__all__ = ["place"]


def test_records_are_written_from_the_memory_and_gathered_into_it(place: Host) -> None:
    writes, fetches = place.stream(What.WRITE), place.stream(What.FETCH)
    rows = rows_of(7, 0, 1_299)
    records, begin = place.array(3)
    records[:] = records_of(rows)
    writes.send(place.header(What.WRITE, begin, number=11), rows)
    assert writes.receive().number == 11
    out, offset = place.array(4)
    asked = rows_of(0, 5, 7, 0)
    fetches.send(place.header(What.FETCH, offset, number=12), asked)
    answer = fetches.receive()
    assert (answer.what, answer.number) == (What.ANSWER, 12)
    np.testing.assert_array_equal(out[[0, 2, 3]], records_of(asked)[[0, 2, 3]])
    np.testing.assert_array_equal(out[1:2], initial(GROUP, asked[1:2]))


def test_many_requests_are_under_way_and_answered_in_order(place: Host) -> None:
    stream = place.stream(What.FETCH)
    parts = np.arange(GROUP.num_rows).reshape(-1, 20)[:MAX_UNDER_WAY]
    out, offset = place.array(parts.size)
    for number, rows in enumerate(parts):
        begin = offset + number * 20 * GROUP.record_bytes
        stream.send(place.header(What.FETCH, begin, number=number), rows)
    assert [stream.receive().number for _ in parts] == list(range(len(parts)))
    np.testing.assert_array_equal(out, initial(GROUP, parts.reshape(-1)))


def test_as_many_rows_as_a_message_may_have_are_fetched(place: Host) -> None:
    stream = place.stream(What.FETCH)
    rows = np.arange(MAX_ROWS) % GROUP.num_rows
    out, offset = place.array(MAX_ROWS)
    stream.send(place.header(What.FETCH, offset), rows)
    stream.receive()
    np.testing.assert_array_equal(out, initial(GROUP, rows))


def test_requests_of_many_rows_are_sent_before_a_server_reads_any(place: Host) -> None:
    """Else a trainer that flushes stands still each time, and its server then waits for it."""
    name = f"bagpipe-test-{secrets.token_hex(8)}"
    header, rows = place.header(What.WRITE), np.zeros(MAX_ROWS, np.int64)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.bind(f"\0{name}")
        silent.listen()
        with closing(StagingStream(name, place.memory, header, timeout_s=TIMEOUT_S)) as stream:
            sending = threading.Thread(
                target=lambda: [stream.send(header, rows) for _ in range(3)], daemon=True
            )
            sending.start()
            sending.join(SOON_S)
            is_held_up = sending.is_alive()
            stream.cancel()
    assert not is_held_up


def test_a_fetch_waits_for_the_marks_of_its_fence(place: Host) -> None:
    """One mark comes with a write, the other alone."""
    writes = [place.stream(What.WRITE, rank) for rank in range(NUM_RANKS)]
    fetches = place.stream(What.FETCH)
    out, offset = place.array(1)
    fetches.send(place.header(What.FETCH, offset, steps=Steps(overlapped=4, urgent=2)), rows_of(9))
    answered = threading.Event()
    waiting = threading.Thread(target=lambda: (fetches.receive(), answered.set()))
    waiting.start()
    records, begin = place.array(1)
    records[:] = records_of(rows_of(9))
    mark = place.header(What.WRITE, begin, steps=Steps(overlapped=4, urgent=3))
    writes[0].send(mark, rows_of(9))
    writes[0].receive()
    assert not answered.wait(0.1)
    writes[1].send(replace(mark, rank=1), rows_of())
    writes[1].receive()
    assert answered.wait(SOON_S)
    waiting.join()
    np.testing.assert_array_equal(out, records)


def test_a_rank_has_one_stream_of_writes_in_an_epoch(place: Host) -> None:
    first, second, other = (place.stream(What.WRITE, rank) for rank in (0, 0, 1))
    for stream, rank in ((first, 0), (other, 1)):
        stream.send(place.header(What.WRITE, rank=rank), None)
        stream.receive()
    second.send(place.header(What.WRITE), None)
    with pytest.raises(StoreError, match="rank 0 has had its stream of writes in epoch 3"):
        second.receive()


def test_an_epoch_that_ends_fails_what_waits_and_what_comes(place: Host) -> None:
    waiting, coming = place.stream(What.FETCH), place.stream(What.FETCH)
    _, offset = place.array(1)
    fence = Steps(overlapped=1)
    waiting.send(place.header(What.FETCH, offset, steps=fence), rows_of(1))
    place.shard.begin(EPOCH + 1, NUM_RANKS, None)
    with pytest.raises(StoreError, match="epoch 3 is not served"):
        waiting.receive()
    coming.send(place.header(What.FETCH, offset), rows_of(1))
    with pytest.raises(StoreError, match="epoch 3 is not served"):
        coming.receive()


def test_a_server_that_closes_is_told(place: Host) -> None:
    stream = place.stream(What.FETCH)
    place.shard.close()
    place.server.close()
    place.server.close()
    with pytest.raises(StoreError, match=GONE):
        stream.receive()
    with pytest.raises(StoreError, match=GONE):
        place.stream(What.FETCH)


def test_only_servers_of_this_host_are_near(place: Host) -> None:
    assert is_near(place.server.address)
    assert not is_near("")
    place.server.close()
    assert not is_near(place.server.address)


def test_a_shard_server_tells_where_its_shared_memory_is(place: Host) -> None:
    with closing(ShardServer(make_shard())) as server:
        (answer,) = calls.answers(server.shard, "identify", pa.py_buffer(b"{}"))
        address = calls.Identity.model_validate_json(answer).staging
        server.shard.begin(EPOCH, NUM_RANKS)
        opening = header_of(server.shard, EPOCH, what=What.FETCH)
        stream = StagingStream(address, place.memory, opening, timeout_s=TIMEOUT_S)
    with pytest.raises(StoreError, match=GONE):
        stream.receive()
    stream.close()


def test_no_thread_is_left_of_streams_that_have_ended(place: Host) -> None:
    for _ in range(5):
        place.check_serves()
    place.close()
    # one whose stream ended before the server was closed may still be at its last line
    wait_until(lambda: "staging" not in {thread.name for thread in threading.enumerate()})
