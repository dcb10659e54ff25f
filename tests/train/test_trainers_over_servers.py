"""Several trainers whose tables are with shard servers equal one trainer with a memory store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager

import numpy as np
import pytest
import torch
from tests.server.serving import Servers
from tests.train.equality import OPTIMIZERS
from tests.train.ranks import run_ranks
from tests.train.test_trainers import (
    Loop,
    Trainer,
    all_records,
    linear_loss,
    make_batches,
    make_tables,
    plain,
    train,
)

from bagpipe.distributed.communicator import Communicator
from bagpipe.embeddings.collection import EmbeddingBagCollection
from bagpipe.optimizers import SGD, Adam, Optimizer
from bagpipe.server import wire
from bagpipe.server.channels import StagingChannel
from bagpipe.server.client import ShardServers
from bagpipe.server.parts import Part
from bagpipe.server.wire import Header, What
from bagpipe.types import Jagged, TableConfig, group_tables

SEED, NUM_BATCHES = 11, 14


@contextmanager
def serving(
    tables: Sequence[TableConfig], optimizer: Optimizer, num_shards: int
) -> Iterator[Servers]:
    with closing(Servers(group_tables(tables, optimizer), SEED, num_shards)) as servers:
        yield servers


def train_over(
    servers: Servers,
    tables: Sequence[TableConfig],
    optimizer: Optimizer,
    batches: Sequence[Jagged],
    num_trainers: int,
    num_hosts: int,
    *,
    loop: Loop = plain,
) -> list[np.ndarray]:
    """All records at the end, by group, as another start reads them."""
    groups, clients = servers.groups, servers.start(num_trainers)
    sizes = {"cache": [90, 60], "replicas": [group.num_rows for group in groups], "lookahead": 3}

    def work(communicator: Communicator | None) -> None:
        own: ShardServers = clients[communicator.rank if communicator else 0]
        loop(
            Trainer(
                embeddings=EmbeddingBagCollection(
                    tables,
                    optimizer=optimizer,
                    store=lambda group, _: own.stores[group.index],
                    communicator=communicator,
                ),
                loss=linear_loss,
                num_trainers=num_trainers,
                options=sizes,
            ),
            batches,
        )

    if num_trainers == 1:
        work(None)
    else:
        run_ranks(num_trainers, work, num_hosts=num_hosts)
    return [
        all_records(group, store) for group, store in zip(groups, clients[0].stores, strict=True)
    ]


def assert_equal(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: type(optimizer).__name__)
@pytest.mark.parametrize(
    ("num_trainers", "num_hosts", "num_shards"), [(1, 1, 2), (2, 1, 3), (3, 1, 1), (4, 2, 3)]
)
def test_they_equal_one_trainer_to_the_bit_where_sums_are_exact(
    optimizer: Optimizer, num_trainers: int, num_hosts: int, num_shards: int
) -> None:
    batches = make_batches(NUM_BATCHES)
    expected = train(make_tables(), optimizer, batches, [(1, NUM_BATCHES)], lookahead=3)
    with serving(make_tables(), optimizer, num_shards) as servers:
        found = train_over(servers, make_tables(), optimizer, batches, num_trainers, num_hosts)
    assert_equal(found, expected)


def test_any_rank_may_own_any_row_whatever_host_it_is_on() -> None:
    """Of eight hosts each would own an eighth of the rows; the caches of one of them are small."""
    batches = make_batches(NUM_BATCHES)
    expected = train(make_tables(), SGD(lr=0.5), batches, [(1, NUM_BATCHES)], lookahead=3)
    with serving(make_tables(), SGD(lr=0.5), 2) as servers:
        found = train_over(servers, make_tables(), SGD(lr=0.5), batches, 8, 8)
    assert_equal(found, expected)


@pytest.mark.parametrize(("num_trainers", "num_hosts"), [(2, 1), (2, 2)])
def test_each_rank_reads_for_itself_in_an_evaluation(num_trainers: int, num_hosts: int) -> None:
    """Rank 1 alone reads, in the middle of training, on another host too."""
    batches = make_batches(NUM_BATCHES)
    read: dict[int, list[torch.Tensor]] = {}

    def evaluate(trainer: Trainer, batches: Sequence[Jagged]) -> None:
        rank = trainer.embeddings.peers.rank
        with trainer.stream(batches) as stream:
            for step, loss in trainer.losses(stream):
                loss.backward()
                if step == 6:
                    stream.flush()
                    trainer.embeddings.eval()
                    if rank == trainer.num_trainers - 1:
                        read[trainer.num_trainers] = trainer.embeddings(batches[9]).groups
                    trainer.embeddings.train()
                    trainer.embeddings.peers.barrier("reading")

    optimizer = Adam(lr=0.05)
    train(make_tables(), optimizer, batches, [(1, NUM_BATCHES)], lookahead=3, loop=evaluate)
    with serving(make_tables(), optimizer, 2) as servers:
        train_over(
            servers, make_tables(), optimizer, batches, num_trainers, num_hosts, loop=evaluate
        )
    for one, other in zip(read[1], read[num_trainers], strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=0)


def test_records_come_and_go_without_a_copy_on_the_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From one server of the own host, over any number of streams of batches."""
    in_memory: dict[What, list[bool]] = {What.FETCH: [], What.WRITE: []}
    write = StagingChannel.write

    def noted(channel: StagingChannel, part: Part, header: Header) -> None:
        if part.run is not None:  # else it is a mark
            in_memory[header.what].append(channel._memory.offset_of(part.run) is not None)
        write(channel, part, header)

    monkeypatch.setattr(StagingChannel, "write", noted)
    tables, optimizer = make_tables(), SGD(lr=0.5)
    with serving(tables, optimizer, 1) as servers:
        (own,) = servers.start()
        assert own.memory is not None
        embeddings = EmbeddingBagCollection(
            tables, optimizer=optimizer, store=lambda group, _: own.stores[group.index]
        )
        for _ in range(2):
            options = {"cache": [90, 60], "lookahead": 3}
            plain(
                Trainer(embeddings=embeddings, loss=linear_loss, num_trainers=1, options=options),
                make_batches(4),
            )
        free = sum(size * len(begins) for size, begins in own.memory._free.items())
        assert free == own.memory._end > 0
    assert all(in_memory.values())
    assert all(all(each) for each in in_memory.values())


