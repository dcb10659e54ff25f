"""The Oracle Cacher of one group: turns de-duplicated batches into slots, fetches and evictions. Sequential and pure.

A batch, linked by `bagpipe.oracle.linker`, is first *admitted* to the window, so that its rows' next use is known; later it is
*planned*, which gives each of its rows a slot. Between the two lie `lookahead` batches. A row is *settled* once `prefetch_depth`
steps have passed since its last use, so that its slot can be filled ahead.

Eviction is Belady's MIN over the window (IBM Systems Journal 5(2), 1966). In this order, and no further than needed, go

1. settled rows with no known next use, the longest unused first (in one batch: in its order),
2. settled rows by their next use, the farthest first (of one next use: the one of which that has been known longest, and what
   became known at once in the order of the batch that made it known),
3. rows that are not settled and that this step does not need, the longest unused first: the step has to wait for their slots.

Where a planned batch finds a row's slot depends on the row's last use: in a small ring when that is not settled yet, as for most
rows; in the queue of settled rows that wait for this step; and nowhere when the row must be fetched.

State, all flat arrays so that one step is a few loops without a hash table (`_loops`, `_queues`): per row 4 bytes, its slot or when
it was evicted; per slot 28 bytes, its row and its place in the eviction queues; per unsettled use 4 bytes. The linker's is besides.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from bagpipe.errors import CacheTooSmallError
from bagpipe.oracle import _loops, _queues
from bagpipe.oracle._fork import Fork
from bagpipe.oracle.dedup import DedupedGroup
from bagpipe.oracle.linker import LinkedGroup, Linker, roomy_ring
from bagpipe.types import GradientSchedule, Group, GroupPlan, Int32Array, Int64Array, Transfers

Number = TypeVar("Number", np.int32, np.int64)


@dataclass(frozen=True, kw_only=True)
class _Planned:
    """A planned batch whose rows are not settled yet."""

    step: int
    first_occurrence: int
    num_uniques: int


class Cacher:
    """Plans one group's cache step by step. `admit` batches in order, then `plan` them in the same order."""

    def __init__(
        self,
        group: Group,
        *,
        num_slots: int,
        max_lookahead: int,
        prefetch_depth: int,
        first_step: int = 0,
        num_threads: int = 1,
    ) -> None:
        """`max_lookahead` bounds how many batches are ever admitted ahead; `first_step` is the number of the first batch.

        `num_threads` share the loops over a batch's rows, and as many those of the linker; plans do not depend on it.
        """
        self.group, self.num_slots, self.prefetch_depth = group, num_slots, prefetch_depth
        self.linker = Linker(group, first_step=first_step, num_threads=num_threads)
        """Links batches before they are admitted; may run ahead in another thread."""
        self._fork = Fork(num_threads, "plan")
        self._first_step = self._next_step = self._next_admitted = first_step
        self._slots_of_rows = np.full((group.num_rows, 1), -1, np.int32)  # see _loops
        self._rows_of_slots = np.full(num_slots, -1, np.int64)
        self._slots_of_uses = np.empty(1 << 16, np.int32)
        self._queue = np.empty(2 * num_slots, np.int32)  # see _queues, as are the others
        self._queue_ends = np.zeros(2, np.int64)
        self._places = np.full(num_slots, _queues.NOT_QUEUED, np.int32)
        self._num_due_queues = max_lookahead + 2
        self._due_queues = _queues.make_due_queues(num_slots, self._num_due_queues)
        self._num_unsettled = 0  # occurrences
        self._num_used_slots = 0
        self._admitted: deque[LinkedGroup] = deque()
        self._unsettled: deque[_Planned] = deque()
        self.evicted_blindly = False
        """Whether the last plan evicted a row whose next use nobody knows: a longer window might have chosen better."""

    @property
    def num_used_slots(self) -> int:
        """Slots ever filled: the peak of the cache's use."""
        return self._num_used_slots

    @property
    def nbytes(self) -> int:
        """Bytes of this object's own arrays and the linker's; the window's batches not included."""
        owned = (value for value in vars(self).values() if isinstance(value, np.ndarray))
        return self.linker.nbytes + sum(array.nbytes for array in (*owned, *self._due_queues))

    def check_fits(self, batch: DedupedGroup) -> None:
        """Raises CacheTooSmallError when the batch to be admitted next alone needs more slots than there are."""
        if len(batch.unique_rows) > self.num_slots:
            raise CacheTooSmallError(
                step=self._next_admitted,
                group=self.group.name,
                num_needed=len(batch.unique_rows),
                num_slots=self.num_slots,
            )

    def admit(self, linked: LinkedGroup) -> None:
        """Lets the window see one more batch, which must fit."""
        self.check_fits(linked.batch)
        rows, previous, oldest = linked.batch.unique_rows, linked.previous, self._oldest_unsettled(linked)
        for indices, slots in self._fork.map(
            lambda begin, end: _loops.find_settled(rows, previous, begin, end, oldest, self._slots_of_rows, self._places), len(rows)
        ):
            steps = np.full(len(slots), self._next_admitted, np.int32)
            _queues.push_due(*self._due_queues, steps, indices, slots)
        self._admitted.append(linked)
        self._next_admitted += 1

    def plan(self) -> GroupPlan:
        """Plans the oldest admitted batch that is not planned yet."""
        linked = self._admitted.popleft()
        batch, step = linked.batch, self._next_step
        self._next_step += 1
        slots = np.full(len(batch.unique_rows), -1, np.int32)
        _queues.take_due(*self._due_queues, step % self._num_due_queues, slots)
        missing = self._find_resident(linked, slots)
        while self._unsettled and self._unsettled[0].step < step - self.prefetch_depth:
            self._settle(self._unsettled.popleft(), step)
        freed, num_fresh, num_settled = self._free_slots(len(missing), step)
        early, late = self._transfers(batch.unique_rows, missing, slots, freed, num_fresh, num_settled, step)
        self._keep(linked, slots, step)
        lookup_slots = np.empty(len(batch.inverse), np.int32)
        self._fork.map(lambda begin, end: _loops.expand(slots, batch.inverse, begin, end, lookup_slots), len(lookup_slots))
        return GroupPlan(
            lookup_slots=lookup_slots,
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

    def close(self) -> None:
        """Ends the threads, the linker's too."""
        self._fork.close()
        self.linker.close()

    def _find_resident(self, linked: LinkedGroup, slots: Int32Array) -> Int32Array:
        """Fills in the slots of rows that are not settled; returns the indices of rows without a slot."""
        previous, oldest = linked.previous, self._oldest_unsettled(linked)
        missing = self._fork.map(
            lambda begin, end: _loops.find_resident(previous, begin, end, oldest, self._slots_of_uses, slots), len(slots)
        )
        return np.concatenate(missing)

    def _oldest_unsettled(self, linked: LinkedGroup) -> int:
        """The first occurrence that is not settled; where there is none, that of the batch in hand."""
        if self._unsettled:
            return self._unsettled[0].first_occurrence
        return self._admitted[0].first_occurrence if self._admitted else linked.first_occurrence

    def _keep(self, linked: LinkedGroup, slots: Int32Array, step: int) -> None:
        """Remembers where a planned batch's rows are until they are settled."""
        first, num_uniques = linked.first_occurrence, len(slots)
        self._slots_of_uses = roomy_ring(self._slots_of_uses, first - self._num_unsettled, self._num_unsettled, num_uniques)
        _loops.keep_uses(slots, first, self._slots_of_uses)
        self._unsettled.append(_Planned(step=step, first_occurrence=first, num_uniques=num_uniques))
        self._num_unsettled += num_uniques

    def _settle(self, planned: _Planned, step: int) -> None:
        """Makes a batch's rows that no later step has used candidates for eviction."""
        first, last_seen, next_uses = planned.first_occurrence, self._next_admitted - 1, self.linker.next_uses
        for unknown, steps, indices, slots in self._fork.map(
            lambda begin, end: _loops.settle(first + begin, end - begin, step, last_seen, next_uses, self._slots_of_uses),
            planned.num_uniques,
        ):
            if self._queue_ends[1] + len(unknown) > len(self._queue):
                _queues.compact(self._queue, self._queue_ends, self._places)
            _queues.push_unknown(self._queue, self._queue_ends, self._places, unknown)
            _queues.push_due(*self._due_queues, steps, indices, slots)
        self._num_unsettled -= planned.num_uniques
        self.linker.settled = planned.step

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
        for planned in self._unsettled if num_settled < num_missing else ():
            num_freed += _loops.pop_unsettled(
                planned.first_occurrence,
                planned.num_uniques,
                step,
                self.linker.next_uses,
                self._slots_of_uses,
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
            num_freed += _queues.pop_due(*self._due_queues, due_step % self._num_due_queues, freed[num_freed:])
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
        evict_rows = np.empty(len(evict_slots), np.int64)
        fetch_rows = np.empty(len(missing), np.int64)
        fetch_slots = np.empty(len(missing), np.int32)

        def evict(begin: int, end: int) -> None:
            _loops.evict(evict_slots, begin, end, num_early, early_tick, step, self._slots_of_rows, self._rows_of_slots, evict_rows)

        def assign(begin: int, end: int) -> tuple[int, int, int, int, int]:
            found = _loops.assign(
                rows,
                missing,
                begin,
                end,
                slots,
                freed,
                num_settled,
                early_tick,
                self._slots_of_rows,
                self._rows_of_slots,
                fetch_rows,
                fetch_slots,
            )
            return begin, end, *found

        self._fork.map(evict, len(evict_slots))
        parts = self._fork.map(assign, len(missing))
        early_parts = [slice(begin, begin + num_fetched) for begin, _, num_fetched, _, _ in parts]
        late_parts = [slice(begin + num_fetched, end) for begin, end, num_fetched, _, _ in parts]
        early = Transfers(
            evict_rows=evict_rows[:num_early],
            evict_slots=evict_slots[:num_early],
            fetch_rows=_joined(fetch_rows, early_parts),
            fetch_slots=_joined(fetch_slots, early_parts),
            fence_tick=max(fence for _, _, _, fence, _ in parts),
        )
        late = Transfers(
            evict_rows=evict_rows[num_early:],
            evict_slots=evict_slots[num_early:],
            fetch_rows=_joined(fetch_rows, late_parts),
            fetch_slots=_joined(fetch_slots, late_parts),
            fence_tick=max(fence for _, _, _, _, fence in parts),
        )
        return early, late


def _joined(array: npt.NDArray[Number], parts: Sequence[slice]) -> npt.NDArray[Number]:
    """The parts of an array one after the other; not copied where there is one."""
    return array[parts[0]] if len(parts) == 1 else np.concatenate([array[part] for part in parts])
