"""Why the oracle on the device has stopped, and what the host makes of it.

`State.alert` holds a reason, the batch's number, and two numbers that tell more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bagpipe.device_oracle.state import Capacity, Window
from bagpipe.errors import BagpipeError, CacheTooSmallError, PlanError, UsageError
from bagpipe.lookups import GroupLookups, id_outside_table
from bagpipe.types import Group, Jagged

RUNNING, BAD_ID, NO_ROOM, TOO_MANY_ROWS, INDEX_FULL = range(5)
"""Reasons: none; an id outside its table (its lookup); more unique rows than `max_uniques` (how
many), or than the cache has slots (how many); more rows in the index of rows than it has entries
(how many it has), which is a fault of the oracle's own."""


@dataclass(frozen=True, kw_only=True)
class Alert:
    """Why the device stopped at a batch. Nothing of that batch has been taken in."""

    reason: int
    batch: int
    detail: int
    """The lookup of the first bad id, or the number of unique rows."""

    @classmethod
    def of(cls, alert: Sequence[int]) -> Alert | None:
        """What `State.alert` says. None: it runs."""
        reason, batch, detail, _ = alert
        return None if reason == RUNNING else cls(reason=reason, batch=batch, detail=detail)

    def as_error(
        self, group: Group, window: Window, batch: Jagged, lookups: GroupLookups
    ) -> BagpipeError:
        """The error to raise for it, which is that of the oracle on the host.

        A capacity that must grow is no error of the user's; `DeviceOracle.grow` is for it.
        """
        if self.reason == BAD_ID:
            return _bad_id(group, batch, lookups, self.detail)
        if self.reason == TOO_MANY_ROWS:
            return CacheTooSmallError(
                step=self.batch,
                group=group.name,
                num_uniques=self.detail,
                num_needed=self.detail,
                num_slots=window.num_slots,
            )
        if self.reason == INDEX_FULL:
            return PlanError(
                f"{group.name}: at step {self.batch} the oracle on the device knows more rows than "
                f"its index has entries ({self.detail:,}), which is a fault of its own: plan on "
                "the host (oracle = 'process')"
            )
        return UsageError(
            f"{group.name}: the oracle on the device has stopped at batch {self.batch} (reason "
            f"{self.reason}): let it grow or go on first"
        )


def grown(
    capacity: Capacity,
    *,
    num_lookups: int = 0,
    num_bags: int = 0,
    num_uniques: int = 0,
    is_jagged: bool = False,
    is_weighted: bool = False,
    is_wide: bool = False,
) -> Capacity:
    """`capacity`, or one with room for such a batch and a quarter more of what was short."""

    def room(have: int, need: int) -> int:
        return have if need <= have else need + need // 4

    return Capacity(
        max_lookups=room(capacity.max_lookups, num_lookups),
        max_bags=room(capacity.max_bags, num_bags),
        max_uniques=room(capacity.max_uniques, num_uniques),
        is_jagged=capacity.is_jagged or is_jagged,
        is_weighted=capacity.is_weighted or is_weighted,
        is_wide=capacity.is_wide or is_wide,
    )


def _bad_id(group: Group, batch: Jagged, lookups: GroupLookups, position: int) -> BagpipeError:
    feature = 0
    while position >= lookups.feature_lengths[feature]:
        position -= int(lookups.feature_lengths[feature])
        feature += 1
    return id_outside_table(group, batch, lookups, feature, position)
