"""The oracle: from de-duplicated batches to the plans of all ranks.

It works in two sequential stages, which may run in two threads. The first one links: it finds where
each row comes next. The second one plans: it lets the eviction policy see each batch once the
window reaches it, and asks the policy for slots and transfers. From these it makes each rank's
plan.

The oracle pulls batches only as it needs them, so whoever consumes the plans sets the pace. It
plans step t once the window holds `lookahead` batches beyond it or the data end. With
`lookahead="auto"` the window starts small. It grows by one batch a step while that can still save a
fetch, that is while rows leave the cache whose next use nobody knows, and while the window's own
memory stays within its budget.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Generic, Literal, TypeAlias, TypeVar

import xxhash

from bagpipe.errors import CacheTooSmallError, ConfigError
from bagpipe.native.pipeline import ordered_map
from bagpipe.native.spans import span
from bagpipe.native.workers import Workers
from bagpipe.oracle.cache_plan import CachePlan
from bagpipe.oracle.linker import LinkedGroup
from bagpipe.oracle.merge import MergedGroup
from bagpipe.oracle.policy import POLICIES
from bagpipe.oracle.ranks import RankPlanner
from bagpipe.oracle.shortage import with_needs_ahead
from bagpipe.plan import StepPlan
from bagpipe.topology import ONE_TRAINER, Topology
from bagpipe.types import Group

Payload = TypeVar("Payload")

AUTO_START = 8
"""Batches ahead with which `lookahead="auto"` starts."""
MAX_LOOKAHEAD = 4096
"""Farthest that the oracle ever looks, in batches."""
DEFAULT_LOOKAHEAD_BYTES = 1 << 30
_SEEN_BEHIND_REFUSED = 100
"""Batches behind one that the cache is too small for that are looked at before that is told, where
the window is shorter."""
_STEPS_AHEAD = 4
"""Steps of several trainers that are planned at a time."""


@dataclass(frozen=True, kw_only=True)
class DedupedBatch(Generic[Payload]):
    """One batch after de-duplication; `payload` is whatever travels with it to the trainer."""

    payload: Payload
    groups: tuple[MergedGroup, ...]
    share_sizes: tuple[int, ...]
    """How many of the batch's samples each rank has."""
    payload_bytes: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes that this batch holds while it is in the window."""
        return self.payload_bytes + sum(group.nbytes for group in self.groups)


Linked: TypeAlias = tuple[DedupedBatch[Payload], tuple[LinkedGroup, ...]]
"""A batch, and for each group its rows with their previous uses."""


@dataclass(frozen=True, kw_only=True)
class _JointStep(Generic[Payload]):
    """A step of the joint caches, from which the plans of all ranks are made in any thread."""

    step: int
    batch: DedupedBatch[Payload]
    caches: tuple[CachePlan, ...]  # by group
    num_ahead: int  # batches that the window held beyond it
    peak_slots: tuple[int, ...]  # by group
    failure: str  # why no more batches come, unless they just end


def check_window(
    groups: Sequence[Group],
    *,
    num_slots: Sequence[int],
    lookahead: int | Literal["auto"],
    prefetch_depth: int,
    num_trainers: int = 1,
    policy: str = "min",
) -> None:
    """Raises ConfigError for values out of range."""
    if policy not in POLICIES:
        raise ConfigError(f"no eviction policy is called {policy!r}, take one of {[*POLICIES]}")
    if lookahead != "auto" and not 1 <= lookahead <= MAX_LOOKAHEAD:
        raise ConfigError(
            f"lookahead is {lookahead}, must be 'auto' or from 1 to {MAX_LOOKAHEAD:,} batches"
        )
    if not 0 <= prefetch_depth <= MAX_LOOKAHEAD:
        raise ConfigError(
            f"prefetch_depth is {prefetch_depth}, must be from 0 to {MAX_LOOKAHEAD:,} steps"
        )
    if len(num_slots) != len(groups):
        raise ConfigError(f"num_slots has {len(num_slots)} entries for {len(groups)} groups")
    max_slots = (2**31 - 1) // num_trainers  # all trainers' are numbered together
    for group, slots in zip(groups, num_slots, strict=True):
        if not 1 <= slots <= max_slots:
            raise ConfigError(
                f"{group.name}: a cache of {slots:,} slots, must be from 1 to {max_slots:,}"
            )


def _hash_of(groups: Sequence[CachePlan]) -> str:
    """What tells a step of the joint cache from others'."""
    hasher = xxhash.xxh3_128()
    for group in groups:
        hasher.update(group.unique_slots.data)
        hasher.update(group.was_used_before.data)
        hasher.update(group.is_used_next.data)
        for moved in (group.overlapped, group.urgent):
            hasher.update(str(moved.fence_tick).encode())
            for array in (moved.evict_rows, moved.evict_slots, moved.fetch_rows, moved.fetch_slots):
                hasher.update(array.data)
    return hasher.hexdigest()


