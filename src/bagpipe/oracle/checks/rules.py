"""What is said of a plan that breaks an invariant: step, group, rank, and which one."""

from __future__ import annotations

import numpy as np

from bagpipe.errors import PlanError
from bagpipe.types import Group, Int32Array, Int64Array


class Rules:
    """Judges the step at hand of one group."""

    def __init__(self, group: Group) -> None:
        self.step = -1
        """The step at hand."""
        self._group = group

    def expect(
        self, invariant: int, what: str, holds: bool | np.bool_, rank: int | None = None
    ) -> None:
        """Raises PlanError, which says what is wrong, unless it `holds`."""
        if not holds:
            where = "" if rank is None else f", rank {rank}"
            raise PlanError(
                f"step {self.step}, {self._group.name}{where}: {what} (invariant {invariant} of "
                "docs/design.md)"
            )

    def expect_places(
        self, places: Int32Array | Int64Array, end: int, rank: int, *, may_repeat: bool = False
    ) -> None:
        """Expects places (n,), slots, rows or indices, to be different ones from 0 to `end`."""
        is_inside = len(places) == 0 or (places.min() >= 0 and places.max() < end)
        self.expect(3, f"a place lies outside the {end:,} that there are", is_inside, rank)
        is_unique = may_repeat or len(np.unique(places)) == len(places)
        self.expect(2, "a place is named twice", is_unique, rank)
