"""An optional run-time check that plans keep the invariants 1 to 6 of docs/design.md.

It replays what an executor does.

The replay knows nothing of how the oracle decides: it moves rows between slots at the ticks that
the plans name and looks whether every row is where the plan says, whether a slot is filled while it
is still in use, and whether anything is lost. It costs 16 bytes a row and 8 a slot, and about as
much time as planning.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from bagpipe.errors import PlanError
from bagpipe.oracle.dedup import DedupedGroup
from bagpipe.oracle.oracle import DedupedBatch
from bagpipe.plan import GroupPlan, StepPlan, Transfers
from bagpipe.types import Group, Int64Array

Payload = TypeVar("Payload")
_NOWHERE = -1


def checked(
    groups: Sequence[Group],
    num_slots: Sequence[int],
    planned: Iterable[tuple[StepPlan, DedupedBatch[Payload]]],
) -> Iterator[tuple[StepPlan, DedupedBatch[Payload]]]:
    """Passes plans on until one breaks an invariant.

    Raises:
        PlanError: one does; it names step, group and invariant.
    """
    checkers = [PlanChecker(group, slots) for group, slots in zip(groups, num_slots, strict=True)]
    for plan, batch in planned:
        for checker, group_plan, merged in zip(checkers, plan.groups, batch.groups, strict=True):
            checker.check(plan.step, plan.issue_tick, group_plan, merged.shares[0])
        yield plan, batch
    for checker in checkers:
        checker.finish()


class PlanChecker:
    """Replays one group's plans.

    A step is judged once every plan that acts before it is known, at the latest by `finish`.
    """

    def __init__(self, group: Group, num_slots: int) -> None:
        self._group, self._num_slots = group, num_slots
        self._rows_of_slots = np.full(num_slots, _NOWHERE, np.int64)
        self._slots_of_rows = np.full(group.num_rows, _NOWHERE, np.int32)
        self._evicted_at = np.full(group.num_rows, -1, np.int64)
        self._free_after = np.full(num_slots, -1, np.int64)  # the last step that used the slot
        self._waiting: deque[tuple[int, int, GroupPlan, DedupedGroup]] = deque()
        self._num_issued = (
            0  # how many of the waiting plans have had their overlapped transfers replayed
        )

    def check(self, step: int, issue_tick: int, plan: GroupPlan, batch: DedupedGroup) -> None:
        """Takes the plan of the next step.

        Replays all ticks before the one at which its overlapped transfers are issued.
        """
        self._expect(
            not self._waiting or step == self._waiting[-1][0] + 1, step, 7, "steps are not in order"
        )
        self._expect(
            0 <= issue_tick <= step,
            step,
            4,
            f"overlapped transfers at tick {issue_tick}, after the step itself",
        )
        self._waiting.append((step, issue_tick, plan, batch))
        while self._waiting[0][0] < issue_tick:
            self._replay_step()

    def finish(self) -> None:
        """Replays what is left after the last plan."""
        while self._waiting:
            self._replay_step()

    def _replay_step(self) -> None:
        """Replays tick and compute of the oldest waiting step.

        Its urgent transfers come first, then all overlapped ones that are due, then residency.
        """
        step, issue_tick, plan, batch = self._waiting[0]
        # a prefetch depth of 0: its own overlapped transfers are due at this very tick
        if self._num_issued == 0:
            self._expect(issue_tick == step, step, 4, "overlapped transfers were never issued")
        self._replay(step, step, plan.urgent)
        while self._num_issued < len(self._waiting) and self._waiting[self._num_issued][1] <= step:
            due_step, due_tick, due, _ = self._waiting[self._num_issued]
            self._replay(due_step, due_tick, due.overlapped)
            self._num_issued += 1
        self._check_residency(step, plan, batch)
        self._free_after[plan.schedule.unique_slots] = step
        self._waiting.popleft()
        self._num_issued -= 1

    def _replay(self, step: int, tick: int, transfers: Transfers) -> None:
        rows, slots = transfers.evict_rows, transfers.evict_slots
        self._expect_slots(step, slots)
        self._expect(
            np.array_equal(self._rows_of_slots[slots], rows),
            step,
            6,
            "an evicted row is not in the slot it leaves",
        )
        self._expect(
            bool((self._free_after[slots] < tick).all()),
            step,
            5,
            "a slot is evicted before its last use",
        )
        self._rows_of_slots[slots] = _NOWHERE
        self._slots_of_rows[rows] = _NOWHERE
        self._evicted_at[rows] = tick

        rows, slots = transfers.fetch_rows, transfers.fetch_slots
        self._expect_slots(step, slots)
        self._expect(
            bool((self._rows_of_slots[slots] == _NOWHERE).all()),
            step,
            5,
            "a fetch fills a slot still in use",
        )
        self._expect(
            bool((self._slots_of_rows[rows] == _NOWHERE).all()),
            step,
            2,
            "a row is fetched that is in the cache",
        )
        self._expect(len(np.unique(rows)) == len(rows), step, 2, "a row is fetched twice")
        latest = int(self._evicted_at[rows].max(initial=-1))
        self._expect(
            latest <= transfers.fence_tick,
            step,
            4,
            f"a fetch does not wait for the write-back of tick {latest}",
        )
        self._rows_of_slots[slots] = rows
        self._slots_of_rows[rows] = slots

    def _check_residency(self, step: int, plan: GroupPlan, batch: DedupedGroup) -> None:
        slots: Int64Array = plan.schedule.unique_slots.astype(np.int64)
        self._expect_slots(step, plan.schedule.unique_slots)
        self._expect(
            np.array_equal(self._rows_of_slots[slots], batch.unique_rows),
            step,
            1,
            "a row is not in its slot",
        )
        self._expect(
            np.array_equal(plan.lookup_slots, slots[batch.inverse]),
            step,
            1,
            "a lookup reads another row's slot",
        )

    def _expect_slots(self, step: int, slots: np.ndarray[tuple[int], np.dtype[np.int32]]) -> None:
        in_range = len(slots) == 0 or (slots.min() >= 0 and slots.max() < self._num_slots)
        self._expect(
            bool(in_range), step, 3, f"a slot lies outside the cache of {self._num_slots:,}"
        )
        self._expect(len(np.unique(slots)) == len(slots), step, 2, "a slot is named twice")

    def _expect(self, condition: bool, step: int, invariant: int, what: str) -> None:
        if not condition:
            raise PlanError(
                f"step {step}, {self._group.name}: {what} (invariant {invariant} of docs/design.md)"
            )
