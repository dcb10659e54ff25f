"""`bagpipe train` or `bagpipe serve` whose flushes, cuts and recoveries last longer and are told.

They are over in milliseconds otherwise, and no process could be killed within one of them. A flush
is lengthened between two of its blocks; a cut before a server has written its file, and before rank
0 has written what it adds; a recovery before the servers are told to begin, and before one puts its
rows back.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

from bagpipe.cache import transfers
from bagpipe.cache.transfers import RecordMover
from bagpipe.cli.app import app
from bagpipe.server.control import ServerControl
from bagpipe.store.cuts import CutStore
from bagpipe.train import cuts

PHASES = ("flush", "cut", "recovery")
VARIABLE = "PHASES_OF_A_TEST"
"""Names the file where they are told, a line each."""
LASTS_S = 0.4


def main() -> None:
    """What `bagpipe` does with the same arguments."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(transfers, "_FLUSH_BLOCK_BYTES", 4096))
        stack.enter_context(mock.patch.object(RecordMover, "write_all", _flush_slowly))
        for owner, name, phase in (
            (cuts, "add_cut", "cut"),
            (CutStore, "_write_cut", "cut"),
            (ServerControl, "begin", "recovery"),
            (CutStore, "put_back", "recovery"),
        ):
            slow = _told(getattr(owner, name), phase)
            stack.enter_context(mock.patch.object(owner, name, slow))
        app()


def num_told(file: Path, phase: str) -> int:
    """How many phases of that name have begun."""
    return file.read_text().split().count(phase) if file.exists() else 0


def _tell(phase: str) -> None:
    with Path(os.environ[VARIABLE]).open("a") as file:
        file.write(f"{phase}\n")


def _told(work: Callable[..., Any], phase: str) -> Callable[..., Any]:
    """The same, but it tells of itself and waits first."""

    def call(*arguments: Any, **options: Any) -> Any:
        _tell(phase)
        time.sleep(LASTS_S)
        return work(*arguments, **options)

    return call


_write_all = RecordMover.write_all


def _flush_slowly(mover: RecordMover) -> None:
    read, num_read = mover._read, 0

    def read_slowly(*arguments: Any) -> Any:
        nonlocal num_read
        if num_read == 1:  # one block is on its way
            _tell("flush")
            time.sleep(LASTS_S)
        num_read += 1
        return read(*arguments)

    with mock.patch.object(mover, "_read", read_slowly):
        _write_all(mover)


if __name__ == "__main__":
    main()
