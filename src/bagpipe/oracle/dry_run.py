"""The dry run: what a cache of each size would fetch with each lookahead, from the ids alone.

It needs no rows, no model and no device, because slots, fetches and evictions depend only on the
unique rows of each batch. Batches are read and de-duplicated once, on a thread pool, and only their
unique rows are kept (a `Trace`). The oracle that trains then replays the trace for each point of a
grid of cache sizes and lookaheads, several points at a time.

Counting. The first `warmup_steps` fill the cache and are left out. All others are counted, the same
ones for every point. Batches behind the counted steps are only looked ahead into, so that the last
counted steps are planned with a full window.

A step *waits* when it has urgent transfers: a row's slot, or the row itself, is not free
`prefetch_depth` steps ahead. A cache *never stalls* when no counted step waits. Whether the store
then delivers in time depends on its speed and the step's length: compare them with the bytes a
step. The smallest cache that never stalls is found by bisection to within `RESOLUTION`, between the
smallest such size of the grid and the next smaller size, which stalls or is too small for a batch.
Sizes below the result stall, or were not tried because a larger one stalls.

Several trainers. A batch of the stream is then the global batch, and each trainer is handed its
share (`bagpipe.jagged.share_of`). Cache sizes are those of each trainer. What the trainers send
each other is counted too (`bagpipe.oracle.traffic`).

Memory. The trace takes 8 bytes for each unique row of each batch; with several trainers it takes 8
more, and 4 for each trainer that uses the row. Each point under way takes what a `Cacher` does: 8
bytes a row of the tables, 36 a slot, and 8 a unique row and 8 KiB for each batch of lookahead. No
more points are under way than `CACHERS_BYTES` has room for.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from bagpipe.errors import CacheTooSmallError, ConfigError
from bagpipe.oracle.oracle import Oracle
from bagpipe.oracle.report import OracleReport
from bagpipe.oracle.row_trace import LargestBatch, OnProgress, Trace, num_uniques
from bagpipe.oracle.sizes import slots_of
from bagpipe.oracle.traffic import Traffic
from bagpipe.types import Group

RESOLUTION = 0.01
"""How near the bisection comes to the smallest cache that never stalls, as a share of that."""
CACHERS_BYTES = 4 << 30
"""Memory that all points under way may take together; a single one may always run."""

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What to replay: each cache size with each lookahead."""

    cache_rows: Sequence[int]
    """Rows over all groups, of each trainer."""
    lookaheads: Sequence[int]
    num_steps: int
    prefetch_depth: int = 2
    warmup_steps: int | None = None
    """Steps left out at the beginning; by default a quarter."""

    def __post_init__(self) -> None:
        if not self.cache_rows or not self.lookaheads:
            raise ConfigError("a dry run needs at least one cache size and one lookahead")
        if self.num_steps < 1 or not 0 <= self.num_warmup_steps < self.num_steps:
            raise ConfigError(
                f"a dry run of {self.num_steps} steps, {self.num_warmup_steps} of them to warm up, "
                "counts no step"
            )

    @property
    def num_warmup_steps(self) -> int:
        """Steps left out at the beginning."""
        return self.num_steps // 4 if self.warmup_steps is None else self.warmup_steps

    @property
    def num_batches(self) -> int:
        """How many batches a trace can make use of."""
        return self.num_steps + max(self.lookaheads)


@dataclass(frozen=True, kw_only=True)
class Point:
    """What came of one cache size with one lookahead."""

    cache_rows: int
    """Rows over all groups, of each trainer."""
    lookahead: int
    report: OracleReport | None
    """The steps after the warm-up, added up over all trainers; None if a batch did not fit."""
    num_needed: int = 0
    """Slots of each trainer that the batch needs which did not fit."""
    traffic: Traffic | None = None
    """What several trainers send each other."""

    @property
    def never_stalls(self) -> bool:
        """Whether no counted step waited."""
        return self.report is not None and self.report.num_waiting_steps == 0


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """All that a dry run found."""

    groups: tuple[Group, ...]
    grid: Grid
    num_counted_steps: int
    uniques_per_step: float
    points: tuple[Point, ...]
    """By lookahead, then by cache size."""
    smallest: dict[int, int]
    """For each lookahead the rows of the smallest cache that never stalls."""
    num_batches: int
    """Batches that were read; the last of them were only looked ahead into."""
    largest: tuple[LargestBatch, ...]
    """By group."""
    smallest_cache: int
    """Rows over all groups, of each trainer, of the smallest cache that holds each batch."""
    num_trainers: int = 1
    num_hosts: int = 1

    def cache_bytes(self, cache_rows: int) -> int:
        """Returns the bytes of records in one trainer's cache of `cache_rows` rows."""
        pairs = zip(slots_of(cache_rows, self.groups), self.groups, strict=True)
        return sum(count * group.record_bytes for count, group in pairs)


