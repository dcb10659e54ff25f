"""The plan of a step: all that a trainer must do with embeddings in it. Values without behaviour.

Sizes in the shape comments: F features, B samples, L lookups, U unique rows of one batch, all of
one group; see `bagpipe.types`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Protocol, TypeAlias

from typing_extensions import TypeVar

from bagpipe.types import Float32Array, Int32Array, Int64Array

MAX_PIECE_LENGTH = 128
"""Longest run of bags that one piece sums; it bounds a kernel's work however skewed ids are."""


@dataclass(frozen=True, kw_only=True)
class GradientSchedule:
    """The order and grouping of a batch's backward sums, decided from ids alone.

    Unique row u is in ``unique_slots[u]``. Piece p sums gradient rows
    ``bags[piece_offsets[p]:piece_offsets[p + 1]]`` one after the other, at most
    ``MAX_PIECE_LENGTH`` of them. Piece u < U is the first of unique row u; further pieces of rows
    with many lookups follow: those of row ``long_uniques[k]`` are ``U + long_offsets[k] .. U +
    long_offsets[k + 1]``, and its gradient is its first piece plus the sum of the further ones.
    """

    unique_slots: Int32Array  # (U,)
    bags: Int32Array  # (L,) output rows b * F + f, by unique row, in lookup order within a row
    piece_offsets: Int32Array  # (num_pieces + 1,) into bags
    long_uniques: Int32Array  # (num_long,) ascending
    long_offsets: Int32Array  # (num_long + 1,), 0 first
    bag_weights: Float32Array | None = None  # (L,) factors of the gradient rows in bags; None: 1

    @property
    def num_uniques(self) -> int:
        return len(self.unique_slots)


@dataclass(frozen=True, kw_only=True)
class Transfers:
    """Records to move at one moment: evicted slots are read first, then fetched ones filled.

    A slot in ``fetch_slots`` was never filled before, or it stands in the ``evict_slots`` of these
    transfers or of earlier ones. The fetch may read the store once every eviction of ticks up to
    ``fence_tick`` has been written (-1: nothing to wait for).
    """

    evict_rows: Int64Array  # (num_evicted,)
    evict_slots: Int32Array  # (num_evicted,)
    fetch_rows: Int64Array  # (num_fetched,)
    fetch_slots: Int32Array  # (num_fetched,)
    fence_tick: int


@dataclass(frozen=True, kw_only=True)
class RowExchange:
    """Rows of one group that one trainer sends and receives at one moment, packed by rank."""

    send: Int32Array  # (num_sent,) indices of what is sent, those for rank 0 first
    send_counts: Int64Array  # (num_trainers,)
    receive_counts: Int64Array  # (num_trainers,)

    @property
    def num_received(self) -> int:
        return sum(self.receive_counts.tolist())  # numpy takes ten times as long


@dataclass(frozen=True, kw_only=True)
class GroupExchange:
    """What one of several trainers exchanges in one step for one group.

    ``replicas_urgent`` and ``replicas_overlapped`` are copies of rows: a trainer sends slots that
    it owns, and receives into the slots from ``first_replica`` on, the overlapped ones first, each
    ordered by rank. ``sync_urgent`` and ``sync_overlapped`` are gradients: a trainer sends the sums
    of its own bags, index u for the u-th unique row of its schedule.

    Urgent ones travel on the critical path, right before or after the step's compute. Overlapped
    replicas travel behind the compute of the step before, overlapped gradients behind that of the
    step after.

    ``apply_urgent`` and ``apply_overlapped`` say which rows the trainer then updates, each once.
    Their bags are places in the trainer's own sums (U,) followed by the sums received with the
    gradients of the same moment, so that a row's contributions are added in the order of ranks.
    """

    first_replica: int
    replicas_overlapped: RowExchange
    replicas_urgent: RowExchange
    sync_urgent: RowExchange
    sync_overlapped: RowExchange
    apply_urgent: GradientSchedule
    apply_overlapped: GradientSchedule

    @property
    def num_room(self) -> int:
        """Places for received sums behind the trainer's own; both moments use the same ones."""
        return max(self.sync_urgent.num_received, self.sync_overlapped.num_received)


@dataclass(frozen=True, kw_only=True)
class GroupPlan:
    """What one trainer does in one step with one group.

    Tick t is the moment just before the compute of step t. ``overlapped`` transfers are issued at
    the plan's ``issue_tick``, behind the compute of earlier steps. ``urgent`` ones are issued at
    tick ``step``, on the critical path, because their slot or their row is not free sooner. A
    plan's overlapped transfers come before its urgent ones; otherwise, at one tick, urgent ones of
    an earlier plan come before overlapped ones of a later plan.
    """

    # (L,) feature-major: for each lookup the index of its row in schedule.unique_slots
    inverse: Int32Array
    bag_offsets: Int32Array | None  # (F * B + 1,) into inverse; None: one lookup in every bag
    # (B * F,) by output row, 1 / bag length for mean pooling; None: all features are summed
    bag_scales: Float32Array | None
    schedule: GradientSchedule
    overlapped: Transfers
    urgent: Transfers
    lookup_weights: Float32Array | None = None  # (L,) factors of the rows looked up; None: 1
    exchange: GroupExchange | None = None
    """With other trainers; None if there are none, and `schedule` says all about the update."""

    @property
    def lookup_slots(self) -> Int32Array:
        """The slot of each lookup: (L,). The device makes its own from the same two arrays."""
        return self.schedule.unique_slots[self.inverse]

    @property
    def num_lookups(self) -> int:
        return len(self.inverse)

    @property
    def num_uniques(self) -> int:
        return self.schedule.num_uniques


class HostGroupPlan(Protocol):
    """What the host must know of one group's plan, wherever the plan was made."""

    @property
    def overlapped(self) -> Transfers: ...
    @property
    def urgent(self) -> Transfers: ...
    @property
    def exchange(self) -> GroupExchange | None: ...
    @property
    def num_lookups(self) -> int: ...
    @property
    def num_uniques(self) -> int: ...


GroupPlanT = TypeVar("GroupPlanT", bound=HostGroupPlan, default=GroupPlan, covariant=True)


@dataclass(frozen=True, kw_only=True)
class StepPlan(Generic[GroupPlanT]):
    """All that a trainer must do with embeddings in one step."""

    step: int
    issue_tick: int
    """When overlapped transfers are issued: `prefetch_depth` steps ahead, within the stream."""
    batch_size: int
    groups: tuple[GroupPlanT, ...]
    lookahead: int  # batches that the oracle had seen beyond this one when it planned it
    has_urgent: bool = False
    """Whether any trainer has urgent transfers.

    Then no gradient of the step before may still be on its way when they are issued.
    """
    joint_hash: str | None = None
    """A hash of the plans of all trainers; None where all of them are planned in one place."""
    failure: str = ""
    """Why the last batch seen is the last one; empty where the batches just end there."""


HostStepPlan: TypeAlias = StepPlan[HostGroupPlan]
"""What the host must know of a step's plan."""
