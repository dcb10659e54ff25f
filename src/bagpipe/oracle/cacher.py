"""The Oracle Cacher of one group: turns de-duplicated batches into slots, fetches and evictions. Sequential and pure.

A batch is first *admitted* to the window, which tells each row of the window when it is used next; later it is *planned*, which
gives each of its rows a slot. Between the two lie `lookahead` batches. A row is *settled* once `prefetch_depth` steps have
passed since its last use, so that its slot can be filled ahead.

Eviction is Belady's MIN over the window (IBM Systems Journal 5(2), 1966). In this order, and no further than needed, go

1. settled rows with no known next use, the longest unused first (in one batch: in its order),
2. settled rows by their next use, the farthest first (of one next use: the one of which that has been known longest, and what
   became known at once in the order of the batch that made it known),
3. rows that are not settled and that this step does not need, the longest unused first: the step has to wait for their slots.

State, all flat arrays so that one step is a few loops without a hash table (`_loops`, `_queues`):

- per row 8 bytes: its slot (or when it was evicted) and its latest occurrence in the window;
- per distinct row of each batch in the window 12 bytes: a ring with the step at which that occurrence's row comes next, and
  the row's state when the batch was admitted;
- per slot 24 bytes: its row, and its place in the eviction queues.

Occurrences are numbered on; a number's low bits are its place in the ring.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from bagpipe.errors import CacheTooSmallError, ConfigError
from bagpipe.oracle import _loops, _queues
from bagpipe.oracle.dedup import DedupedGroup
from bagpipe.types import GradientSchedule, Group, GroupPlan, Int32Array, Int64Array, Transfers


@dataclass(frozen=True, kw_only=True)
class _Admitted:
    """A batch of the window that is not planned yet."""

    batch: DedupedGroup
    first_occurrence: int
    found: Int32Array  # (U, 2), see _loops


@dataclass(frozen=True, kw_only=True)
class _Planned:
    """A planned batch whose rows are not settled yet."""

    step: int
    rows: Int64Array
    slots: Int32Array
    first_occurrence: int


class Cacher:
    """Plans one group's cache step by step. `admit` batches in order, then `plan` them in the same order."""

    def __init__(self, group: Group, *, num_slots: int, max_lookahead: int, prefetch_depth: int, first_step: int = 0) -> None:
        """`max_lookahead` bounds how many batches are ever admitted ahead; `first_step` is the number of the first batch."""
        if not 1 <= num_slots < 2**31:
            raise ConfigError(f"{group.name}: a cache of {num_slots:,} slots, must be from 1 to {2**31 - 1:,}")
        self.group, self.num_slots, self.prefetch_depth = group, num_slots, prefetch_depth
        self._first_step = self._next_step = self._next_admitted = first_step
        self._row_states = np.full((group.num_rows, 2), -1, np.int32)  # see _loops
        self._rows_of_slots = np.full(num_slots, -1, np.int64)
        self._queue = np.empty(2 * num_slots, np.int32)  # see _queues, as are the others
        self._queue_ends = np.zeros(2, np.int64)
        self._places = np.full(num_slots, _queues.NOT_QUEUED, np.int32)
        self._num_due_queues = max_lookahead + 2
        self._chunks, self._chains, self._due = _queues.make_due_queues(num_slots, self._num_due_queues)
        self._next_uses = np.empty(1 << 16, np.int32)
        self._next_occurrence = 0
        self._num_kept = 0  # occurrences still in the ring
        self._num_used_slots = 0
        self._last_forced_step = first_step - 1  # the last one that evicted rows before they settled
        self._admitted: deque[_Admitted] = deque()
        self._unsettled: deque[_Planned] = deque()
        self.evicted_blindly = False
        """Whether the last plan evicted a row whose next use nobody knows: a longer window might have chosen better."""

    @property
    def num_used_slots(self) -> int:
        """Slots ever filled: the peak of the cache's use."""
        return self._num_used_slots

    @property
    def nbytes(self) -> int:
        """Bytes of this object's own arrays; the window's batches not included."""
        owned = (value for value in vars(self).values() if isinstance(value, np.ndarray))
        return sum(array.nbytes for array in owned)

    def check_fits(self, batch: DedupedGroup) -> None:
        """Raises CacheTooSmallError when the batch to be admitted next alone needs more slots than there are."""
        if len(batch.unique_rows) > self.num_slots:
            raise CacheTooSmallError(
                step=self._next_admitted,
                group=self.group.name,
                num_needed=len(batch.unique_rows),
                num_slots=self.num_slots,
            )

    def admit(self, batch: DedupedGroup) -> None:
        """Lets the window see one more batch, which must fit."""
        self.check_fits(batch)
        step, num_uniques = self._next_admitted, len(batch.unique_rows)
        self._reserve(num_uniques)
        found, due_slots = _loops.admit(
            batch.unique_rows, step, self._next_occurrence, self._row_states, self._next_uses, self._places
        )
        self._push_due(np.full(len(due_slots), step % self._num_due_queues, np.int32), due_slots)
        self._admitted.append(_Admitted(batch=batch, first_occurrence=self._next_occurrence, found=found))
        self._next_occurrence = (self._next_occurrence + num_uniques) & _loops.OCCURRENCES
        self._num_kept += num_uniques
        self._next_admitted += 1

    def plan(self) -> GroupPlan:
        """Plans the oldest admitted batch that is not planned yet."""
        admitted = self._admitted.popleft()
        batch = admitted.batch
        step = self._next_step
        self._next_step += 1
        while self._unsettled and self._unsettled[0].step < step - self.prefetch_depth:
            self._settle(self._unsettled.popleft(), step)
        _queues.clear_due(self._chains, self._due, step % self._num_due_queues)
        slots, missing = _loops.find_resident(batch.unique_rows, admitted.found, self._row_states, self._rows_of_slots)
        freed, num_fresh, num_settled = self._free_slots(len(missing), step)
        early, late = self._transfers(batch.unique_rows, missing, slots, freed, num_fresh, num_settled, step)
        self._unsettled.append(_Planned(step=step, rows=batch.unique_rows, slots=slots, first_occurrence=admitted.first_occurrence))
        return GroupPlan(
            lookup_slots=_loops.expand(slots, batch.inverse),
            bag_offsets=batch.bag_offsets,
            bag_scales=batch.bag_scales,
            schedule=GradientSchedule(
                unique_slots=slots,
                bags=batch.bags,
                piece_offsets=batch.piece_offsets,
                long_uniques=batch.long_uniques,
                long_offsets=batch.long_offsets,
            ),
            early=early,
            late=late,
        )

    def _reserve(self, num_uniques: int) -> None:
        """Makes room in the ring for a batch's occurrences."""
        size = len(self._next_uses)
        while size < self._num_kept + num_uniques:
            size *= 2
        if size > len(self._next_uses):
            grown = np.empty(size, np.int32)
            _loops.copy_ring(self._next_uses, grown, self._next_occurrence - self._num_kept, self._num_kept)
            self._next_uses = grown

    def _settle(self, planned: _Planned, step: int) -> None:
        """Makes a batch's rows that no later step has used candidates for eviction."""
        if self._queue_ends[1] + len(planned.rows) > len(self._queue):
            _queues.compact(self._queue, self._queue_ends, self._places)
        due_queues, due_slots = _loops.settle(
            planned.rows,
            planned.slots,
            planned.first_occurrence,
            step,
            self._last_forced_step > planned.step,
            self._row_states,
            self._rows_of_slots,
            self._next_uses,
            self._queue,
            self._queue_ends,
            self._places,
            self._num_due_queues,
        )
        self._push_due(due_queues, due_slots)
        self._num_kept -= len(planned.rows)

    def _push_due(self, queues: Int32Array, slots: Int32Array) -> None:
        _queues.push_due(self._chunks, self._chains, self._due, queues, slots)

    def _free_slots(self, num_missing: int, step: int) -> tuple[Int32Array, int, int]:
        """Finds slots for the missing rows, in the order of the module's list, never used ones before all others.

        Returns (slots, how many were never used, how many are free early enough to be filled ahead).
        """
        freed = np.empty(num_missing, np.int32)
        num_fresh = min(num_missing, self.num_slots - self._num_used_slots)
        freed[:num_fresh] = np.arange(self._num_used_slots, self._num_used_slots + num_fresh, dtype=np.int32)
        self._num_used_slots += num_fresh
        num_freed = num_fresh + _queues.pop_unknown(self._queue, self._queue_ends, self._places, freed[num_fresh:])
        self.evicted_blindly = num_freed > num_fresh
        num_freed += self._pop_due(freed[num_freed:])
        num_settled = num_freed
        if num_settled < num_missing:
            self._last_forced_step = step
        for planned in self._unsettled if num_settled < num_missing else ():
            num_freed += _loops.pop_unsettled(
                planned.rows,
                planned.slots,
                planned.first_occurrence,
                step,
                self._rows_of_slots,
                self._next_uses,
                freed[num_freed:],
            )
        assert num_freed == num_missing, f"step {step}: {num_missing - num_freed} slots are missing in {self.group.name}"
        return freed, num_fresh, num_settled

    def _pop_due(self, freed: Int32Array) -> int:
        """Fills `freed` with slots of settled rows, those with the farthest next use first; returns how many."""
        num_freed = 0
        for due_step in range(self._next_admitted - 1, self._next_step - 1, -1):
            if num_freed == len(freed):
                break
            queue = due_step % self._num_due_queues
            num_freed += _queues.pop_due(self._chunks, self._chains, self._due, queue, freed[num_freed:])
        return num_freed

    def _transfers(
        self,
        rows: Int64Array,
        missing: Int32Array,
        slots: Int32Array,
        freed: Int32Array,
        num_fresh: int,
        num_settled: int,
        step: int,
    ) -> tuple[Transfers, Transfers]:
        """Evicts the freed slots' rows, gives the slots to the missing rows, and splits both into early and late."""
        early_tick = max(self._first_step, step - self.prefetch_depth)
        evict_slots, num_early = freed[num_fresh:], num_settled - num_fresh
        evict_rows = self._rows_of_slots[evict_slots]
        fetch_rows, fetch_slots, num_fetched_early, early_fence, late_fence = _loops.assign(
            rows, missing, slots, freed, num_settled, early_tick, self._row_states, self._rows_of_slots
        )
        _loops.mark_evicted(evict_rows[:num_early], early_tick, self._row_states)
        _loops.mark_evicted(evict_rows[num_early:], step, self._row_states)
        early = Transfers(
            evict_rows=evict_rows[:num_early],
            evict_slots=evict_slots[:num_early],
            fetch_rows=fetch_rows[:num_fetched_early],
            fetch_slots=fetch_slots[:num_fetched_early],
            fence_tick=early_fence,
        )
        late = Transfers(
            evict_rows=evict_rows[num_early:],
            evict_slots=evict_slots[num_early:],
            fetch_rows=fetch_rows[num_fetched_early:],
            fetch_slots=fetch_slots[num_fetched_early:],
            fence_tick=late_fence,
        )
        return early, late
