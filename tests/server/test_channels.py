"""Trainers and servers of one host share memory: which records go by it, and how that ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
from tests.server.serving import Servers
from tests.soon import SOON_S, TIMEOUT_S
from tests.store_contract import SEED, fetch, initial, make_group, records_of, rows_of

from bagpipe.errors import StoreError
from bagpipe.server.client import ShardServers
from bagpipe.server.staging import MAX_ROWS
from bagpipe.types import Group

SMALL = make_group(25 * MAX_ROWS, dim=1)


@pytest.fixture(scope="module")
def small() -> Iterator[Servers]:
    with closing(Servers([SMALL], SEED, 1)) as servers:
        yield servers


@pytest.fixture
def trainer(small: Servers) -> Iterator[ShardServers]:
    yield small.start()[0]
    small.end_clients()


def taken_bytes(trainer: ShardServers) -> int:
    assert trainer.memory is not None
    return trainer.memory._end


def test_records_in_shared_memory_are_not_copied(trainer: ShardServers) -> None:
    store, memory = trainer.stores[0], trainer.memory
    assert memory is not None
    rows = np.arange(2 * MAX_ROWS)
    records = memory.take(len(rows), SMALL.record_width)
    records[:] = records_of(rows, width=SMALL.record_width)
    out = memory.take(len(rows), SMALL.record_width)
    before = taken_bytes(trainer)
    store.write(rows, records)
    store.fetch(rows, out)
    np.testing.assert_array_equal(out, records)
    assert taken_bytes(trainer) == before


def test_other_records_go_by_blocks_that_are_used_again(trainer: ShardServers) -> None:
    store = trainer.stores[0]
    rows = np.arange(SMALL.num_rows)  # more messages than may be under way
    records = records_of(rows, width=SMALL.record_width)
    store.write(rows, records)
    before = taken_bytes(trainer)
    for _ in range(3):
        np.testing.assert_array_equal(fetch(store, rows), records)
        store.write(rows, records)
    assert taken_bytes(trainer) <= before + 2 * 16 * MAX_ROWS * SMALL.record_bytes


def test_a_server_of_another_host_is_reached_by_flight(small: Servers) -> None:
    addresses, small.control.staging = small.control.staging, ("bagpipe-of-another-host",)
    try:
        (trainer,) = small.start()
        assert trainer.memory is None
        np.testing.assert_array_equal(
            fetch(trainer.stores[0], rows_of(3, 9)), initial(SMALL, rows_of(3, 9))
        )
    finally:
        small.control.staging = addresses
        small.end_clients()


def test_who_waits_for_room_fails_when_the_streams_end(
    small: Servers, trainer: ShardServers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More messages than may be under way, of which the server has not answered one."""
    reached, may_go_on = threading.Event(), threading.Event()

    def stand_still(*_: object) -> None:
        reached.set()
        assert may_go_on.wait(TIMEOUT_S)

    monkeypatch.setattr(small.servers[0].shard, "write", stand_still)
    failed: list[StoreError] = []

    def write() -> None:
        rows = np.arange(SMALL.num_rows)
        try:
            trainer.stores[0].write(rows, records_of(rows, width=SMALL.record_width))
        except StoreError as error:
            failed.append(error)

    writing = threading.Thread(target=write)
    writing.start()
    assert reached.wait(SOON_S)
    trainer.close()
    writing.join(SOON_S)
    may_go_on.set()
    assert "rank 0 has closed its streams" in str(failed[0])


def test_near_and_far_shards_are_asked_together() -> None:
    group: Group = make_group()
    with closing(Servers([group], SEED, 3)) as servers:
        servers.control.staging = (servers.control.staging[0], "nobody", servers.control.staging[2])
        (trainer,) = servers.start()
        rows = np.arange(group.num_rows)[::-1].copy()
        trainer.stores[0].write(rows, records_of(rows))
        np.testing.assert_array_equal(fetch(trainer.stores[0], rows), records_of(rows))
