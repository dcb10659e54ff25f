"""Trainers over stores that order reads and writes themselves give what one trainer with a memory
store gives, to the bit: any rank may own any row, on whatever host it is.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.soon import TIMEOUT_S
from tests.train.equality import smallest_caches
from tests.train.ranks import run_ranks
from tests.train.test_trainers import (
    Loop,
    Trainer,
    assert_equal,
    break_and_go_on,
    flush_in_steps,
    linear_loss,
    make_batches,
    make_tables,
    plain,
    train,
)

from bagpipe.cache.marks import Marks
from bagpipe.distributed.alone import ALONE, Peers
from bagpipe.embeddings.collection import EmbeddingBagCollection
from bagpipe.native.workers import Workers
from bagpipe.optimizers import SGD, Adam, Optimizer
from bagpipe.server.shard import Shard
from bagpipe.server.wire import Header, What
from bagpipe.store import NO_STEPS, MemoryStore, OrderedStore, Steps
from bagpipe.store.cuts import CutStore
from bagpipe.topology import shards_of
from bagpipe.types import Float32Array, Group, Int64Array, group_tables

SEED = 11
BATCHES = make_batches(25, batch_size=8)
TIGHT = {"lookahead": 1, "prefetch_depth": 2}
"""Rows that are evicted are often needed again soon."""


class ShardedStore:
    """One rank's way to one group on several shards, without a network. What is sent comes late, in
    the order in which it was sent, by `stream`.
    """

    num_writes, delay_s = itertools.count(), 0.003

    def __init__(self, group: Group, shards: Sequence[Shard], rank: int, stream: Workers) -> None:
        self.group, self._shards, self._rank, self._stream = group, shards, rank, stream

    def fetch(self, rows: Int64Array, out: Float32Array) -> None:
        self.ask(rows, out)()

    def ask(
        self, rows: Int64Array, out: Float32Array, fence: Steps = NO_STEPS
    ) -> Callable[[], None]:
        def wait() -> None:
            for shard, places in self._parts(rows):
                found = np.empty((len(places), out.shape[1]), np.float32)
                shard.fetch(self._header(shard, What.FETCH, fence), rows[places], found)
                out[places] = found

        return wait

    def write(self, rows: Int64Array, records: Float32Array) -> None:
        self.send(rows, records)()

    def send(self, rows: Int64Array, records: Float32Array) -> Callable[[], None]:
        return self._stream.submit(self._write, rows, records).result

    def mark(self, steps: Steps) -> None:
        self._stream.submit(self._mark, steps)

    def _write(self, rows: Int64Array, records: Float32Array) -> None:
        for shard, places in self._parts(rows):
            time.sleep(next(self.num_writes) % 2 * self.delay_s)
            shard.write(self._header(shard, What.WRITE), rows[places], records[places])

    def _mark(self, steps: Steps) -> None:
        for shard in self._shards:
            shard.mark(self._header(shard, What.WRITE, steps))

    def snapshot(self, block_rows: int = 65_536) -> Iterator[tuple[Int64Array, Float32Array]]:
        raise NotImplementedError

    def clear(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """The shards serve others."""

    def _parts(self, rows: Int64Array) -> Iterator[tuple[Shard, Int64Array]]:
        numbers = shards_of(rows, len(self._shards))
        for shard in self._shards:
            yield shard, np.flatnonzero(numbers == shard.number)

    def _header(self, shard: Shard, what: What, steps: Steps = NO_STEPS) -> Header:
        return Header(
            what=what,
            epoch=1,
            instance=shard.instance,
            rank=self._rank,
            group=self.group.index,
            steps=steps,
        )


def make_shards(groups: Sequence[Group], num_shards: int, num_trainers: int) -> list[Shard]:
    shards = [
        Shard(
            groups,
            SEED,
            number,
            num_shards,
            [
                CutStore(MemoryStore(group, SEED, shard=number, num_shards=num_shards))
                for group in groups
            ],
            wait_timeout_s=TIMEOUT_S,
        )
        for number in range(num_shards)
    ]
    for shard in shards:
        shard.begin(1, num_trainers)
    return shards


def train_on_shards(
    optimizer: Optimizer,
    *,
    num_trainers: int,
    num_shards: int,
    num_hosts: int = 1,
    loop: Loop = plain,
    check: bool = False,
) -> list[np.ndarray]:
    """All weights at the end, by group."""
    tables = make_tables()
    groups = group_tables(tables, optimizer)
    shards = make_shards(groups, num_shards, num_trainers)

    def work(peers: Peers) -> list[np.ndarray]:
        stream = Workers("stream")
        embeddings = EmbeddingBagCollection(
            tables,
            optimizer=optimizer,
            seed=SEED,
            store=lambda group, _: ShardedStore(group, shards, peers.rank, stream),
            communicator=peers,
        )
        assert all(isinstance(store, OrderedStore) for store in embeddings.stores)
        slots = [-(-slots // num_trainers) for slots in smallest_caches(groups, BATCHES)]
        sizes = {"cache": slots, "replicas": [group.num_rows for group in groups], "check": check}
        trainer = Trainer(
            embeddings=embeddings,
            loss=linear_loss,
            num_trainers=num_trainers,
            options=sizes | TIGHT,
        )
        loop(trainer, BATCHES)
        # each for itself, also where records of several hosts would have to be asked for together
        if peers.rank > 0:
            return []
        return [
            torch.cat([embeddings.tables()[table.name][:] for table in group.tables]).numpy()
            for group in groups
        ]

    if num_trainers == 1:
        return work(ALONE)
    return next(filter(None, run_ranks(num_trainers, work, num_hosts=num_hosts)))


def weights(optimizer: Optimizer, **options: Any) -> list[np.ndarray]:
    """What one trainer with memory stores gives."""
    records = train(make_tables(), optimizer, BATCHES, [(1, len(BATCHES))], **TIGHT, **options)
    groups = group_tables(make_tables(), optimizer)
    return [each[:, : group.embedding_dim] for group, each in zip(groups, records, strict=True)]


@pytest.mark.parametrize(
    ("num_trainers", "num_shards", "num_hosts", "optimizer"),
    [
        (1, 3, 1, Adam(lr=0.05)),
        (2, 1, 1, SGD(lr=0.5)),
        (3, 7, 1, Adam(lr=0.05)),
        (4, 3, 2, SGD(lr=0.5)),
    ],
)
def test_any_trainers_over_any_shards_equal_one_over_memory(
    num_trainers: int, num_shards: int, num_hosts: int, optimizer: Optimizer
) -> None:
    found = train_on_shards(
        optimizer,
        num_trainers=num_trainers,
        num_shards=num_shards,
        num_hosts=num_hosts,
        check=True,
    )
    assert_equal(found, weights(optimizer))


@pytest.mark.parametrize("loop", [break_and_go_on, flush_in_steps])
@pytest.mark.parametrize("num_trainers", [1, 3])
def test_streams_that_follow_each_other(loop: Loop, num_trainers: int) -> None:
    found = train_on_shards(SGD(lr=0.5), num_trainers=num_trainers, num_shards=2, loop=loop)
    assert_equal(found, weights(SGD(lr=0.5), loop=loop))


def ask_without_fence(monkeypatch: pytest.MonkeyPatch) -> None:
    original = ShardedStore.ask
    monkeypatch.setattr(
        ShardedStore, "ask", lambda store, rows, out, fence=NO_STEPS: original(store, rows, out)
    )


def mark_before_what_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShardedStore, "mark", ShardedStore._mark)


@pytest.mark.parametrize("fault", [None, ask_without_fence, mark_before_what_was_sent])
def test_a_row_that_another_rank_has_evicted_is_read_once_it_is_written(
    fault: Callable[[pytest.MonkeyPatch], None] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = weights(SGD(lr=0.5))
    if fault is not None:
        fault(monkeypatch)
    # whether a mistake tells is a matter of time: a busy machine needs longer delays
    for delay_s in (0.03,) if fault is None else (0.03, 0.03, 0.1, 0.3, 1.0):
        monkeypatch.setattr(ShardedStore, "delay_s", delay_s)
        found = train_on_shards(SGD(lr=0.5), num_trainers=3, num_shards=2)
        is_equal = all(map(np.array_equal, found, expected))
        if not is_equal:
            break
    assert is_equal == (fault is None)


def test_what_a_stream_has_marked_says_nothing_of_the_next_ones_steps() -> None:
    marked = list[Steps]()
    store: Any = SimpleNamespace(mark=marked.append)
    first, second = Marks(store, 1), Marks(store, 2)
    first.mark("overlapped", 9)
    first.mark("urgent", 7)
    second.mark("overlapped", 8)
    fence = second.fence(Steps(overlapped=8, urgent=0))
    assert marked[2] == Steps(overlapped=fence.overlapped)
    assert fence.overlapped > marked[0].overlapped
    assert fence.urgent > marked[1].urgent
    assert second.fence(NO_STEPS) == NO_STEPS
