"""Shard servers that are gone, silent, full or others, and clients that behave badly."""

from __future__ import annotations

import mmap
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.flight as flight
import pytest
from tests.server.asked import ALL, asked, is_waiting, raised
from tests.server.serving import Servers
from tests.server.shards import own_rows
from tests.soon import SOON_S, TIMEOUT_S, ends_soon, wait_until
from tests.store_contract import SEED, fetch, initial, make_group, records_of, rows_of

from bagpipe.server import wire
from bagpipe.server.control import ServerControl
from bagpipe.server.shard import Shard
from bagpipe.store import Steps


def test_a_server_that_is_gone_is_named_soon() -> None:
    servers = Servers([make_group()], SEED, 2)
    with closing(servers):
        (trainer,) = servers.start()
        waiting, _ = asked(trainer, ALL, Steps(urgent=1))
        started = time.perf_counter()
        threading.Thread(target=servers.servers[1].close, daemon=True).start()
        message = raised(waiting)
        assert time.perf_counter() - started < SOON_S
        assert f"shard server 1 of 2 at 127.0.0.1:{servers.servers[1].port} failed" in message
        assert f"in epoch {servers.epoch}" in message
        assert raised(lambda: trainer.stores[0].write(ALL, records_of(ALL))) == message


def test_a_server_that_owes_an_answer_for_too_long_is_named() -> None:
    with closing(Servers([make_group()], SEED, 2, timeout_s=0.4)) as servers:
        (trainer, _) = servers.start(2)
        # the second server may be asked when the first one is late already
        message = raised(lambda: asked(trainer, ALL, Steps(urgent=1))[0]())
        assert "it has answered nothing for" in message
        assert re.search("shard server [01] of 2 at 127.0.0.1", message)


def test_a_rank_that_stands_still_is_named_by_the_server() -> None:
    with closing(Servers([make_group()], SEED, 1, wait_timeout_s=0.2)) as servers:
        (trainer, other) = servers.start(2)
        for each, step in ((trainer, 4), (other, 2)):
            each.mark(Steps(urgent=step))
            each.stores[0].write(rows_of(step), records_of(rows_of(step)))  # then the mark is there
        waiting, _ = asked(trainer, ALL, Steps(urgent=3))
        assert "waited 0.2 s for rank 1 to write" in raised(waiting)


def test_a_server_that_is_not_there_or_answers_nothing_is_told_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, ends_soon():
        for address, limit_s, why in (
            ("127.0.0.1:1", TIMEOUT_S, "nobody listens there"),
            (
                f"127.0.0.1:{silent.getsockname()[1]}",
                1,
                "it has not answered for 1 s, which servers.start_timeout_s allows",
            ),
        ):
            message = raised(
                lambda at=address, limit_s=limit_s: ServerControl(
                    [at], [make_group()], SEED, start_timeout_s=limit_s
                )
            )
            assert f"shard server 0 of 1 at {address} failed in call identify: {why}" in message


def test_a_server_that_is_out_of_memory_says_so(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    (trainer,) = servers.start()

    def fail(*_: object) -> None:
        raise MemoryError("of a test")

    monkeypatch.setattr(Shard, "read", fail)
    message = raised(lambda: asked(trainer, ALL, Steps())[0]())  # its first part may fail at once
    assert f"in a fetch of rank 0 in epoch {servers.epoch}: it is out of memory (of a te" in message
    assert "divide the tables among more servers" in message


def test_closing_ends_what_is_under_way_and_leaves_no_thread(
    servers: Servers, pool: ThreadPoolExecutor
) -> None:
    (trainer,) = servers.start()
    waiting = pool.submit(asked(trainer, ALL, Steps(urgent=1))[0])
    assert is_waiting(waiting)
    threads = {
        thread for thread in threading.enumerate() if thread.name in ("receive", "send", "watch")
    }
    assert threads
    trainer.close()
    trainer.close()
    assert "rank 0 has closed its streams" in raised(lambda: waiting.result(SOON_S))
    wait_until(lambda: not any(thread.is_alive() for thread in threads))


def test_a_client_that_reads_nothing_holds_up_nobody(servers: Servers) -> None:
    """It asks for 45 MB; its server holds one message of them at a time."""
    (trainer,) = servers.start()
    shard = servers.servers[0].shard
    header = wire.Header(what=wire.What.FETCH, epoch=servers.epoch, instance=shard.instance)
    rows = np.repeat(own_rows(shard), 250)[:100_000]

    def send(writer: Any) -> None:
        with suppress(flight.FlightError):
            for _ in range(16):
                writer.write_with_metadata(wire.pack(rows), header.encode())

    with flight.connect(f"grpc://{servers.addresses[0]}") as client:
        writer, reader = client.do_exchange(flight.FlightDescriptor.for_command(wire.FETCH))
        writer.begin(wire.SCHEMA)
        sender = threading.Thread(target=send, args=(writer,), daemon=True)
        sender.start()
        for _ in range(5):
            np.testing.assert_array_equal(fetch(trainer.stores[0], ALL), initial(make_group(), ALL))
        servers.start()  # nor does it keep an epoch from beginning
        reader.cancel()
        sender.join(SOON_S)
        assert not sender.is_alive()
        with suppress(flight.FlightError):
            writer.close()


def test_memory_stays_flat_under_messages_that_are_refused(servers: Servers) -> None:
    """Of a megabyte each, on streams of their own."""
    servers.start()
    instance = servers.servers[0].shard.instance
    header = wire.Header(what=wire.What.WRITE, epoch=servers.epoch, instance=instance)
    payload = wire.pack(ALL, np.zeros(1 << 20, np.uint8))  # another size than its rows have

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    def send(times: int) -> None:
        for _ in range(times):
            writer, reader = client.do_exchange(flight.FlightDescriptor.for_command(wire.FETCH))
            with suppress(flight.FlightError):
                writer.begin(wire.SCHEMA)
                writer.write_with_metadata(payload, header.encode())
            with pytest.raises(flight.FlightServerError, match="a message is a WRITE"):
                reader.read_chunk()
            with suppress(flight.FlightError):
                writer.close()

    with flight.connect(f"grpc://{servers.addresses[0]}") as client:
        send(30)
        before = resident_bytes()
        send(100)
        assert resident_bytes() - before < 40 << 20
