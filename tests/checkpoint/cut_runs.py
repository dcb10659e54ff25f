"""A run whose records shards write, as rank 0 sees it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tests.checkpoint.test_checkpoints import CONFIG, make_state
from tests.server.shards import header_of, own_rows
from tests.store_contract import SEED

from bagpipe.checkpoint.checkpoints import (
    SavedRun,
    find_checkpoint,
    load_checkpoint,
    open_checkpoint,
    read_checkpoint,
    take_moment,
)
from bagpipe.checkpoint.cuts import add_cut
from bagpipe.checkpoint.epochs import RunFolder, claim_epoch
from bagpipe.checkpoint.files import CheckpointWriter, prune
from bagpipe.data.base import Position
from bagpipe.errors import CheckpointError
from bagpipe.server.shard import Checkpoint, Shard
from bagpipe.store import MemoryStore
from bagpipe.store.cuts import CutStore

NUM_ROWS = 100
Records = dict[int, tuple[float, ...]]


def make_servers(num_shards: int) -> list[Shard]:
    groups = make_state(2, 4).embeddings.groups
    return [
        Shard(
            groups,
            SEED,
            number,
            num_shards,
            [
                CutStore(MemoryStore(group, SEED, shard=number, num_shards=num_shards))
                for group in groups
            ],
        )
        for number in range(num_shards)
    ]


class Run:
    """Rank 0 and the servers of a run, and what their records must be."""

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self.path, self.checkpoints, self.keep = folder, folder / "checkpoints", keep
        self.state = make_state(2, 4)
        self.groups = self.state.embeddings.groups
        self.records: list[Records] = [{}, {}]
        self.base: SavedRun | None = None
        self.number = self.salt = 0
        self.servers: list[Shard] = []
        self.folder: RunFolder

    def start(self, servers: list[Shard], records: Sequence[Records] = ({}, {})) -> None:
        """As all starts: from the newest checkpoint, which holds `records`."""
        self.folder = claim_epoch(self.path)
        self.base = find_checkpoint(self.checkpoints, on_damaged=pytest.fail)
        base = self.base
        checkpoint = base and Checkpoint(
            name=base.cut, folder=base.path, files=tuple(map(tuple, base.record_files))
        )
        self.servers, self.number = servers, 0
        for server in servers:
            server.begin(self.folder.epoch, 1, checkpoint)
        self.state.embeddings.step = base.step if base else 0
        self.records = [dict(of_group) for of_group in records]
        self.check()

    def write(self, rows: Sequence[int]) -> None:
        self.salt += 1
        self.state.embeddings.step += 1
        for index, group in enumerate(self.groups):
            records = np.array(rows, np.float32)[:, None] + np.float32(self.salt * 1000)
            records = np.repeat(records, group.record_width, axis=1)
            for server in self.servers:
                is_own = np.isin(rows, own_rows(server, of=NUM_ROWS))
                header = header_of(server, self.folder.epoch, group=index)
                server.write(header, np.array(rows, np.int64)[is_own], records[is_own])
            self.records[index].update(zip(rows, map(tuple, records.tolist()), strict=True))

    def cut(self, beside: Sequence[int] = ()) -> SavedRun:
        """A checkpoint, while `beside` is written."""
        self.number += 1
        step, as_of = self.state.embeddings.step, [dict(of_group) for of_group in self.records]
        try:
            with CheckpointWriter(self.folder, step, str(self.number)) as writer:
                writes = [server.cut(self.folder.epoch, self.number) for server in self.servers]
                moment = take_moment(self.state, Position(epoch=0, batch=self.salt), CONFIG)
                if beside:
                    self.write(beside)
                written = [write(writer.folder) for write in writes]
                name = f"{self.folder.epoch}.{self.number}"
                add_cut(writer, name, moment, self.groups, written, self.base)
        except CheckpointError:
            for server in self.servers:
                server.abandon(self.folder.epoch, self.number)
            raise
        prune(self.folder, newest=step, keep=self.keep, say=pytest.fail)
        self.base = read_checkpoint(writer.path)
        for server in self.servers:
            assert server.committed(self.folder.epoch, self.number)
        self.saved = as_of
        return self.base

    def check(self) -> None:
        found: list[Records] = [{}, {}]
        for index in range(2):
            for server in self.servers:
                for rows, records in server.snapshot(
                    header_of(server, self.folder.epoch, group=index)
                ):
                    found[index].update(
                        zip(rows.tolist(), map(tuple, records.tolist()), strict=True)
                    )
        assert found == self.records


def records_in(checkpoint: Path) -> list[Records]:
    """What a trainer without servers loads from it."""
    fresh = make_state(2, 4)
    load_checkpoint(open_checkpoint(checkpoint), fresh)
    return [
        {
            row: tuple(record.tolist())
            for rows, records in store.snapshot()
            for row, record in zip(rows.tolist(), records, strict=True)
        }
        for store in fresh.embeddings.stores
    ]
