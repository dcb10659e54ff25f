"""What an eviction policy decides for one step of one group's cache."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bagpipe.native.jit import jit
from bagpipe.oracle.linker import OCCURRENCES, BatchUses, LinkedGroup
from bagpipe.oracle.merge import MergedGroup
from bagpipe.plan import Transfers
from bagpipe.types import BoolArray, Int32Array

_NO_USES = np.empty(0, np.int32)


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """One step of one group's cache.

    With n trainers it is their joint cache: its slot s is slot s // n of rank s % n.
    """

    linked: LinkedGroup
    unique_slots: Int32Array  # (U,)
    overlapped: Transfers
    urgent: Transfers
    before: BatchUses
    """What the step before uses."""
    after: LinkedGroup | None
    """The batch of the step after; None if the window does not hold it."""

    @property
    def batch(self) -> MergedGroup:
        return self.linked.batch

    # A single trainer asks for neither of these. Where they are asked for, it is in a thread that
    # does not set the pace.
    @cached_property
    def was_used_before(self) -> BoolArray:
        """Whether the step before uses a row, too: (U,)."""
        return _are_among(self.linked.previous, self.before.first, self.before.num_uniques)

    @cached_property
    def is_used_next(self) -> BoolArray:
        """Whether the step after uses a row, too: (U,)."""
        previous = _NO_USES if self.after is None else self.after.previous
        return _come_again(previous, self.linked.uses.first, self.linked.uses.num_uniques)


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
