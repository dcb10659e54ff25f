"""The unique rows of a stream's batches, read once and replayed often (`bagpipe.oracle.dry_run`).

They are all that a Cacher looks at.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TypeAlias

import numpy as np

from bagpipe.errors import ConfigError, DataError
from bagpipe.jagged import share_of
from bagpipe.native.pipeline import ordered_map
from bagpipe.native.workers import Workers
from bagpipe.oracle.dedup import DedupedGroup, dedup
from bagpipe.oracle.merge import MergedGroup, merge
from bagpipe.oracle.oracle import DedupedBatch
from bagpipe.oracle.shards import num_slots_needed
from bagpipe.oracle.sizes import rows_that_hold, slots_of
from bagpipe.topology import Topology
from bagpipe.types import Group, Int64Array, Jagged

OnProgress: TypeAlias = Callable[[str, int, int], None]
"""Is called with a stage's name, how much of it is done, and how much there is."""

_NO_ROWS = np.empty(0, np.int64)
_NO_LOOKUPS = np.empty(0, np.int32)
_NO_PIECES = np.zeros(1, np.int32)


@dataclass(frozen=True, kw_only=True)
class LargestBatch:
    """The batch of a trace that needs the most slots of a group's joint cache."""

    group: str
    step: int
    num_uniques: int
    num_needed: int  # slots; more than the rows where shards are uneven


@dataclass(frozen=True, kw_only=True)
class Trace:
    """The unique rows of each batch of a stream; with several trainers a batch is a global one."""

    groups: tuple[Group, ...]
    batches: tuple[DedupedBatch[None], ...]
    num_trainers: int = 1
    num_hosts: int = 1
    """How many hosts the trainers are on. Hosts differ by at most one trainer."""

    @property
    def nbytes(self) -> int:
        """Bytes that the trace holds."""
        return sum(batch.nbytes for batch in self.batches)

    @property
    def uniques_per_step(self) -> float:
        """Unique rows of a batch, on average."""
        return sum(num_uniques(batch) for batch in self.batches) / len(self.batches)

    @property
    def smallest_cache(self) -> int:
        """Rows over all groups, of each trainer, of the smallest cache that holds each batch."""
        needed = np.array([batch.num_needed for batch in self.largest])
        return rows_that_hold(-(-needed // self.num_trainers), self.groups, self.slots)

    @property
    def largest(self) -> tuple[LargestBatch, ...]:
        """For each group the batch that needs the most slots."""
        needed = np.array([self._slots_needed(batch) for batch in self.batches])
        return tuple(
            LargestBatch(
                group=group.name,
                step=step,
                num_uniques=len(self.batches[step].groups[index].unique_rows),
                num_needed=int(needed[step, index]),
            )
            for index, (group, step) in enumerate(
                zip(self.groups, needed.argmax(axis=0).tolist(), strict=True)
            )
        )

    def slots(self, cache_rows: int) -> list[int]:
        """Returns the slots of each trainer by group, for a cache of so many rows each.

        All trainers together get no more slots than a group has rows, up to rounding.
        """
        pairs = zip(slots_of(cache_rows, self.groups), self.groups, strict=True)
        return [min(count, -(-group.num_rows // self.num_trainers)) for count, group in pairs]

    def topology(self, ranks: Sequence[int]) -> Topology:
        """Returns the topology for plans of these ranks.

        Each rank has replica slots for all rows of its largest share.
        """
        num_replicas = [
            max(len(places) for group in groups for places in group.places)
            for groups in zip(*(batch.groups for batch in self.batches), strict=True)
        ]
        return Topology(
            num_trainers=self.num_trainers,
            ranks=tuple(ranks),
            num_replica_slots=tuple(num_replicas),
        )

    def _slots_needed(self, batch: DedupedBatch[None]) -> list[int]:
        pairs = zip(self.groups, batch.groups, strict=True)
        return [num_slots_needed(rows.unique_rows, group.num_rows) for group, rows in pairs]


def read_trace(
    groups: Sequence[Group],
    batches: Iterable[Jagged],
    *,
    max_batches: int,
    num_trainers: int = 1,
    num_hosts: int = 1,
    threads: int | None = None,
    progress: OnProgress | None = None,
) -> Trace:
    """Reads and de-duplicates up to `max_batches` batches.

    Args:
        groups: The groups whose rows to keep.
        batches: The batches; with several trainers the global ones.
        max_batches: How many to read at most.
        num_trainers: How many trainers share each batch.
        num_hosts: On how many hosts they are.
        threads: How many threads de-duplicate; by default one for each core.
        progress: Is told how much is done.

    Raises:
        ConfigError: There are too many trainers, or more hosts than trainers.
        DataError: There is no batch, or one can't be read or de-duplicated.
    """
    Topology(num_trainers=num_trainers, ranks=(0,), num_replica_slots=(0,) * len(groups)).check(
        groups
    )
    if not 1 <= num_hosts <= num_trainers:
        raise ConfigError(f"{num_hosts} hosts for {num_trainers} trainers, must be from 1 to that")
    num_threads = threads or os.cpu_count() or 1
    kept = []
    with Workers("bagpipe-dedup", num_threads) as workers:
        found = ordered_map(
            partial(_unique_rows, groups, num_trainers),
            islice(batches, max_batches),
            workers,
            ahead=2 * num_threads,
        )
        for batch in found:
            kept.append(batch)
            if progress is not None:
                progress("reading batches", len(kept), max_batches)
    if not kept:
        raise DataError("a dry run needs at least one batch, the data have none")
    if progress is not None:
        progress("reading batches", len(kept), len(kept))  # there may be fewer than asked for
    return Trace(
        groups=tuple(groups), batches=tuple(kept), num_trainers=num_trainers, num_hosts=num_hosts
    )


def num_uniques(batch: DedupedBatch[None]) -> int:
    """Counts the unique rows of a batch over all groups."""
    return sum(len(group.unique_rows) for group in batch.groups)


def _unique_rows(groups: Sequence[Group], num_trainers: int, batch: Jagged) -> DedupedBatch[None]:
    """De-duplicates one batch and keeps only its unique rows."""
    shares = [share_of(batch, rank, num_trainers) for rank in range(num_trainers)]
    return DedupedBatch(
        payload=None,
        groups=tuple(
            _merged_rows_only(group, [dedup(group, share) for share in shares]) for group in groups
        ),
        share_sizes=tuple(share.batch_size for share in shares),
    )


def _merged_rows_only(group: Group, shares: Sequence[DedupedGroup]) -> MergedGroup:
    """Merges the unique rows of all shares, and drops the shares themselves."""
    # The ranks' plans are made from the merged rows and `places`, which say the same.
    merged = merge(group, [_rows_only(share.unique_rows) for share in shares])
    return replace(merged, shares=(_rows_only(_NO_ROWS),) * len(shares))


def _rows_only(unique_rows: Int64Array) -> DedupedGroup:
    """Returns a batch with unique rows but without lookups."""
    return DedupedGroup(
        unique_rows=unique_rows,
        inverse=_NO_LOOKUPS,
        bag_offsets=None,
        bag_scales=None,
        bags=_NO_LOOKUPS,
        piece_offsets=_NO_PIECES,
        long_uniques=_NO_LOOKUPS,
        long_offsets=_NO_PIECES,
    )