def dry_run(
    trace: Trace,
    grid: Grid,
    *,
    find_smallest: bool = True,
    threads: int | None = None,
    progress: OnProgress | None = None,
) -> DryRun:
    """Replays a trace for every point of a grid.

    Args:
        trace: The batches.
        grid: The points.
        find_smallest: Whether to look for the smallest cache that never stalls.
        threads: Points under way at a time, at most; by default one for each core.
        progress: Is told how much is done.

    Raises:
        ConfigError: The trace ends before the first counted step, or a lookahead is out of range.
    """
    num_steps = min(grid.num_steps, len(trace.batches))
    if num_steps <= grid.num_warmup_steps:
        raise ConfigError(
            f"the data have {len(trace.batches):,} batches, of which the first "
            f"{grid.num_warmup_steps:,} only warm up: "
            "ask for fewer steps, or make the batches smaller"
        )
    cache_rows, lookaheads = sorted(set(grid.cache_rows)), sorted(set(grid.lookaheads))
    todo = [(rows, lookahead) for lookahead in lookaheads for rows in cache_rows]
    num_threads = _num_threads(trace, grid, threads)
    with ThreadPoolExecutor(num_threads, thread_name_prefix="bagpipe-replay") as pool:
        found = pool.map(lambda point: replay(trace, grid, *point), todo)
        points = tuple(_told(found, "replaying", len(todo), progress))
    smallest: dict[int, int] = {}
    searched = lookaheads if find_smallest else []
    for lookahead in _told(searched, "finding the smallest cache", len(searched), progress):
        guess = next(reversed(smallest.values()), None)
        points_of_lookahead = [point for point in points if point.lookahead == lookahead]
        smallest[lookahead] = _find_smallest(trace, grid, points_of_lookahead, guess)
    return DryRun(
        groups=trace.groups,
        grid=grid,
        num_counted_steps=num_steps - grid.num_warmup_steps,
        uniques_per_step=trace.uniques_per_step,
        points=points,
        smallest=smallest,
        num_batches=len(trace.batches),
        largest=trace.largest,
        smallest_cache=trace.smallest_cache,
        num_trainers=trace.num_trainers,
        num_hosts=trace.num_hosts,
    )


def replay(
    trace: Trace, grid: Grid, cache_rows: int, lookahead: int, *, until_it_waits: bool = False
) -> Point:
    """Replays one point; with `until_it_waits`, only up to the first counted step that waits."""
    num_trainers = trace.num_trainers
    # One rank's plan tells whether any rank waits.
    topology = trace.topology(range(1 if until_it_waits else num_trainers))
    oracle = Oracle(
        trace.groups,
        num_slots=trace.slots(cache_rows),
        lookahead=lookahead,
        prefetch_depth=grid.prefetch_depth,
        topology=topology,
    )
    report = OracleReport.for_groups(trace.groups)
    traffic = None
    if num_trainers > 1 and not until_it_waits:
        traffic = Traffic(num_trainers=num_trainers, num_hosts=trace.num_hosts, groups=trace.groups)
    try:
        for plans, batch in islice(oracle.plan(oracle.link(trace.batches)), grid.num_steps):
            if plans[0].step >= grid.num_warmup_steps:
                peak_slots = [-(-peak // num_trainers) for peak in oracle.peak_slots]
                report.add_ranks(plans, num_uniques(batch), peak_slots)
                if traffic is not None:
                    traffic.add(plans, batch.groups)
            if until_it_waits and report.num_waiting_steps:
                break
    except CacheTooSmallError as error:
        num_needed = -(-error.num_needed // num_trainers)
        return Point(cache_rows=cache_rows, lookahead=lookahead, report=None, num_needed=num_needed)
    return Point(cache_rows=cache_rows, lookahead=lookahead, report=report, traffic=traffic)


def _find_smallest(trace: Trace, grid: Grid, points: Sequence[Point], guess: int | None) -> int:
    """Bisects, as the module says, among the points of one lookahead.

    `guess`, the result for a shorter lookahead, is tried first, because the border hardly depends
    on the lookahead. A cache that holds all rows never stalls.
    """
    low, high = trace.smallest_cache - 1, sum(group.num_rows for group in trace.groups)
    for point in reversed(points):  # the largest cache first
        if not point.never_stalls:
            low = max(low, point.cache_rows)
            break
        high = point.cache_rows
    guesses = [] if guess is None else [guess - _resolution(guess), guess]
    while high - low > _resolution(high):
        middle = guesses.pop() if guesses else (low + high) // 2
        if not low < middle < high:
            continue
        if replay(trace, grid, middle, points[0].lookahead, until_it_waits=True).never_stalls:
            high = middle
        else:
            low = middle
    return high


def _resolution(cache_rows: int) -> int:
    """Returns `RESOLUTION` in rows of a cache near this size."""
    return max(1, int(RESOLUTION * cache_rows))


def _told(
    items: Iterable[Item], stage: str, total: int, progress: OnProgress | None
) -> Iterator[Item]:
    """Passes items on and reports each as done when the next one is asked for."""
    for done, item in enumerate(items, start=1):
        yield item
        if progress is not None:
            progress(stage, done, total)


def _num_threads(trace: Trace, grid: Grid, threads: int | None) -> int:
    """Returns how many points may be under way at a time."""
    num_rows = sum(group.num_rows for group in trace.groups)
    # The bytes are those of the module's docstring. Rings are powers of two, hence up to twice as
    # large as what is in use.
    num_slots = min(trace.num_trainers * max(grid.cache_rows), num_rows)
    cacher_bytes = (
        8 * num_rows
        + 36 * num_slots
        + (8 * int(trace.uniques_per_step) + 8192) * max(grid.lookaheads)
    )
    return max(1, min(threads or os.cpu_count() or 1, CACHERS_BYTES // cacher_bytes))
