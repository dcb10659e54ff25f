"""The first sequential stage of planning: tells each occurrence of a row when the row comes next.

An *occurrence* is one use of a row by one batch. Occurrences are numbered in the order in which the
linker meets them. Linking a batch finds each row's previous occurrence and writes there the batch's
step and the row's index in it. The Cacher reads that when it settles the previous batch, and
ignores what lies beyond its window. So the linker, which knows no slots, may run any number of
batches ahead in a thread of its own, and plans stay the same.

State: 4 bytes a row, its latest occurrence; 8 bytes in a ring for each occurrence that the Cacher
has not settled. An occurrence's low bits are its place in the ring. Numbers wrap round at 2**31. A
slow sweep over all rows, a few of them with each batch, forgets an occurrence before its number
could be taken for that of a newer one.

Cost: one random read and write of the rows' array for each occurrence, which is what bounds the
linker (docs/results.md).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import partial

import numpy as np

from bagpipe.native.jit import (
    NUM_PARTS,
    NUM_STAGE_THREADS,
    jit,
    parallel_jit,
    part_bounds,
    prange,
    threaded,
)
from bagpipe.native.memory import filled
from bagpipe.native.prefetch import prefetch
from bagpipe.oracle.merge import MergedGroup
from bagpipe.oracle.shards import shard_bounds
from bagpipe.types import Group, Int32Array, Int64Array

OCCURRENCES = (1 << 31) - 1
"""Mask of occurrence numbers.

Rings are powers of two, so a number's low bits are still its place when numbers wrap round.
"""
STEP, INDEX = 0, 1
"""What the ring holds of a next use: its step, and the row's index in that step's batch."""
_FORGOTTEN_AGE, _SWEEP = 1 << 29, 1 << 28
"""The age in occurrences from which the sweep forgets one, and how many a whole sweep takes."""
_AHEAD = 16
"""How many rows ahead of its use a row's state is prefetched."""


@dataclass(frozen=True, kw_only=True)
class BatchUses:
    """Which occurrences are those of a batch. It outlives the batch, whose arrays are large."""

    step: int
    first: int
    # (num_shards + 1,) where in the rows each shard of the cache begins; found here because the
    # linker runs ahead of the stage that sets the pace
    bounds: Int64Array

    @property
    def num_uniques(self) -> int:
        return int(self.bounds[-1])


@dataclass(frozen=True, kw_only=True)
class LinkedGroup:
    """A batch's unique rows with their previous occurrences."""

    batch: MergedGroup
    uses: BatchUses
    # (U,) each row's previous occurrence, or -1; one settled long ago may be missing
    previous: Int32Array


class Linker:
    """Links one group's batches in order. Used by one thread; `settled` may be set by another."""

    def __init__(self, group: Group, *, num_shards: int = 1, first_step: int = 0) -> None:
        """Prepares for a cache of `num_shards` shards; `first_step` is the first batch's step."""
        self.next_uses = np.empty((1 << 16, 2), np.int32)
        """By occurrence the `STEP` (-1: none known) and `INDEX` of the row's next use.

        It is replaced when it must grow.
        """
        self.settled = first_step - 1
        """The last step whose occurrences nobody will read again."""
        self._last_uses = filled(group.num_rows, -1)
        self._num_shards = num_shards
        self._next_step, self._next_occurrence = first_step, 0
        self._kept: deque[BatchUses] = deque()  # not settled yet, as far as is known here
        self._num_kept = 0  # occurrences
        self._num_swept = 0.0  # rows of the current sweep

    @property
    def nbytes(self) -> int:
        """Bytes of this object's own arrays."""
        return self._last_uses.nbytes + self.next_uses.nbytes

    def link(self, batch: MergedGroup) -> LinkedGroup:
        """Links the next batch: tells its rows' previous occurrences of this step."""
        rows, first, step = batch.unique_rows, self._next_occurrence, self._next_step
        while self._kept and self._kept[0].step <= self.settled:
            self._num_kept -= self._kept.popleft().num_uniques
        self.next_uses = roomy_ring(
            self.next_uses, first - self._num_kept, self._num_kept, len(rows)
        )
        self._sweep(len(rows))
        previous, bounds = _link(
            rows, step, first, self._num_kept, self._last_uses, self.next_uses, self._num_shards
        )
        uses = BatchUses(step=step, first=first, bounds=bounds)
        self._kept.append(uses)
        self._num_kept += len(rows)
        self._next_occurrence = (first + len(rows)) & OCCURRENCES
        self._next_step += 1
        return LinkedGroup(batch=batch, uses=uses, previous=previous)

    def _sweep(self, num_uniques: int) -> None:
        """Sweeps as many rows as this batch's share of a whole sweep."""
        num_rows, begin = len(self._last_uses), int(self._num_swept)
        self._num_swept += num_uniques * num_rows / _SWEEP
        _forget(self._last_uses[begin : int(self._num_swept)], self._next_occurrence)
        if self._num_swept >= num_rows:
            self._num_swept = 0.0


