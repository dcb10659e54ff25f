"""Marks by which it is known what each rank has written back, before others read it.

The ranks of a host tell each other by `WriteMarks`. A store that orders reads and writes itself is
told by `StoreMarks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

from bagpipe.distributed.alone import Alone, Peers
from bagpipe.distributed.communicator import Communicator, Moment
from bagpipe.store.base import NO_STEPS, EmbeddingStore, OrderedStore, Steps

_MAX_STEPS = 1 << 40
"""Above all steps of one stream."""
_KEPT_MARKS = 1024
"""Steps whose marks stay in the key-value store; the newest one stands for all before it."""


def marks_with(peers: Peers, stores: Sequence[EmbeddingStore], stream: int) -> Marks:
    """The marks of the stream of plans that has begun, the `stream`th on these stores."""
    if isinstance(stores[0], OrderedStore):
        return StoreMarks(stores[0], stream)
    return NoMarks() if isinstance(peers, Alone) else WriteMarks(peers)


class NoMarks:
    """The marks of a trainer without others; see `WriteMarks`."""

    are_read = False

    def mark(self, kind: Moment, step: int) -> None:
        """Nobody is told."""

    def wait(self, kind: Moment, step: int) -> None:
        """Nobody else writes."""

    def fence(self, steps: Steps) -> Steps:
        """The same: its stores leave order to who calls them."""
        return steps


class WriteMarks:
    """One rank's marks in the key-value store, and what it knows of those of its host."""

    are_read = True
    """Whether there is somebody who waits for them."""

    def __init__(self, communicator: Communicator) -> None:
        self._communicator, self._prefix = communicator, communicator.stream_key
        # by kind and rank the step
        self._known: dict[tuple[Moment, int], int] = {}

    def mark(self, kind: Moment, step: int) -> None:
        """Says that this rank has written what its transfers up to `step` evict; steps in order."""
        rank, kv_store = self._communicator.rank, self._communicator.kv_store
        with self._communicator.naming(
            f"telling that the {kind} transfers of step {step} are written back"
        ):
            kv_store.set(self._key(kind, rank, step), b"")
            kv_store.set(self._key(kind, rank, None), str(step))
            if step >= _KEPT_MARKS:
                kv_store.delete_key(self._key(kind, rank, step - _KEPT_MARKS))

    def wait(self, kind: Moment, step: int) -> None:
        """Waits until every other rank of the host has marked `step`, or a later one."""
        waiter = self._communicator.waiter
        for rank in self._communicator.ranks_of_host:
            if rank == self._communicator.rank or self._known.get((kind, rank), -1) >= step:
                continue
            newest = self._key(kind, rank, None)
            with self._communicator.naming(
                f"waiting for rank {rank} to write back what the {kind} transfers of step {step} "
                "evict"
            ):
                connection = waiter.connection
                written = int(connection.get(newest)) if connection.check([newest]) else -1
                if written < step:
                    waiter.wait_for(self._key(kind, rank, step))
            self._known[kind, rank] = max(written, step)

    def fence(self, steps: Steps) -> Steps:
        """The same: its stores leave order to who calls them."""
        return steps

    def _key(self, kind: Moment, rank: int, step: int | None) -> str:
        which = "newest" if step is None else step
        return f"{self._prefix}/{kind}/{rank}/{which}"


class StoreMarks:
    """One rank's marks on stores that order by them what all ranks write and read."""

    are_read = True

    def __init__(self, store: OrderedStore, stream: int) -> None:
        """`store` is one of the stores that hear of it."""
        self._store = store
        # A stream that was left early has marked steps that the next one plans anew. Marks only
        # grow, so those of each stream lie above those of the one before.
        self._first = stream * _MAX_STEPS

    def mark(self, kind: Moment, step: int) -> None:
        """As `WriteMarks.mark`; what has been sent need not be written yet."""
        self._store.mark(self.fence(replace(NO_STEPS, **{kind: step})))

    def wait(self, kind: Moment, step: int) -> None:
        """The stores wait, behind the fence."""

    def fence(self, steps: Steps) -> Steps:
        """The steps of this stream, as the stores count them."""
        return Steps(overlapped=self._counted(steps.overlapped), urgent=self._counted(steps.urgent))

    def _counted(self, step: int) -> int:
        return step if step < 0 else self._first + step


Marks: TypeAlias = WriteMarks | StoreMarks | NoMarks
