"""What tests of one shard share: a store that can be held up, and its checkpoints."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.soon import TIMEOUT_S
from tests.store_contract import SEED, make_group

from bagpipe.errors import StoreError
from bagpipe.server.shard import Checkpoint
from bagpipe.store import MemoryStore
from bagpipe.store.cuts import CutStore
from bagpipe.store.record_files import RecordFile
from bagpipe.types import Float32Array, Int64Array


class HeldStore(CutStore):
    """Writes wait until `go_on` is set; `is_reached` says that one is there.

    So does going back to a checkpoint "slow". One "damaged" can't be read.
    """

    def __init__(self) -> None:
        super().__init__(MemoryStore(make_group(), SEED))
        self.is_reached, self.go_on = threading.Event(), threading.Event()

    def write(self, rows: Int64Array, records: Float32Array) -> None:
        self.is_reached.set()
        assert self.go_on.wait(TIMEOUT_S)
        super().write(rows, records)

    def put_back(
        self,
        folder: Path,
        files: Iterable[RecordFile],
        check: Callable[[], None] = lambda: None,
    ) -> int:
        if folder.name == "slow":
            self.is_reached.set()
            while not self.go_on.wait(0.01):
                check()
        if folder.name == "damaged":
            raise StoreError("can't be read")
        return super().put_back(folder, ())


def checkpoint_at(folder: Path, *files: RecordFile, name: str = "0.9") -> Checkpoint:
    return Checkpoint(name=name, folder=folder, files=(files,))
