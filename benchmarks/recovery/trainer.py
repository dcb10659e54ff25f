"""A trainer of `recovery`: trains as `bagpipe train --resume` does, and notes when it did what."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from bagpipe.config.load import load_config
from bagpipe.config.run import RunConfig
from bagpipe.embeddings.batches import Lookahead
from bagpipe.launch.torchrun import joined_trainers
from bagpipe.native.workers import Workers
from bagpipe.server.control import ServerControl
from bagpipe.store.base import EmbeddingStore
from bagpipe.train.loop import Loop
from bagpipe.train.report import SilentReporter
from bagpipe.train.trainer import train
from benchmarks.recovery.settings import Event

_FILL_ROWS = 1 << 16
_FILL_THREADS = min(8, os.cpu_count() or 1)


class Teller:
    """Appends events to a file that all trainers write."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rank = int(os.environ.get("RANK", "0"))

    def tell(self, name: str, step: int = -1) -> None:
        """Notes that `name` is so from now on."""
        event = Event(name=name, at_s=time.monotonic(), pid=os.getpid(), rank=self._rank, step=step)
        with self._path.open("a") as file:
            file.write(json.dumps(asdict(event)) + "\n")


class _TellingReporter(SilentReporter):
    def __init__(self, teller: Teller) -> None:
        self._teller = teller

    def advance(self, step: int) -> None:
        self._teller.tell("step", step)


def main() -> None:
    """Trains the run of a file until it is killed: `FILE EVENTS`."""
    teller = Teller(Path(sys.argv[2]))
    teller.tell("up")
    config = load_config(RunConfig, Path(sys.argv[1]), [])
    with ExitStack() as stack:
        peers = stack.enter_context(joined_trainers(config.train.wait_timeout_s))
        stack.enter_context(_told(teller, ServerControl, "begin", "met", "begin"))
        stack.enter_context(_told(teller, Lookahead, "__next__", None, "batch"))
        stack.enter_context(_filled_before(teller, Loop))
        train(config, reporter=_TellingReporter(teller), resume=True, peers=peers)


@contextmanager
def _told(
    teller: Teller, kind: type, method: str, before: str | None, after: str
) -> Iterator[None]:
    """Tells of the first call of a method."""
    original = getattr(kind, method)
    is_told = False

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal is_told
        if is_told:
            return original(self, *arguments, **options)
        is_told = True
        if before is not None:
            teller.tell(before)
        result = original(self, *arguments, **options)
        teller.tell(after)
        return result

    with mock.patch.object(kind, method, call):
        yield


@contextmanager
def _filled_before(teller: Teller, loop: type[Loop]) -> Iterator[None]:
    """Lets rank 0 write every row before the run's first step; the others wait in that step."""
    original = loop.run

    def run(self: Loop, ready: Callable[[], None]) -> Any:
        if self.parts.embeddings.step == 0 and self.trainers.is_first:
            teller.tell("filling")
            for store in self.parts.embeddings.stores:
                _fill(store)
            teller.tell("filled")
        return original(self, ready)

    with mock.patch.object(loop, "run", run):
        yield


def _fill(store: EmbeddingStore) -> None:
    group = store.group

    def write(begin: int) -> None:
        rows = np.arange(begin, min(begin + _FILL_ROWS, group.num_rows))
        store.write(rows, np.full((len(rows), group.record_width), 0.01, np.float32))

    with Workers("fill", _FILL_THREADS) as workers:
        calls = [workers.submit(write, begin) for begin in range(0, group.num_rows, _FILL_ROWS)]
        for call in calls:
            call.result()


if __name__ == "__main__":
    main()
