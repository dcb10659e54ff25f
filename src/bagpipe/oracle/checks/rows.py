"""Where each row of a group is, and whether what is there is current."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from bagpipe.oracle.checks.rules import Rules
from bagpipe.plan import Transfers
from bagpipe.topology import Topology
from bagpipe.types import Group, Int32Array, Int64Array

_NOWHERE = -1


class Rows:
    """The rows of one group in the caches of all trainers."""

    def __init__(self, rules: Rules, group: Group, topology: Topology, num_slots: int) -> None:
        """Begins with empty caches of `num_slots` slots for each trainer."""
        self._rules, self.num_slots = rules, num_slots
        self._num_rows, num_trainers = group.num_rows, topology.num_trainers
        self._in_slots = np.full((num_trainers, num_slots), _NOWHERE, np.int64)
        self._is_cached = np.zeros(group.num_rows, np.bool_)
        self._evicted_at = np.full(group.num_rows, -1, np.int64)
        self._last_used = np.full(group.num_rows, -2, np.int64)  # never: before any step before
        # gradients of a computed step have not been applied
        self._is_behind = np.zeros(group.num_rows, np.bool_)

    def at(self, rank: int, slots: Int32Array) -> Int64Array:
        """The rows in a rank's own slots (n,); -1 where there is none."""
        found: Int64Array = self._in_slots[rank, slots]
        return found

    def are_behind(self, rows: Int64Array) -> bool:
        """Whether a gradient of any of these rows is still on its way."""
        return bool(self._is_behind[rows].any())

    def are_used_since(self, step: int, rows: Int64Array) -> bool:
        """Whether any of these rows was used in `step` or later."""
        return bool((self._last_used[rows] >= step).any())

    def use(self, rows: Int64Array, step: int) -> None:
        """Notes that a step uses rows."""
        self._last_used[rows] = step

    def set_behind(self, rows: Int64Array, is_behind: bool) -> None:
        """Notes whether gradients of rows are on their way."""
        self._is_behind[rows] = is_behind

    def transfer(self, transfers: Sequence[Transfers], tick: int) -> None:
        """Evicts on all ranks, then fetches: a row may come back to another rank."""
        for rank, moved in enumerate(transfers):
            self._evict(rank, moved, tick)
        for rank, moved in enumerate(transfers):
            self._fetch(rank, moved, tick)

    def _evict(self, rank: int, moved: Transfers, tick: int) -> None:
        rows, slots = moved.evict_rows, moved.evict_slots
        expect = partial(self._rules.expect, rank=rank)
        self._rules.expect_places(slots, self.num_slots, rank)
        is_there = np.array_equal(self.at(rank, slots), rows)
        expect(6, "an evicted row is not in the slot that it leaves", is_there)
        is_whole = not self.are_behind(rows)
        expect(5, "a row is evicted before its gradients are applied", is_whole)
        expect(5, "a row is evicted before its last use", not self.are_used_since(tick, rows))
        self._in_slots[rank, slots] = _NOWHERE
        self._is_cached[rows] = False
        self._evicted_at[rows] = tick

    def _fetch(self, rank: int, moved: Transfers, tick: int) -> None:
        rows, slots, fence = moved.fetch_rows, moved.fetch_slots, moved.fence_tick
        expect = partial(self._rules.expect, rank=rank)
        self._rules.expect_places(slots, self.num_slots, rank)
        self._rules.expect_places(rows, self._num_rows, rank)
        expect(2, "a row is fetched without a slot", len(rows) == len(slots))
        is_free = (self.at(rank, slots) == _NOWHERE).all()
        expect(5, "a fetch fills a slot that is still in use", is_free)
        expect(2, "a row is fetched that is in a cache", not self._is_cached[rows].any())
        latest = int(self._evicted_at[rows].max(initial=-1))
        expect(4, f"a fetch does not wait for the write-back of tick {latest}", latest <= fence)
        expect(4, f"a fetch waits for the later tick {fence}", fence <= tick)
        self._in_slots[rank, slots] = rows
        self._is_cached[rows] = True