class Oracle:
    """Plans a stream of batches for all groups. One object plans one stream."""

    def __init__(
        self,
        groups: Sequence[Group],
        *,
        num_slots: Sequence[int],
        lookahead: int | Literal["auto"] = "auto",
        lookahead_bytes: int = DEFAULT_LOOKAHEAD_BYTES,
        prefetch_depth: int = 2,
        first_step: int = 0,
        topology: Topology = ONE_TRAINER,
        policy: str = "min",
        hash_plans: bool = False,
    ) -> None:
        """Makes the policies of all groups.

        Args:
            groups: The groups to plan for.
            num_slots: Slots of each trainer's cache, for each group.
            lookahead: Batches ahead that the window holds; "auto" lets it grow.
            lookahead_bytes: Memory up to which an automatic window grows.
            prefetch_depth: Steps before its use at which a row's overlapped transfer is issued.
            first_step: Number of the first batch.
            topology: The trainers that share the caches, and those to plan for.
            policy: Which of `POLICIES` decides what leaves the caches.
            hash_plans: Whether each step tells the hash of the joint plan, for ranks that are
                planned elsewhere.

        Raises:
            ConfigError: A value is out of range.
        """
        topology.check(groups)
        check_window(
            groups,
            num_slots=num_slots,
            lookahead=lookahead,
            prefetch_depth=prefetch_depth,
            num_trainers=topology.num_trainers,
            policy=policy,
        )
        self._groups, self._num_slots, self._topology = tuple(groups), tuple(num_slots), topology
        self._hash_plans = hash_plans
        self._is_auto = lookahead == "auto"
        self._lookahead = AUTO_START if lookahead == "auto" else lookahead
        self._lookahead_bytes = lookahead_bytes
        self._prefetch_depth, self._first_step = prefetch_depth, first_step
        self._peak_slots = (0,) * len(groups)
        self._policies = [
            POLICIES[policy](
                group,
                num_slots=slots * topology.num_trainers,
                max_lookahead=MAX_LOOKAHEAD if lookahead == "auto" else lookahead,
                prefetch_depth=prefetch_depth,
                first_step=first_step,
                num_trainers=topology.num_trainers,
            )
            for group, slots in zip(groups, num_slots, strict=True)
        ]

    @property
    def peak_slots(self) -> tuple[int, ...]:
        """For each group how many slots were ever filled, up to the last plan yielded."""
        return self._peak_slots

    @property
    def nbytes(self) -> int:
        """Bytes of the policies' own state; the window's batches are not included."""
        return sum(policy.nbytes for policy in self._policies)

    def link(self, batches: Iterable[DedupedBatch[Payload]]) -> Iterator[Linked[Payload]]:
        """The first stage. May be any number of batches ahead of the second."""
        for batch in batches:
            with span("oracle.link"):
                pairs = zip(self._policies, batch.groups, strict=True)
                linked = tuple(policy.link(group) for policy, group in pairs)
            yield batch, linked

    def plan(
        self, linked: Iterable[Linked[Payload]], workers: Workers | None = None
    ) -> Iterator[tuple[tuple[StepPlan, ...], DedupedBatch[Payload]]]:
        """The second stage: yields each batch with the plans of the ranks planned for, in order.

        The way from the joint cache to each trainer depends on one step alone: it runs on
        `workers`, if any.

        Raises:
            CacheTooSmallError: A batch alone needs more slots than the cache has. Batches behind it
                have been looked at. It is raised after the plans of all batches before, as is
                whatever `linked` raises.
            ConfigError: A rank needs more replicas than it has room for.
        """
        steps = self._plan_caches(linked)
        # A single trainer has the whole cache: its plan costs less than handing it to a worker.
        if workers is None or self._topology.num_trainers == 1:
            planned: Iterator[tuple[_JointStep[Payload], tuple[StepPlan, ...]]] = map(
                self._plan_trainers, steps
            )
        else:
            planned = ordered_map(
                self._plan_trainers, steps, workers, ahead=_STEPS_AHEAD, urgent=True
            )
        for step, plans in planned:
            self._peak_slots = step.peak_slots
            yield plans, step.batch

    def _plan_caches(self, batches: Iterable[Linked[Payload]]) -> Iterator[_JointStep[Payload]]:
        """The sequential part of the second stage."""
        source = iter(batches)
        window: deque[DedupedBatch[Payload]] = deque()
        window_bytes = 0
        failure: BaseException | None = None
        has_more = True
        step = self._first_step
        while True:
            # The batch to plan is one of them, hence one more than the lookahead.
            while has_more and len(window) <= self._lookahead:
                try:
                    batch, linked = next(source)
                    self._admit(linked)
                except StopIteration:
                    has_more = False
                except BaseException as error:
                    # It is raised at its own place, after the plans of all batches before it.
                    failure, has_more = error, False
                else:
                    window.append(batch)
                    window_bytes += batch.nbytes
            if not window:
                break
            batch = window.popleft()
            window_bytes -= batch.nbytes
            with span("oracle.plan"):
                caches = tuple(policy.plan() for policy in self._policies)
            yield _JointStep(
                step=step,
                batch=batch,
                caches=caches,
                num_ahead=len(window),
                peak_slots=tuple(policy.num_used_slots for policy in self._policies),
                failure="" if failure is None else str(failure),
            )
            self._adapt(window_bytes, batch.nbytes)
            step += 1
        if isinstance(failure, CacheTooSmallError):
            behind = islice(source, max(self._lookahead, _SEEN_BEHIND_REFUSED))
            failure = with_needs_ahead(
                failure,
                chain([linked], (groups for _, groups in behind)),
                groups=self._groups,
                num_slots=self._num_slots,
                num_trainers=self._topology.num_trainers,
            )
        if failure is not None:
            raise failure

    def _admit(self, linked: Sequence[LinkedGroup]) -> None:
        """Lets all groups see the batch, or none."""
        # A policy that has seen a batch can't forget it, so all are asked first.
        for policy, group in zip(self._policies, linked, strict=True):
            policy.check_fits(group)
        for policy, group in zip(self._policies, linked, strict=True):
            policy.admit(group)

    def _plan_trainers(
        self, planned: _JointStep[Payload]
    ) -> tuple[_JointStep[Payload], tuple[StepPlan, ...]]:
        """Returns the plans of all ranks that are planned for.

        It changes nothing here, so that several steps may be planned at a time.
        """
        step, batch = planned.step, planned.batch
        issue_tick = max(self._first_step, step - self._prefetch_depth)
        planners = [
            RankPlanner(
                self._groups[index],
                planned.caches[index],
                step=step,
                num_slots=self._num_slots[index],
                num_replicas=self._topology.num_replicas(index),
                overlap=self._topology.overlap,
            )
            for index in range(len(self._groups))
        ]
        # A single trainer need not tell others.
        has_urgent = self._topology.num_trainers > 1 and any(
            len(moved) > 0
            for group in planned.caches
            for moved in (group.urgent.evict_slots, group.urgent.fetch_slots)
        )
        joint_hash = _hash_of(planned.caches) if self._hash_plans else None
        plans = tuple(
            StepPlan(
                step=step,
                issue_tick=issue_tick,
                batch_size=batch.share_sizes[rank],
                groups=tuple(planner.plan(rank) for planner in planners),
                lookahead=planned.num_ahead,
                has_urgent=has_urgent,
                joint_hash=joint_hash,
                failure=planned.failure,
            )
            for rank in self._topology.ranks
        )
        return planned, plans

    def _adapt(self, window_bytes: int, batch_bytes: int) -> None:
        """Lets an automatic window grow by a batch if that can save a fetch and fits the budget."""
        if not self._is_auto or self._lookahead >= MAX_LOOKAHEAD:
            return
        # The planned batch is still held, and one more would be.
        if window_bytes + 2 * batch_bytes > self._lookahead_bytes:
            return
        if any(policy.evicted_blindly for policy in self._policies):
            self._lookahead += 1
