"""Several trainers on shard servers: fences, marks, epochs and instances, cuts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
from tests.server.asked import ALL, asked, is_waiting, raised
from tests.server.serving import Servers
from tests.soon import SOON_S
from tests.store_contract import fetch, initial, make_group, records_of, rows_of, touched_rows

from bagpipe.optimizers import Adagrad
from bagpipe.server.client import ShardServers
from bagpipe.server.shard import Checkpoint
from bagpipe.store import MemoryStore, Steps
from bagpipe.store.record_files import next_files
from bagpipe.types import TableConfig, group_tables

# ----------------------------------------------------------------------------- marks and fences


def test_rows_of_another_rank_are_read_once_all_ranks_have_marked(
    servers: Servers, pool: ThreadPoolExecutor
) -> None:
    first, second = servers.start(2)
    wait, out = asked(second, ALL, Steps(overlapped=1, urgent=0))
    waiting = pool.submit(wait)
    sent = first.stores[0].send(ALL, records_of(ALL, salt=0.5))
    first.mark(Steps(overlapped=1, urgent=0))  # can't overtake what was sent
    assert is_waiting(waiting)  # for the own rank, too
    second.mark(Steps(overlapped=1, urgent=0))
    waiting.result(SOON_S)
    sent()
    np.testing.assert_array_equal(out, records_of(ALL, salt=0.5))


def test_a_fetch_that_waits_holds_up_no_other(servers: Servers, pool: ThreadPoolExecutor) -> None:
    """Neither one without a fence, nor writes, however many rows wait."""
    first, second = servers.start(2)
    many = np.tile(ALL, 300)
    waits = [asked(first, many, Steps(urgent=3))[0]]
    np.testing.assert_array_equal(fetch(first.stores[0], ALL), initial(make_group(), ALL))
    waits += [asked(first, many, Steps(urgent=3))[0] for _ in range(5)]  # asking never blocks
    first.stores[0].write(ALL, records_of(ALL))
    for trainer in (first, second):
        trainer.mark(Steps(urgent=3))
    for wait in waits:
        pool.submit(wait).result(SOON_S)


def test_many_threads_of_two_ranks_read_and_write(
    servers: Servers, pool: ThreadPoolExecutor
) -> None:
    trainers = servers.start(2)

    def work(thread: int) -> None:
        store = trainers[thread % 2].stores[0]
        rows = np.arange(thread, 1_300, 6)
        for salt in range(10):
            store.write(rows, records_of(rows, salt))
            np.testing.assert_array_equal(fetch(store, rows), records_of(rows, salt))

    for future in [pool.submit(work, thread) for thread in range(6)]:
        future.result(SOON_S)
    assert touched_rows(trainers[0].stores[0]) == ALL.tolist()
    np.testing.assert_array_equal(fetch(trainers[1].stores[0], ALL), records_of(ALL, 9))


def test_records_of_many_pieces_of_two_groups_equal_those_of_memory_stores() -> None:
    """Calls of several messages each, in both directions, and a record of 1 word."""
    tables = [
        TableConfig(name="a", num_embeddings=40_000, embedding_dim=32, feature_names=["a"]),
        TableConfig(name="b", num_embeddings=300_000, embedding_dim=1, feature_names=["b"]),
    ]
    groups = group_tables(tables, Adagrad(lr=0.1))
    with closing(Servers(groups, 3, 2)) as servers:
        (trainer,) = servers.start()
        rng = np.random.default_rng(0)
        for store, group in zip(trainer.stores, groups, strict=True):
            peer = MemoryStore(group, 3)
            rows = rng.permutation(group.num_rows)[: group.num_rows // 2]
            records = rng.random((len(rows), group.record_width), np.float32)
            for each in (store, peer):
                each.write(rows, records)
            everything = rng.permutation(group.num_rows)
            np.testing.assert_array_equal(fetch(store, everything), fetch(peer, everything))
            found, expected = (list(each.snapshot(10**6)) for each in (store, peer))
            for part in (0, 1):
                np.testing.assert_array_equal(
                    np.concatenate([block[part] for block in found]), expected[0][part]
                )


# ---------------------------------------------------------------------------- epochs, instances


def test_a_zombie_is_told_that_its_epoch_is_over_and_changes_nothing(servers: Servers) -> None:
    (zombie,) = servers.start()
    waiting, _ = asked(zombie, ALL, Steps(urgent=1))
    (trainer,) = servers.start()
    for call in (waiting, lambda: zombie.stores[0].write(ALL, records_of(ALL))):
        message = raised(call)
        assert "shard server" in message
        assert f"at {servers.addresses[0][:10]}" in message
        assert f"of rank 0 in epoch {servers.epoch - 1}:" in message
        assert f"epoch {servers.epoch - 1} is not served" in message
        assert "start all trainers again" in message
    assert list(trainer.stores[0].snapshot()) == []
    np.testing.assert_array_equal(fetch(trainer.stores[0], ALL), initial(make_group(), ALL))


def test_after_a_failure_every_call_raises_its_reason(servers: Servers) -> None:
    (zombie,) = servers.start()
    servers.start()
    reason = raised(lambda: zombie.stores[0].write(ALL, records_of(ALL)))
    for call in (
        lambda: fetch(zombie.stores[0], ALL),
        lambda: zombie.mark(Steps(urgent=9)),
        lambda: list(zombie.stores[0].snapshot()),
        lambda: zombie.stores[0].clear(),
    ):
        assert raised(call) == reason


def test_a_rank_has_one_client_an_epoch(servers: Servers) -> None:
    (trainer,) = servers.start()
    trainer.mark(Steps(urgent=1))
    trainer.stores[0].write(rows_of(1), records_of(rows_of(1)))
    instances = servers.control.begin(servers.epoch + 1, 1)
    servers.epoch += 1
    first, second = (
        ShardServers(servers.control, servers.groups, servers.epoch, instances) for _ in range(2)
    )
    servers.clients += [first, second]
    first.stores[0].write(ALL, records_of(ALL))
    message = raised(lambda: second.stores[0].write(ALL, records_of(ALL, salt=0.5)))
    assert f"rank 0 has had its stream of writes in epoch {servers.epoch}" in message
    np.testing.assert_array_equal(fetch(first.stores[0], ALL), records_of(ALL))


def test_an_epoch_that_is_not_above_all_before_it_can_not_begin(servers: Servers) -> None:
    servers.start()
    message = raised(lambda: servers.control.begin(servers.epoch, 1))
    assert "shard server 0 of 3 at 127.0.0.1:" in message
    assert f"epoch {servers.epoch} can't begin" in message


def test_another_instance_is_refused(servers: Servers) -> None:
    """As of a server that was restarted at its old address, and has begun this very epoch."""
    servers.start()
    instances = ["ab" * 16] * 3
    servers.control.begin(servers.epoch + 1, 1)
    servers.epoch += 1
    late = ShardServers(servers.control, servers.groups, servers.epoch, instances)
    servers.clients.append(late)
    assert "speaks to another life of this server, which was restarted" in raised(
        lambda: fetch(late.stores[0], ALL)
    )


# ------------------------------------------------------------------------------------------ cuts


def test_cuts_go_to_files_from_which_a_new_epoch_starts(servers: Servers, tmp_path: Path) -> None:
    (trainer,) = servers.start()
    store, epoch = trainer.stores[0], servers.epoch
    store.write(ALL[:700], records_of(ALL[:700]))
    written = servers.control.cut(1, tmp_path)
    store.write(ALL[600:900], records_of(ALL[600:900], salt=0.5))  # is not in it
    ((*files,),) = written()
    assert len(files) == 3
    assert sum(file.num_records or 0 for file in files) == 700
    assert servers.control.committed(1)
    assert servers.control.cut(2, tmp_path)
    servers.control.abandon(2)
    ((*more,),) = servers.control.cut(3, tmp_path)()
    assert not servers.control.committed(2)
    base = Checkpoint(name=f"{epoch}.1", folder=tmp_path, files=(next_files([], files),))
    both = Checkpoint(name=f"{epoch}.3", folder=tmp_path, files=(next_files(files, more),))
    for checkpoint, num_rows in ((base, 700), (both, 900)):
        servers.epoch += 1
        instances = servers.control.begin(servers.epoch, 1, checkpoint)
        with ShardServers(servers.control, servers.groups, servers.epoch, instances) as trainer:
            expected = records_of(ALL[:num_rows])
            if checkpoint is both:
                expected[600:] = records_of(ALL[600:900], salt=0.5)
            found = list(trainer.stores[0].snapshot(10**6))
            np.testing.assert_array_equal(
                np.concatenate([rows for rows, _ in found]), ALL[:num_rows]
            )
            np.testing.assert_array_equal(np.concatenate([each for _, each in found]), expected)


def test_a_cut_that_can_not_be_written_names_the_server_and_can_be_abandoned(
    servers: Servers, tmp_path: Path
) -> None:
    (trainer,) = servers.start()
    trainer.stores[0].write(ALL, records_of(ALL))
    written = servers.control.cut(1, tmp_path / "nowhere")
    message = raised(written)
    assert "shard server 0 of 3 at 127.0.0.1:" in message
    assert "can't be written" in message
    servers.control.abandon(1)
    ((*files,),) = servers.control.cut(2, tmp_path)()
    assert sum(file.num_records or 0 for file in files) == 1_300


def test_a_checkpoint_that_can_not_be_read_fails_the_start(
    servers: Servers, tmp_path: Path
) -> None:
    (trainer,) = servers.start()
    trainer.stores[0].write(ALL, records_of(ALL))
    ((*files,),) = servers.control.cut(1, tmp_path)()
    trainer.stores[0].write(ALL, records_of(ALL))
    lost = Checkpoint(name="9.9", folder=tmp_path / "elsewhere", files=(tuple(files),))
    servers.epoch += 1
    message = raised(lambda: servers.control.begin(servers.epoch, 1, lost))
    assert "shard server 0 of 3 at" in message
    assert "can't be read" in message
    servers.start()