def test_records_in_shared_memory_are_sent_in_messages_of_any_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those elsewhere go by blocks of that memory, so their messages are small."""
    sent = list[int]()
    write = StagingChannel.write

    def noted(channel: StagingChannel, part: Part, header: Header) -> None:
        sent.append(part.num_rows)
        write(channel, part, header)

    monkeypatch.setattr(StagingChannel, "write", noted)
    monkeypatch.setattr(wire, "piece_rows", lambda _: 4)
    tables, optimizer = make_tables(), SGD(lr=0.5)
    with serving(tables, optimizer, 1) as servers:
        (own,) = servers.start()
        assert own.memory is not None
        store, rows = own.stores[0], np.arange(10)
        shared = own.memory.take(10, store.group.record_width)
        shared[:] = 1.5
        store.write(rows, shared)
        assert sent == [10]
        store.write(rows[::-1].copy(), 2 * shared)
        assert sent == [10, 4, 4, 2]
        store.fetch(rows, shared)
        assert (shared == 3).all()


def test_an_ended_epoch_ends_its_trainers() -> None:
    """Newer trainers take the run over; the old ones end, and change nothing."""
    batches, optimizer = make_batches(NUM_BATCHES), SGD(lr=0.5)
    expected = train(make_tables(), optimizer, batches, [(1, NUM_BATCHES)], lookahead=3)
    with serving(make_tables(), optimizer, 2) as servers:

        def taken_over(trainer: Trainer, batches: Sequence[Jagged]) -> None:
            with trainer.stream(batches) as stream:
                for step, loss in trainer.losses(stream):
                    loss.backward()
                    if step == 5:
                        servers.epoch += 1
                        servers.control.begin(servers.epoch, 1)

        with pytest.raises(Exception, match=r"epoch 2 has|epoch 1 has ended|epoch"):
            train_over(servers, make_tables(), optimizer, batches, 1, 1, loop=taken_over)
        found = train_over(servers, make_tables(), optimizer, batches, 1, 1)
    assert_equal(found, expected)
