"""The policy of an arm that has no cache."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from bagpipe.oracle.cache_plan import CachePlan
from bagpipe.oracle.linker import BatchUses, LinkedGroup
from bagpipe.oracle.merge import MergedGroup
from bagpipe.oracle.policy import POLICIES
from bagpipe.plan import Transfers
from bagpipe.types import Group, Int32Array, Int64Array
from benchmarks.remote.settings import NO_CACHE

_NO_ROWS, _NO_SLOTS = np.empty(0, np.int64), np.empty(0, np.int32)
_NOTHING = Transfers(
    evict_rows=_NO_ROWS,
    evict_slots=_NO_SLOTS,
    fetch_rows=_NO_ROWS,
    fetch_slots=_NO_SLOTS,
    fence_tick=-1,
)


class NoCache:
    """Each step writes all rows of the step before back, then fetches all of its own.

    It serves one trainer.
    """

    evicted_blindly = False
    nbytes = 0

    def __init__(self, group: Group, *, num_slots: int, first_step: int, **_: int) -> None:
        """See `MakePolicy`."""
        self._num_slots, self._step = num_slots, first_step
        self._admitted: deque[LinkedGroup] = deque()
        self._held: Int64Array = _NO_ROWS
        self._before = BatchUses(step=-1, first=0, bounds=np.zeros(2, np.int64))
        self.num_used_slots = 0

    def link(self, batch: MergedGroup) -> LinkedGroup:
        """Finds nothing: no row is kept."""
        num_uniques = len(batch.unique_rows)
        return LinkedGroup(
            batch=batch,
            uses=BatchUses(step=-1, first=0, bounds=np.array([0, num_uniques])),
            previous=np.full(num_uniques, -1, np.int32),
        )

    def check_fits(self, linked: LinkedGroup) -> None:
        """See `EvictionPolicy`. The benchmark gives it room for its largest batch."""
        assert len(linked.batch.unique_rows) <= self._num_slots

    def admit(self, linked: LinkedGroup) -> None:
        """See `EvictionPolicy`."""
        self._admitted.append(linked)

    def plan(self) -> CachePlan:
        """See `EvictionPolicy`."""
        linked, evicted = self._admitted.popleft(), self._held
        rows = linked.batch.unique_rows
        slots = _first_slots(len(rows))
        moved = Transfers(
            evict_rows=evicted,
            evict_slots=_first_slots(len(evicted)),
            fetch_rows=rows,
            fetch_slots=slots,
            # what this very step has evicted may be among what it fetches
            fence_tick=self._step if len(evicted) else -1,
        )
        before, self._before, self._held = self._before, linked.uses, rows
        self.num_used_slots = max(self.num_used_slots, len(rows))
        self._step += 1
        return CachePlan(
            linked=linked,
            unique_slots=slots,
            overlapped=_NOTHING,
            urgent=moved,
            before=before,
            after=self._admitted[0] if self._admitted else None,
        )


@contextmanager
def no_cache_known() -> Iterator[None]:
    """Lets streams of this process plan by it."""
    POLICIES[NO_CACHE] = NoCache
    try:
        yield
    finally:
        del POLICIES[NO_CACHE]


def _first_slots(count: int) -> Int32Array:
    return np.arange(count, dtype=np.int32)
