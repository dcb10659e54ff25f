"""What an eviction policy decides for one step of one group's cache."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bagpipe.native.jit import jit
from bagpipe.oracle.linker import OCCURRENCES, LinkedGroup
from bagpipe.oracle.merge import MergedGroup
from bagpipe.plan import Transfers
from bagpipe.types import BoolArray, Int32Array

_NO_USES = np.empty(0, np.int32)


class Neighbours:
    """Which rows of a step the steps right before and after it use, too.

    Nothing is computed until it is asked for, which may happen in any thread.
    """

    def __init__(
        self, linked: LinkedGroup, *, before: tuple[int, int], after: LinkedGroup | None
    ) -> None:
        """Keeps what links the step with those beside it.

        Args:
            linked: The step's batch.
            before: The first occurrence of the step before, and how many rows it uses.
            after: The batch of the step after; None if the window does not hold it.
        """
        self._previous, self._first_occurrence = linked.previous, linked.first_occurrence
        self._before = before
        self._previous_of_after = _NO_USES if after is None else after.previous

    @cached_property
    def was_used_before(self) -> BoolArray:
        """Whether the step before uses a row, too: (U,)."""
        return _are_among(self._previous, *self._before)

    @cached_property
    def is_used_next(self) -> BoolArray:
        """Whether the step after uses a row, too: (U,)."""
        return _come_again(self._previous_of_after, self._first_occurrence, len(self._previous))


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """One step of one group's cache.

    With n trainers it is their joint cache: its slot s is slot s // n of rank s % n.
    """

    batch: MergedGroup
    unique_slots: Int32Array  # (U,)
    overlapped: Transfers
    urgent: Transfers
    neighbours: Neighbours


@jit
def _are_among(uses: Int32Array, first_occurrence: int, num_uniques: int) -> BoolArray:
    """Whether each of `uses` (n,) is one of so many occurrences."""
    found = np.empty(len(uses), np.bool_)
    for index in range(len(uses)):
        found[index] = (uses[index] >= 0) & (
            ((uses[index] - first_occurrence) & OCCURRENCES) < num_uniques
        )
    return found


@jit
def _come_again(previous: Int32Array, first_occurrence: int, num_uniques: int) -> BoolArray:
    """Whether each of so many occurrences (num_uniques,) is among `previous` (n,)."""
    # The last place is for uses before them: a branch could not be foreseen.
    found = np.zeros(num_uniques + 1, np.bool_)
    for use in previous:
        index = (use - first_occurrence) & OCCURRENCES
        found[np.uint32(index if (use >= 0) & (index < num_uniques) else num_uniques)] = True
    return found[:num_uniques]