def roomy_ring(ring: Int32Array, first_occurrence: int, num_kept: int, num_more: int) -> Int32Array:
    """Returns a ring with room for `num_more` occurrences after the `num_kept` ones in `ring`.

    That is `ring` itself where it has room, else a larger copy.
    """
    size = len(ring)
    while size < num_kept + num_more:
        size *= 2
    if size == len(ring):
        return ring
    larger = np.empty((size, *ring.shape[1:]), np.int32)
    _copy_ring(ring.reshape(len(ring), -1), larger.reshape(size, -1), first_occurrence, num_kept)
    return larger


@partial(threaded, num_threads=NUM_STAGE_THREADS)
@parallel_jit
def _link(
    rows: Int64Array,
    step: int,
    first_occurrence: int,
    num_kept: int,
    last_uses: Int32Array,
    next_uses: Int32Array,
    num_shards: int,
) -> tuple[Int32Array, Int64Array]:
    """Returns `previous` of a `LinkedGroup`, and `bounds` of its uses."""
    # A batch's rows are unique, so parts of them never touch the same entry.
    previous = np.empty(len(rows), np.int32)
    for part in prange(NUM_PARTS):
        begin, end = part_bounds(part, len(rows))
        _link_part(
            rows[begin:end],
            step,
            first_occurrence,
            begin,
            num_kept,
            last_uses,
            next_uses,
            previous[begin:end],
        )
    return previous, shard_bounds(rows, num_shards)


@jit
def _link_part(
    rows: Int64Array,
    step: int,
    first_occurrence: int,
    first_index: int,
    num_kept: int,
    last_uses: Int32Array,
    next_uses: Int32Array,
    previous: Int32Array,
) -> None:
    """Links a part of a batch's rows; fills `previous`."""
    # The first loop gathers, the second decides. With a branch in the gathering loop each wrong
    # prediction waits for memory, and the loop takes three times as long.
    mask = len(next_uses) - 1
    first = first_occurrence + first_index
    for index in range(len(rows)):
        prefetch(last_uses, rows[min(index + _AHEAD, len(rows) - 1)], 0)
        row = np.uint64(rows[index])
        previous[index] = last_uses[row, 0]
        last_uses[row, 0] = (first + index) & OCCURRENCES
    for index in range(len(rows)):
        # A previous occurrence that has left the ring must not be written to: the row's own place
        # takes that write, and is cleared afterwards.
        age = (first_occurrence - previous[index]) & OCCURRENCES
        occurrence = (
            previous[index] if (previous[index] >= 0) & (age <= num_kept) else first + index
        )
        next_uses[occurrence & mask, INDEX] = first_index + index
        next_uses[occurrence & mask, STEP] = step
    for occurrence in range(first, first + len(rows)):
        next_uses[occurrence & mask, STEP] = -1


@jit
def _forget(last_uses: Int32Array, next_occurrence: int) -> None:
    """Forgets the occurrences of these rows that are too old."""
    for row in range(len(last_uses)):
        if ((next_occurrence - last_uses[row, 0]) & OCCURRENCES) > _FORGOTTEN_AGE:
            last_uses[row, 0] = -1


@jit
def _copy_ring(
    ring: Int32Array, larger: Int32Array, first_occurrence: int, num_occurrences: int
) -> None:
    """Copies the entries (., n) of consecutive occurrences to their places in a larger ring."""
    mask, larger_mask = len(ring) - 1, len(larger) - 1
    for occurrence in range(first_occurrence, first_occurrence + num_occurrences):
        for column in range(ring.shape[1]):
            larger[occurrence & larger_mask, column] = ring[occurrence & mask, column]
