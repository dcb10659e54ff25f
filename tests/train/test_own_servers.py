"""Own loops of several trainers have the shard servers that they start, which end with them."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.processes import is_alive
from tests.soon import wait_until
from tests.train.ranks import run_ranks
from tests.train.runs import small_config
from tests.train.test_trainers import Trainer, linear_loss, make_batches, make_tables, plain, train

from bagpipe.distributed.communicator import Communicator
from bagpipe.distributed.served_tables import ServedTables, servers_of_hosts
from bagpipe.embeddings.collection import EmbeddingBagCollection
from bagpipe.errors import StoreError
from bagpipe.optimizers import SGD
from bagpipe.server.client import RemoteStore
from bagpipe.server.staging import peer_of
from bagpipe.server.told import StartedServer
from bagpipe.train.report import SilentReporter
from bagpipe.train.trainer import train as train_run
from bagpipe.types import group_tables

OPTIMIZER = SGD(lr=0.5)
GROUPS = group_tables(make_tables(), OPTIMIZER)


def server_of(tables: ServedTables) -> int:
    """The process of this host's server."""
    return peer_of(tables.holds[0])[0]


def test_uneven_hosts_with_a_server_each_equal_one_trainer_to_the_bit() -> None:
    """They reach each other's servers by TLS. Any rank reads all rows, for itself."""
    batches = make_batches(10)

    def work(communicator: Communicator) -> list[np.ndarray]:
        embeddings = EmbeddingBagCollection(
            make_tables(), optimizer=OPTIMIZER, seed=11, communicator=communicator
        )
        assert all(isinstance(store, RemoteStore) for store in embeddings.stores)
        sizes = {"cache": [60, 40], "replicas": [400, 50], "lookahead": 3}
        plain(
            Trainer(embeddings=embeddings, loss=linear_loss, num_trainers=3, options=sizes), batches
        )
        found = [embeddings.tables()[name][:].numpy() for name in ("wide", "narrow")]
        communicator.barrier("waiting for all to have read")
        embeddings.close()
        return found

    expected = train(make_tables(), OPTIMIZER, batches, [(1, 10)], lookahead=3)
    for found in run_ranks(3, work, num_hosts=2, with_servers=True):
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other[:, : one.shape[1]])


def test_tables_are_apart_from_others_and_their_server_ends_with_the_last_who_has_them_open() -> (
    None
):
    pids: list[int] = []

    def work(communicator: Communicator) -> None:
        first, second = (ServedTables(communicator, GROUPS, 11) for _ in range(2))
        rows = np.array([3, 7])
        ones = np.ones((2, GROUPS[0].record_width), np.float32)
        if communicator.rank == 0:
            pids.extend(map(server_of, (first, second)))
            first.stores[0].write(rows, ones)
            first.close()
        communicator.barrier("waiting for rank 0 to have closed")
        if communicator.rank == 1:
            found = np.empty_like(ones)
            first.stores[0].fetch(rows, found)
            np.testing.assert_array_equal(found, ones)
            second.stores[0].fetch(rows, found)
            assert not np.array_equal(found, ones)
            first.close()
            wait_until(lambda: not is_alive(pids[0]))
            assert is_alive(pids[1])
        communicator.barrier("waiting for rank 1 to have read")
        second.close()

    run_ranks(2, work, with_servers=True)
    wait_until(lambda: not is_alive(pids[1]))


def test_a_server_that_was_killed_is_told_by_all_who_ask_it() -> None:
    def work(communicator: Communicator) -> None:
        tables = ServedTables(communicator, GROUPS, 11)
        if communicator.rank == 0:
            os.kill(server_of(tables), signal.SIGKILL)
        communicator.barrier("waiting for the kill")
        out = np.empty((1, GROUPS[0].record_width), np.float32)
        with pytest.raises(StoreError, match=f"shard server 0 of 1 .* of rank {communicator.rank}"):
            tables.stores[0].fetch(np.array([3]), out)
        tables.close()

    run_ranks(2, work, with_servers=True)


def test_a_run_of_one_trainer_leaves_no_server_to_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []

    def note(*of: Any, **options: Any) -> Sequence[StartedServer]:
        servers = servers_of_hosts(*of, **options)
        assert servers[0].hold is not None
        started.append(peer_of(servers[0].hold)[0])
        return servers

    monkeypatch.setattr("bagpipe.train.servers.servers_of_hosts", note)
    config = small_config(tmp_path, servers={}, train={"steps": 2})
    train_run(config, reporter=SilentReporter())
    (server,) = started
    wait_until(lambda: not is_alive(server))
