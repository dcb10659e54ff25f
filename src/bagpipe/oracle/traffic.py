"""What travels between trainers, counted from their plans, and what two other schemes would send.

The plans follow LRPP (logically replicated, physically partitioned; Agarwal et al., BagPipe, SOSP
2023, section 3.4). Each cached row has one owner. Another rank that uses the row gets a *replica*
for that step and sends a *gradient* back. A row-send is one row, as replica or gradient, sent from
one rank to one other. What is *urgent* is on the critical path. What is *overlapped* travels behind
compute.

Two schemes are compared with it, on the same batches of N trainers:

- *copies* (a replicated cache): every trainer keeps a copy of each cached row, and gradients are
  all-reduced. The gradient of each unique row of the global batch must reach the N - 1 other
  trainers, which makes N - 1 row-sends. A ring all-reduce sends twice as many (Patarasuk and Yuan,
  JPDC 69(2), 2009), so this count favours the scheme.
- *hashed* owners without lookahead: each row always lives on rank hash(row) % N. A use by another
  rank costs one row sent for the lookup and one gradient sent back, both on the critical path.

Only the rows that trainers send each other are counted: no ids, no sizes, and no traffic with the
store.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from bagpipe.oracle.merge import MergedGroup
from bagpipe.plan import GroupPlan, StepPlan
from bagpipe.types import Group, Int64Array, UInt64Array

REPLICA, GRADIENT = 0, 1
"""The first axis of counts: what travels."""
OVERLAPPED, URGENT = 0, 1
"""The second axis: when it travels."""


def replica_bytes(group: Group) -> int:
    """Returns the bytes of one row's weights, in the table's data type."""
    return group.embedding_dim * (4 if group.data_type == "fp32" else 2)


def gradient_bytes(group: Group) -> int:
    """Returns the bytes of one row's gradient, which is float32 whatever the table's data type."""
    return group.embedding_dim * 4


def sent_rows(plans: Sequence[GroupPlan]) -> Int64Array:
    """Counts the row-sends in one step of one group, from all ranks' plans.

    Returns:
        (2 what, 2 when, N senders, N receivers).
    """
    sent = np.zeros((2, 2, len(plans), len(plans)), np.int64)
    for rank, plan in enumerate(plans):
        exchange = plan.exchange
        assert exchange is not None
        sent[REPLICA, OVERLAPPED, rank] = exchange.replicas_overlapped.send_counts
        sent[REPLICA, URGENT, rank] = exchange.replicas_urgent.send_counts
        sent[GRADIENT, OVERLAPPED, rank] = exchange.sync_overlapped.send_counts
        sent[GRADIENT, URGENT, rank] = exchange.sync_urgent.send_counts
    return sent


def owned_rows(plans: Sequence[GroupPlan]) -> Int64Array:
    """Counts how many of the unique rows of a global batch each rank owns: (N,)."""
    owned = np.zeros(len(plans), np.int64)
    for rank, plan in enumerate(plans):
        exchange = plan.exchange
        assert exchange is not None
        # An owner updates each of its rows once, either urgently or overlapped.
        for schedule in (exchange.apply_urgent, exchange.apply_overlapped):
            owned[rank] += schedule.num_uniques
    return owned


def fetched_rows(plans: Sequence[GroupPlan]) -> Int64Array:
    """Counts the rows that each rank fetches from the store: (N,)."""
    return np.array(
        [len(plan.overlapped.fetch_rows) + len(plan.urgent.fetch_rows) for plan in plans], np.int64
    )


def hashed_owners(rows: Int64Array, num_trainers: int) -> UInt64Array:
    """Returns hash(row) % N for each row (n,).

    The hash is that of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), which leaves no pattern.
    """
    bits = rows.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (bits ^ (bits >> np.uint64(31))) % np.uint64(num_trainers)


def hashed_remote_uses(batch: MergedGroup, num_trainers: int) -> int:
    """Counts the (rank, row) uses of a global batch by other ranks than the row's hashed owner.

    As many rows travel, and as many gradients.
    """
    owners = hashed_owners(batch.unique_rows, num_trainers)
    is_used_by_owner = batch.users >> owners & np.uint64(1)
    return num_uses(batch) - int(is_used_by_owner.sum())


def num_uses(batch: MergedGroup) -> int:
    """Counts the (rank, row) uses of a global batch: the unique rows of its shares, added up."""
    return int(np.bitwise_count(batch.users).sum(dtype=np.int64))


@dataclass(kw_only=True)
class Balance:
    """How evenly something is divided among ranks.

    Steps are compared one by one, because in each the rank with most sets the pace.
    """

    total: int = 0
    total_of_largest: int = 0

    def add(self, by_rank: Int64Array) -> None:
        """Counts one step: what each rank has (N,)."""
        self.total += int(by_rank.sum())
        self.total_of_largest += int(by_rank.max())

    def ratio(self, num_trainers: int) -> float:
        """Returns the largest rank's part over the mean part, both summed over steps.

        It is 1 if all parts are equal, or if there is nothing to divide.
        """
        return num_trainers * self.total_of_largest / self.total if self.total else 1.0


@dataclass(kw_only=True)
class Traffic:
    """Totals over steps, groups and ranks."""

    num_trainers: int
    num_hosts: int = 1
    groups: tuple[Group, ...] = field(repr=False)
    num_steps: int = 0
    num_uniques: int = 0  # unique rows of global batches
    num_uses: int = 0  # (rank, row)
    # row-sends (2 what, 2 when), and their bytes
    rows: Int64Array = field(default_factory=lambda: np.zeros((2, 2), np.int64))
    sent_bytes: Int64Array = field(default_factory=lambda: np.zeros((2, 2), np.int64))
    between_hosts_bytes: int = 0
    copies_bytes: int = 0
    hashed_rows: int = 0
    hashed_bytes: int = 0
    owned: Balance = field(default_factory=Balance)  # of the unique rows of a global batch
    fetched: Balance = field(default_factory=Balance)
    sent: Balance = field(default_factory=Balance)  # row-sends

    @property
    def critical_share(self) -> float:
        """Share of the bytes sent that are urgent."""
        return _ratio(self.sent_bytes[:, URGENT].sum(), self.sent_bytes.sum())

    @property
    def between_hosts_share(self) -> float:
        """Share of the bytes sent that leave a host."""
        return _ratio(self.between_hosts_bytes, self.sent_bytes.sum())

    @property
    def local_share(self) -> float:
        """Share of (rank, row) uses for which nothing travels, because the rank owns the row."""
        return 1.0 - _ratio(self.rows[REPLICA].sum(), self.num_uses)

    @property
    def copies_rows(self) -> int:
        """Row-sends with copies: N - 1 for each unique row of the global batch."""
        return (self.num_trainers - 1) * self.num_uniques

    @property
    def rows_over_copies(self) -> float:
        """Row-sends over those with copies."""
        return _ratio(self.rows.sum(), self.copies_rows)

    @property
    def bytes_over_hashed(self) -> float:
        """Bytes sent over those with hashed owners."""
        return _ratio(self.sent_bytes.sum(), self.hashed_bytes)

    def add(self, plans: Sequence[StepPlan], batch: Sequence[MergedGroup]) -> None:
        """Counts one step.

        Args:
            plans: The plans of all ranks, in their order.
            batch: The global batch, by group.
        """
        by_rank = np.zeros((3, self.num_trainers), np.int64)  # owned, fetched, sent
        for index, (group, merged) in enumerate(zip(self.groups, batch, strict=True)):
            by_rank += self._add_group(group, [plan.groups[index] for plan in plans], merged)
        for balance, counts in zip((self.owned, self.fetched, self.sent), by_rank, strict=True):
            balance.add(counts)
        self.num_steps += 1

    def as_dict(self) -> dict[str, float]:
        """Returns all that was counted, by name.

        Rows and bytes are those of all trainers together, in a step on average.
        """
        whats = (("replicas", REPLICA), ("gradients", GRADIENT))
        moments = (("urgent", URGENT), ("overlapped", OVERLAPPED))
        kinds = [(f"{what}_{when}", (i, j)) for what, i in whats for when, j in moments]
        totals: dict[str, float] = {
            "unique_rows": self.num_uniques,
            "row_uses": self.num_uses,
            "sent_rows": int(self.rows.sum()),
            "sent_bytes": int(self.sent_bytes.sum()),
            **{f"{name}_rows": int(self.rows[kind]) for name, kind in kinds},
            **{f"{name}_bytes": int(self.sent_bytes[kind]) for name, kind in kinds},
            "copies_rows": self.copies_rows,
            "copies_bytes": self.copies_bytes,
            "hashed_rows": self.hashed_rows,
            "hashed_bytes": self.hashed_bytes,
        }
        steps = max(1, self.num_steps)
        return {f"{name}_per_step": total / steps for name, total in totals.items()} | {
            "critical_share_of_bytes": self.critical_share,
            "between_hosts_share_of_bytes": self.between_hosts_share,
            "local_share_of_uses": self.local_share,
            "most_owned_over_mean": self.owned.ratio(self.num_trainers),
            "most_fetched_over_mean": self.fetched.ratio(self.num_trainers),
            "most_sent_over_mean": self.sent.ratio(self.num_trainers),
            "sent_rows_over_copies": self.rows_over_copies,
            "sent_bytes_over_hashed": self.bytes_over_hashed,
        }

    def _add_group(
        self, group: Group, plans: Sequence[GroupPlan], batch: MergedGroup
    ) -> Int64Array:
        """Counts one group of a step; returns rows owned, fetched and sent by rank: (3, N)."""
        sent = sent_rows(plans)
        rows = sent.sum(axis=(2, 3))  # (2, 2)
        row_bytes = np.array([replica_bytes(group), gradient_bytes(group)])
        self.rows += rows
        self.sent_bytes += rows * row_bytes[:, None]
        ranks = range(self.num_trainers)
        hosts = np.array([rank * self.num_hosts // self.num_trainers for rank in ranks])
        leaving = sent[:, :, hosts[:, None] != hosts].sum(axis=(1, 2))  # (2 what,)
        self.between_hosts_bytes += int(leaving @ row_bytes)
        remote_uses = hashed_remote_uses(batch, self.num_trainers)
        self.hashed_rows += 2 * remote_uses
        self.hashed_bytes += remote_uses * (replica_bytes(group) + gradient_bytes(group))
        self.num_uses += num_uses(batch)
        self.num_uniques += len(batch.unique_rows)
        num_copies = (self.num_trainers - 1) * len(batch.unique_rows)
        self.copies_bytes += num_copies * gradient_bytes(group)
        return np.stack([owned_rows(plans), fetched_rows(plans), sent.sum(axis=(0, 1, 3))])


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0
