"""Marks by which the ranks of a host know what the others have written back to their store."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, TypeAlias

from bagpipe.distributed.waiting import KeyWaiter, naming_failures

Moment: TypeAlias = Literal["urgent", "overlapped"]
"""Whether something is on the critical path or travels behind compute."""
_KEPT_MARKS = 1024
"""Steps whose marks stay in the key-value store; the newest one stands for all before it."""


class WriteMarks:
    """One rank's marks in the key-value store, and what it knows of those of its host."""

    def __init__(
        self,
        kv_store: Any,
        waiter: KeyWaiter,
        *,
        key: str,
        rank: int,
        ranks_of_host: range,
        num_trainers: int,
    ) -> None:
        """`key` begins the keys of all marks."""
        self._kv_store, self._waiter, self._prefix = kv_store, waiter, key
        self._rank, self._ranks_of_host = rank, ranks_of_host
        self._naming = partial(naming_failures, rank, num_trainers)
        self._stream = 0
        # by kind and rank the step
        self._known: dict[tuple[Moment, int], int] = {}

    def begin_stream(self, stream: int) -> None:
        """Marks made from now on are of another stream of plans."""
        self._stream = stream
        self._known.clear()

    def mark(self, kind: Moment, step: int) -> None:
        """Says that this rank has written what its transfers up to `step` evict; steps in order."""
        with self._naming(f"telling that the {kind} transfers of step {step} are written back"):
            self._kv_store.set(self._key(kind, self._rank, step), b"")
            self._kv_store.set(self._key(kind, self._rank, None), str(step))
            if step >= _KEPT_MARKS:
                self._kv_store.delete_key(self._key(kind, self._rank, step - _KEPT_MARKS))

    def wait(self, kind: Moment, step: int) -> None:
        """Waits until every other rank of the host has marked `step`, or a later one."""
        connection = self._waiter.connection
        for rank in self._ranks_of_host:
            if rank == self._rank or self._known.get((kind, rank), -1) >= step:
                continue
            newest = self._key(kind, rank, None)
            with self._naming(
                f"waiting for rank {rank} to write back what the {kind} transfers of step {step} "
                "evict"
            ):
                written = int(connection.get(newest)) if connection.check([newest]) else -1
                if written < step:
                    self._waiter.wait_for(self._key(kind, rank, step))
            self._known[kind, rank] = max(written, step)

    def _key(self, kind: Moment, rank: int, step: int | None) -> str:
        which = "newest" if step is None else step
        return f"{self._prefix}/{self._stream}/{kind}/{rank}/{which}"
