"""Tables in this process's memory for trainers that are threads of it, ordered by marks and fences
as shard servers order theirs.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

from tests.soon import TIMEOUT_S

from bagpipe.store import NO_STEPS, EmbeddingStore, MemoryStore, Steps
from bagpipe.types import Float32Array, Group, Int64Array


class Marks:
    """How far each rank has sent what it evicts, in one set of tables."""

    def __init__(self, num_trainers: int) -> None:
        self._marks, self._changed = [NO_STEPS] * num_trainers, threading.Condition()

    def mark(self, rank: int, steps: Steps) -> None:
        with self._changed:
            before = self._marks[rank]
            self._marks[rank] = Steps(
                overlapped=max(before.overlapped, steps.overlapped),
                urgent=max(before.urgent, steps.urgent),
            )
            self._changed.notify_all()

    def wait(self, fence: Steps) -> None:
        def is_open() -> bool:
            return all(
                mark.overlapped >= fence.overlapped and mark.urgent >= fence.urgent
                for mark in self._marks
            )

        with self._changed:
            assert self._changed.wait_for(is_open, TIMEOUT_S), f"{fence}: only {self._marks}"


class OrderedView:
    """One rank's way to a store of all: an `OrderedStore`."""

    def __init__(self, store: EmbeddingStore, rank: int, marks: Marks) -> None:
        self.group, self._store, self._rank, self._marks = store.group, store, rank, marks
        self.write, self.snapshot, self.clear = store.write, store.snapshot, store.clear

    def fetch(self, rows: Int64Array, out: Float32Array) -> None:
        self._store.fetch(rows, out)

    def ask(
        self, rows: Int64Array, out: Float32Array, fence: Steps = NO_STEPS
    ) -> Callable[[], None]:
        def wait() -> None:
            self._marks.wait(fence)
            self._store.fetch(rows, out)

        return wait

    def send(self, rows: Int64Array, records: Float32Array) -> Callable[[], None]:
        self._store.write(rows, records)
        return lambda: None

    def mark(self, steps: Steps) -> None:
        self._marks.mark(self._rank, steps)

    def close(self) -> None:
        """Others read on."""


class TablesOfRanks:
    """Opens tables for the ranks of one run, which open the same ones in the same order."""

    def __init__(self, num_trainers: int) -> None:
        self._lock, self._num_opened = threading.Lock(), Counter[tuple[int, int]]()
        self._marks: defaultdict[int, Marks] = defaultdict(partial(Marks, num_trainers))
        self._stores: dict[tuple[int, int], MemoryStore] = {}

    def __call__(self, peers: Any, groups: Sequence[Group], seed: int) -> Any:
        """As `bagpipe.distributed.communicator.OpenTables`: memory that all ranks share."""
        stores = [
            self._open(peers.rank, group, partial(MemoryStore, group, seed)) for group in groups
        ]
        return SimpleNamespace(stores=stores, close=lambda: None)

    def view(self, rank: int, store: EmbeddingStore) -> OrderedView:
        """A rank's way to a group's store that all ranks name."""
        return self._open(rank, store.group, lambda: store)

    def _open(self, rank: int, group: Group, make: Callable[[], Any]) -> OrderedView:
        with self._lock:
            number = self._num_opened[rank, group.index]
            self._num_opened[rank, group.index] += 1
            key = number, group.index
            if key not in self._stores:
                self._stores[key] = make()
            return OrderedView(self._stores[key], rank, self._marks[number])


def view_of(store: EmbeddingStore, peers: Any) -> EmbeddingStore:
    """A trainer's way to a store of all: the store itself for one alone, who is None."""
    if peers is None or not peers.has_others:
        return store
    return peers.open_tables.view(peers.rank, store)  # type: ignore[no-any-return]
