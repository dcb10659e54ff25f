"""The package's own shard and cut store, stepped by the model's server in place of its own.

The clock is simulated and there are no threads, so nothing may block: a fetch is only made once its
fence is met, and a cut's blocks are taken one at a time. Record files are real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tests.model.folder import Cut, Name, Records
from tests.model.shard import CUT_PIECE_ROWS, AnyShard, Header
from tests.model.sim import Failed
from tests.model.traces import GROUP
from tests.model.world import World

from bagpipe.errors import CheckpointError, StoreError
from bagpipe.server import wire
from bagpipe.server.shard import Checkpoint, Shard
from bagpipe.store import MemoryStore
from bagpipe.store.cuts import CutStore
from bagpipe.store.record_files import RecordFile
from bagpipe.types import Float32Array, Int64Array

SEED = 0
Block = tuple[Int64Array, Float32Array]


class SteppedStore(CutStore):
    """Gives a cut's blocks one at a time, and then writes all of them to the file."""

    _blocks_taken: list[Block] | None = None

    def step(self) -> Iterator[Block]:
        taken: list[Block] = []
        assert self._cut is not None
        for block in super()._blocks(self._cut):
            taken.append(block)
            yield block
        self._blocks_taken = taken

    def _blocks(self, cut: object) -> Iterator[Block]:
        assert self._blocks_taken is not None
        return iter(self._blocks_taken)


class RealShard:
    """See `AnyShard`."""

    def __init__(
        self,
        number: int,
        num_shards: int,
        folder: Path,
        store_type: type[SteppedStore],
        shard_type: type[Shard],
    ) -> None:
        """`folder` is where all record files of a case are; their names differ."""
        self.number, self._folder = number, folder
        self._store = store_type(MemoryStore(GROUP, SEED, shard=number, num_shards=num_shards))
        self._store._block_rows = CUT_PIECE_ROWS
        self._shard = shard_type([GROUP], SEED, number, num_shards, [self._store], wait_timeout_s=0)
        self._pieces: Iterator[Block] = iter(())
        self._write: Callable[[Path], tuple[RecordFile, ...]] | None = None

    def begin(
        self, epoch: int, num_ranks: int, checkpoint: Cut | None, *, is_readable: bool
    ) -> str:
        found = None
        if checkpoint is not None:
            name = "{}.{}".format(*checkpoint.name)
            found = Checkpoint(
                name=name,
                folder=self._folder if is_readable else self._folder / "nowhere",
                files=(checkpoint.record_files,),
            )
        with refusals():
            return self._shard.begin(epoch, num_ranks, found, run="run")

    def check(self, header: Header) -> None:
        with refusals():
            self._shard.serving.check_header(on_wire(header))

    def claim_writes(self, header: Header) -> None:
        with refusals():
            self._shard.claim_writes(on_wire(header))

    def write(self, header: Header, rows: list[int], values: list[int]) -> None:
        with refusals():
            if rows:
                records = np.array(values, np.float32).reshape(-1, 1)
                self._shard.write(on_wire(header), np.array(rows, np.int64), records)
            else:
                self._shard.mark(on_wire(header))

    def is_met(self, header: Header) -> bool:
        fence = header.steps.overlapped, header.steps.urgent
        return bool((self._shard.serving._marks >= fence).all())

    def fetch(self, header: Header, rows: list[int]) -> list[int]:
        out = np.empty((len(rows), 1), np.float32)
        with refusals():
            self._shard.fetch(on_wire(header), np.array(rows, np.int64), out)
        return [int(value) for value in out[:, 0]]

    def cut(self, epoch: int, name: Name) -> None:
        with refusals():
            self._write = self._shard.cut(epoch, name[1])
            self._pieces = self._store.step()

    def next_piece(self, name: Name) -> Records:
        if self._shard._cut != "{}.{}".format(*name):
            raise Failed(f"cut {name}: is not in hand")
        with refusals():
            for rows, records in self._pieces:
                if len(rows):
                    values = records[:, 0].astype(np.int64).tolist()
                    return dict(zip(rows.tolist(), values, strict=True))
        return {}

    def record_files(self, name: Name) -> tuple[RecordFile, ...]:
        """Called once all pieces are out."""
        assert self._write is not None
        with refusals():
            return self._write(self._folder)

    def committed(self, epoch: int, name: Name, base: object) -> None:
        with refusals():
            self._shard.committed(epoch, name[1])

    def abandon(self, epoch: int, name: Name) -> None:
        with refusals():
            self._shard.abandon(epoch, name[1])


def on_wire(header: Header) -> wire.Header:
    return wire.Header(
        what=wire.What.WRITE,
        epoch=header.epoch,
        instance=header.instance,
        rank=header.rank,
        steps=header.steps,
    )


@contextmanager
def refusals() -> Iterator[None]:
    try:
        yield
    except (StoreError, CheckpointError) as error:
        raise Failed(str(error)) from error


def real_shard(
    folder: Path, store_type: type[SteppedStore] = SteppedStore, shard_type: type[Shard] = Shard
) -> Callable[[World, int, int], AnyShard]:
    """Makes the package's shards, or some with a planted mistake, whose files are in a folder."""
    return lambda world, number, instance: RealShard(
        number, world.num_shards, folder, store_type, shard_type
    )
