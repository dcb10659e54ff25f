"""The policy `min`: turns one group's batches into slots, fetches and evictions, by Belady's MIN.

It is sequential and pure.

`bagpipe.oracle.linker` links a batch. Then the batch is *admitted* to the window, so that the next
use of its rows is known. Later it is *planned*, which gives each of its rows a slot. `lookahead`
batches lie between the two. A row is *settled* once `prefetch_depth` steps have passed since its
last use, so that its slot can be filled ahead. Only then may it leave. A cache is *tight* for a
step if it could not hold the rows of that step and of the `prefetch_depth` before it, were no row
used twice. Then all rows settle at once. Rows that were used a moment ago leave as late as the step
itself, which has to wait for their slots. (If the others had to go first, hardly any choice would
be left.)

Eviction is Belady's MIN over the window (IBM Systems Journal 5(2), 1966). Settled rows go in this
order, and no more of them than needed:

1. Rows with no known next use go first, the longest unused before others. Rows of one batch go in
   its order.
2. Then go those with the farthest next use. Among rows with the same next use the one goes first
   whose next use has been known longest; those that became known at once go in the order of the
   batch that made them known.

In a large cache, and where several hosts share one, that is the order within each of its shards
(see `bagpipe.oracle.shards`).

Where a planned batch finds a row's slot depends on the row's last use: in a small ring when that is
not settled yet, as for most rows; in the queue of settled rows that wait for this step; and nowhere
when the row must be fetched.

State, all flat arrays so that one step is a few loops without a hash table (`loops`, `queues`):
per row 4 bytes, its slot or when it was evicted; per slot 28 to 36 bytes, its row and its place in
the eviction queues; per unsettled use 4 bytes. The linker's is besides.
"""

from __future__ import annotations

from collections import deque
from itertools import islice

import numpy as np

from bagpipe.errors import CacheTooSmallError
from bagpipe.native.memory import filled
from bagpipe.oracle.cache_plan import CachePlan
from bagpipe.oracle.eviction import loops, moved, queues, shard_loops
from bagpipe.oracle.linker import BatchUses, LinkedGroup, Linker, roomy_ring
from bagpipe.oracle.merge import MergedGroup
from bagpipe.oracle.shards import num_slots_needed, slot_bounds
from bagpipe.types import Group

_NO_ROWS, _NO_USES, _NO_USERS = np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.uint64)


