"""Marks by which stores that order what several trainers write and read know how far each is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bagpipe.distributed.communicator import Moment
from bagpipe.store.base import NO_STEPS, EmbeddingStore, OrderedStore, Steps

_MAX_STEPS = 1 << 40
"""Above all steps of one stream."""


class Marks:
    """One rank's marks, in one stream of plans, on stores that read and write by them."""

    def __init__(self, store: OrderedStore, stream: int) -> None:
        """`store` is one of the stores, all of which hear of it; `stream` counts streams on them.

        A stream that was left early has marked steps that the next one plans anew. Marks only grow,
        so those of each stream lie above those of the one before.
        """
        self._store, self._first = store, stream * _MAX_STEPS

    def mark(self, kind: Moment, step: int) -> None:
        """Says that what transfers up to `step` evict has been sent; it need not be written yet."""
        self._store.mark(self.fence(replace(NO_STEPS, **{kind: step})))

    def fence(self, steps: Steps) -> Steps:
        """The steps of this stream, as the stores count them."""
        return Steps(overlapped=self._counted(steps.overlapped), urgent=self._counted(steps.urgent))

    def _counted(self, step: int) -> int:
        return step if step < 0 else self._first + step


def marks_on(stores: Sequence[EmbeddingStore], stream: int) -> Marks | None:
    """The marks of a stream; None: the stores leave order to who calls them."""
    return Marks(stores[0], stream) if isinstance(stores[0], OrderedStore) else None
