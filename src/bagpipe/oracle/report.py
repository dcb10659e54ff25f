"""What the oracle saw and decided, added up from plans: hits, rows and bytes, slots, lookahead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from bagpipe.plan import HostStepPlan
from bagpipe.types import Group


@dataclass(kw_only=True)
class OracleReport:
    """Totals over all steps counted so far and over all groups and trainers.

    Rows that are fetched and written back are records; bytes are those of the records.
    """

    num_steps: int = 0
    num_lookups: int = 0
    num_uniques: int = 0  # unique rows used, summed over steps
    num_fetched: int = 0
    num_fetched_urgent: int = 0  # those of them that are urgent
    num_written_back: int = 0
    num_waiting_steps: int = 0  # steps with an urgent transfer
    fetched_bytes: int = 0
    written_back_bytes: int = 0
    peak_slots: int = 0
    total_lookahead: int = 0
    max_lookahead: int = 0
    _record_bytes: Sequence[int] = field(default=(), repr=False)

    @classmethod
    def for_groups(cls, groups: Sequence[Group]) -> OracleReport:
        """Returns an empty report for plans of these groups."""
        return cls(_record_bytes=[group.record_bytes for group in groups])

    @property
    def hit_rate(self) -> float:
        """Share of the unique rows of each step that were in the cache already."""
        return 1.0 - self.num_fetched / self.num_uniques if self.num_uniques else 0.0

    @property
    def fetched_rows_per_step(self) -> float:
        """Rows fetched a step, on average."""
        return self.num_fetched / max(1, self.num_steps)

    @property
    def written_back_rows_per_step(self) -> float:
        """Rows written back a step, on average."""
        return self.num_written_back / max(1, self.num_steps)

    @property
    def mean_lookahead(self) -> float:
        """How many batches beyond the one that it planned the oracle had seen, on average."""
        return self.total_lookahead / max(1, self.num_steps)

    def add(self, plan: HostStepPlan, peak_slots: Sequence[int]) -> None:
        """Counts the plan of a step with one trainer; `peak_slots` is by group."""
        self.add_ranks((plan,), sum(group.num_uniques for group in plan.groups), peak_slots)

    def add_ranks(
        self, plans: Sequence[HostStepPlan], num_uniques: int, peak_slots: Sequence[int]
    ) -> None:
        """Counts the plans of all ranks for one step.

        Args:
            plans: One plan for each rank.
            num_uniques: Unique rows of the global batch, over all groups.
            peak_slots: For each group the most slots that were in use at a time.
        """
        first = plans[0]
        self.num_steps += 1
        self.num_uniques += num_uniques
        self.total_lookahead += first.lookahead
        self.max_lookahead = max(self.max_lookahead, first.lookahead)
        self.peak_slots = sum(peak_slots)
        num_urgent = sum(self._add_transfers(plan) for plan in plans)
        self.num_waiting_steps += num_urgent > 0 or first.has_urgent

    def _add_transfers(self, plan: HostStepPlan) -> int:
        """Counts what one trainer looks up and moves; returns how many rows it fetches urgently."""
        num_all_urgent = 0
        for group, record_bytes in zip(plan.groups, self._record_bytes, strict=True):
            num_urgent = len(group.urgent.fetch_rows)
            num_fetched = len(group.overlapped.fetch_rows) + num_urgent
            num_written_back = len(group.overlapped.evict_rows) + len(group.urgent.evict_rows)
            self.num_lookups += group.num_lookups
            self.num_fetched += num_fetched
            self.num_fetched_urgent += num_urgent
            self.num_written_back += num_written_back
            self.fetched_bytes += num_fetched * record_bytes
            self.written_back_bytes += num_written_back * record_bytes
            num_all_urgent += num_urgent
        return num_all_urgent

    def as_dict(self) -> dict[str, float]:
        """All totals and rates by name."""
        totals = {name: value for name, value in asdict(self).items() if not name.startswith("_")}
        rates = {
            "hit_rate": self.hit_rate,
            "fetched_rows_per_step": self.fetched_rows_per_step,
            "written_back_rows_per_step": self.written_back_rows_per_step,
            "mean_lookahead": self.mean_lookahead,
        }
        return totals | rates
