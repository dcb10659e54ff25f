"""The seam between the oracle and the policy that decides which rows leave a cache.

The oracle makes one policy for each group. It has the policy link all batches in order, lets it see
each batch when the lookahead window reaches it, and asks it for one plan after the other. What is
done with the plans does not depend on the policy, and training gives the same result with any.
"""

from __future__ import annotations

from typing import Protocol

from bagpipe.oracle.cache_plan import CachePlan
from bagpipe.oracle.eviction.cacher import Cacher
from bagpipe.oracle.linker import LinkedGroup
from bagpipe.oracle.merge import MergedGroup
from bagpipe.types import Group


class EvictionPolicy(Protocol):
    """Plans the cache of one group, step by step.

    Every plan must keep the invariants of docs/design.md. `link` may be called in another thread
    than the rest, any number of batches ahead.
    """

    @property
    def evicted_blindly(self) -> bool:
        """Whether a longer window might have changed the last plan.

        While it does, `lookahead="auto"` lets the window grow.
        """

    @property
    def num_used_slots(self) -> int:
        """How many slots were ever filled."""

    @property
    def nbytes(self) -> int:
        """Bytes of the policy's own state, without the batches in the window."""

    def link(self, batch: MergedGroup) -> LinkedGroup:
        """Finds the previous use of each row of the next batch."""

    def check_fits(self, linked: LinkedGroup) -> None:
        """Checks the batch that is to be admitted next.

        Raises:
            CacheTooSmallError: The batch alone needs more slots than there are.
        """

    def admit(self, linked: LinkedGroup) -> None:
        """Lets the window see one more batch, for which `check_fits` has not raised."""

    def plan(self) -> CachePlan:
        """Plans the oldest admitted batch that is not planned yet."""


class MakePolicy(Protocol):
    """Makes the policy of one group."""

    def __call__(
        self,
        group: Group,
        *,
        num_slots: int,
        max_lookahead: int,
        prefetch_depth: int,
        first_step: int,
        num_trainers: int,
    ) -> EvictionPolicy:
        """Makes a policy for a stream that starts at `first_step`.

        Args:
            group: The group that the cache serves.
            num_slots: Slots of the joint cache of all trainers.
            max_lookahead: The most batches that are ever admitted ahead of the one to plan.
            prefetch_depth: Steps before its use at which a row's overlapped transfer is issued.
            first_step: Number of the first batch.
            num_trainers: Trainers that share the joint cache.
        """


POLICIES: dict[str, MakePolicy] = {"min": Cacher}
"""By name all policies; `min` is Belady's MIN over the window."""