class Cacher:
    """The eviction policy of one group's cache that knows the future as far as the window shows it.

    Batches are linked, admitted and planned, each in the same order.
    """

    def __init__(
        self,
        group: Group,
        *,
        num_slots: int,
        max_lookahead: int,
        prefetch_depth: int,
        first_step: int = 0,
        num_trainers: int = 1,
    ) -> None:
        """Makes an empty cache; see `bagpipe.oracle.policy.MakePolicy` for the arguments.

        The caches of all trainers are planned as one.
        """
        self.group, self.num_slots, self.prefetch_depth = group, num_slots, prefetch_depth
        self._num_trainers = num_trainers
        # Of several trainers a row's update may end one step later (see GroupExchange): so long it
        # is not settled.
        self._num_kept_unsettled = prefetch_depth + (num_trainers > 1)
        bounds = slot_bounds(num_slots, group.num_rows)
        num_shards, shard_slots = len(bounds) - 1, int(np.diff(bounds).max())
        self.linker = Linker(group, num_shards=num_shards, first_step=first_step)
        self._first_step = self._next_step = self._next_admitted = self._next_taken = first_step
        self._state = loops.State(
            slots_of_rows=filled(group.num_rows, -1),
            rows_of_slots=np.full(num_slots, -1, np.int64),
            slot_bounds=bounds,
            num_used=np.zeros(num_shards, np.int64),
            oldest_unsettled=np.zeros(num_shards, np.int64),
            unknown=queues.make_unknown_queues(num_shards, shard_slots, num_slots),
            due=queues.make_due_queues(num_shards, shard_slots, max_lookahead + 2),
        )
        self._nothing = BatchUses(step=-1, first=0, bounds=np.zeros(num_shards + 1, np.int64))
        self._slots_of_uses = np.empty(1 << 16, np.int32)  # see `loops`
        self._num_unsettled = 0  # occurrences
        self._admitted: deque[LinkedGroup] = deque()
        self._unsettled: deque[BatchUses] = deque()  # of planned batches
        self.evicted_blindly = False
        """Whether the last plan evicted a row whose next use nobody knows: a longer window might
        have chosen better."""

    @property
    def num_used_slots(self) -> int:
        """Slots ever filled: the peak of the cache's use."""
        return int(self._state.num_used.sum())

    @property
    def nbytes(self) -> int:
        """Bytes of this object's own arrays and the linker's; the window's batches not included."""
        arrays = (*self._state[:5], *self._state.unknown, *self._state.due, self._slots_of_uses)
        return self.linker.nbytes + sum(array.nbytes for array in arrays)

    def link(self, batch: MergedGroup) -> LinkedGroup:
        """Links the next batch; may run ahead in another thread."""
        return self.linker.link(batch)

    def check_fits(self, linked: LinkedGroup) -> None:
        """Checks the batch that is to be admitted next.

        Raises:
            CacheTooSmallError: The batch alone needs more slots than there are.
        """
        if (np.diff(linked.uses.bounds) > np.diff(self._state.slot_bounds)).any():
            rows = linked.batch.unique_rows
            raise CacheTooSmallError(
                step=self._next_admitted,
                group=self.group.name,
                num_uniques=len(rows),
                num_needed=num_slots_needed(rows, self.group.num_rows),
                num_slots=self.num_slots,
                num_trainers=self._num_trainers,
            )

    def admit(self, linked: LinkedGroup) -> None:
        """Lets the window see one more batch, which must fit."""
        self.check_fits(linked)
        self._admitted.append(linked)
        self._next_admitted += 1

    def plan(self) -> CachePlan:
        """Plans the oldest admitted batch that is not planned yet."""
        step, last_seen = self._next_step, self._next_admitted - 1
        issue_tick = max(self._first_step, step - self.prefetch_depth)
        if step == self._first_step:
            # The linker's numbers may begin anywhere: until now there was no occurrence to name.
            self._state.oldest_unsettled[:] = self._admitted[0].uses.first
        newest = self._take_new()
        linked = self._admitted.popleft()
        self._next_step += 1
        self._reserve(linked)
        before = self._unsettled[-1] if self._unsettled else self._nothing
        settled = (
            self._unsettled.popleft()
            if len(self._unsettled) > self._num_kept_unsettled
            else self._nothing
        )
        slots, moved_out, moved_in, counts = loops.plan(
            self._state,
            newest,
            _as_batch(linked),
            np.array([each.first + each.bounds for each in (settled, *self._unsettled)]),
            shard_loops.Ticks(step=step, overlapped=issue_tick, last_seen=last_seen),
            shard_loops.Uses(next_uses=self.linker.next_uses, slots_of_uses=self._slots_of_uses),
            self._num_trainers,
        )
        if settled is not self._nothing:
            self._num_unsettled -= settled.num_uniques
            # From now on the linker may use the ring's places of its occurrences again.
            self.linker.settled = settled.step
        self.evicted_blindly = bool(counts[moved.EVICTED_BLINDLY])
        self._unsettled.append(linked.uses)
        self._num_unsettled += len(slots)
        overlapped, urgent = moved.as_transfers(
            moved.Moved(*moved_out), moved.Moved(*moved_in), counts
        )
        return CachePlan(
            linked=linked,
            unique_slots=slots,
            before=before,
            after=self._admitted[0] if self._admitted else None,
            overlapped=overlapped,
            urgent=urgent,
        )

    def _take_new(self) -> shard_loops.Batch:
        """Takes in all batches that are new since the last plan but the last one, and returns that.

        Without a new batch it returns one without rows.
        """
        newest: LinkedGroup | None = None
        # In most steps one batch is new. `loops.plan` takes that in itself, which saves a call.
        for linked in islice(self._admitted, self._next_taken - self._next_step, None):
            if newest is not None:
                loops.admit(self._state, _as_batch(newest), self._next_taken - 1)
            newest = linked
            self._next_taken += 1
        return (
            shard_loops.Batch(_NO_ROWS, _NO_USES, _NO_USERS, self._nothing.bounds, 0)
            if newest is None
            else _as_batch(newest)
        )

    def _reserve(self, linked: LinkedGroup) -> None:
        """Makes room for a batch in the ring of unsettled uses."""
        oldest = linked.uses.first - self._num_unsettled
        self._slots_of_uses = roomy_ring(
            self._slots_of_uses, oldest, self._num_unsettled, len(linked.previous)
        )


def _as_batch(linked: LinkedGroup) -> shard_loops.Batch:
    batch = linked.batch
    return shard_loops.Batch(
        rows=batch.unique_rows,
        previous=linked.previous,
        users=batch.users,
        bounds=linked.uses.bounds,
        first_occurrence=linked.uses.first,
    )
