"""Plans for one trainer and one group, from batches of ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from bagpipe.oracle import DedupedBatch, Oracle, checked, dedup
from bagpipe.oracle.merge import merge
from bagpipe.plan import StepPlan
from bagpipe.types import Group, Jagged

PlannedBatch = tuple[StepPlan, DedupedBatch[None]]


def deduped(group: Group, batches: Iterable[Jagged]) -> Iterator[DedupedBatch[None]]:
    for batch in batches:
        yield DedupedBatch(
            payload=None,
            share_sizes=(batch.batch_size,),
            groups=(merge(group, [dedup(group, batch)]),),
        )


def plan_for_one(oracle: Oracle, group: Group, batches: Iterable[Jagged]) -> Iterator[PlannedBatch]:
    """Yields each batch with its plan."""
    for (plan,), batch in oracle.plan(oracle.link(deduped(group, batches))):
        yield plan, batch


def checked_for_one(
    oracle: Oracle, group: Group, num_slots: int, batches: Iterable[Jagged]
) -> Iterator[PlannedBatch]:
    """Yields each batch with its plan, which the package's own replay has checked."""
    planned = oracle.plan(oracle.link(deduped(group, batches)))
    for (plan,), batch in checked([group], [num_slots], planned):
        yield plan, batch
