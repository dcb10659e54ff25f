"""The dry run: what a cache of each size would fetch with each lookahead, from the ids alone. No
rows, no model, no device.

Slots, fetches and evictions depend only on the unique rows of each batch. So batches are read and
de-duplicated once, on a thread pool, and only their unique rows are kept (a `Trace`); the oracle
that trains then replays the trace for each point of a grid of cache sizes and lookaheads, several
points at a time.

Counting. The first `warmup_steps` fill the cache and are left out; the others are counted, the same
ones for every point. A trace longer than the counted steps is only looked ahead into, so that the
last of them are planned with a full window.

A step *waits* when some of its transfers are late: a row's slot, or the row itself, is not free
`prefetch_depth` steps ahead, so that its fetch stands on the critical path. A cache *never stalls*
when no counted step waits. Whether the store then delivers in time depends on its speed and the
step's length: compare them with the bytes a step. The smallest such cache is looked for between the
smallest never-stalling size of the grid and the next smaller size that stalls or is too small for a
batch, by bisection to within `RESOLUTION`. A size below it stalls, or was not tried because a
larger one does.

Several trainers. A batch of the stream is then a global one, split among them
(`bagpipe.jagged.share_of`); cache sizes are of each trainer; and what they send each other is
counted too (`bagpipe.oracle.traffic`).

Memory: 8 bytes a unique row and batch for the trace, of several trainers 8 more and 4 a trainer
that uses it; for each point under way what a `Cacher` takes (8 bytes a row of the tables, 36 a
slot, 8 a unique row and 8 KiB a batch of lookahead). No more points are under way than
`CACHERS_BYTES` has room for.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from bagpipe.errors import CacheTooSmallError, ConfigError
from bagpipe.oracle.report import OracleReport
from bagpipe.oracle.row_trace import LargestBatch, Progress, Trace, num_uniques
from bagpipe.oracle.sizes import slots_of
from bagpipe.oracle.traffic import Traffic
from bagpipe.oracle.window import Oracle
from bagpipe.types import Group

RESOLUTION = 0.01
"""How near to the border between stalling and never stalling the bisection goes, as a share of the
cache."""
CACHERS_BYTES = 4 << 30
"""Memory that points under way may take together; one always may."""

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What to replay: each cache size (rows over all groups, of each trainer) with each
    lookahead.
    """

    cache_rows: Sequence[int]
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
        """Batches of which a trace can make use."""
        return self.num_steps + max(self.lookaheads)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One cache size with one lookahead. `report` counts the steps after the warm-up; None when a
    batch alone needs more slots.

    Of several trainers the size is that of each; `report` adds up what all of them fetch and write
    back, `traffic` what they send each other.
    """

    cache_rows: int
    lookahead: int
    report: OracleReport | None
    num_needed: int = (
        0  # slots that the batch needs for which the cache is too small, of each trainer
    )
    traffic: Traffic | None = None

    @property
    def never_stalls(self) -> bool:
        """Whether no counted step waited."""
        return self.report is not None and self.report.num_waiting_steps == 0


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """The points by lookahead and then cache size; for each lookahead the smallest cache that never
    stalls.
    """

    groups: tuple[Group, ...]
    grid: Grid
    num_counted_steps: int
    uniques_per_step: float
    points: tuple[Point, ...]
    smallest: dict[int, int]
    num_batches: int
    """Read, of which the last ones were only looked ahead into."""
    largest: tuple[LargestBatch, ...]
    """By group."""
    smallest_cache: int
    """That holds any of these batches; rows over all groups, of each trainer."""
    num_trainers: int = 1
    num_hosts: int = 1

    def cache_bytes(self, cache_rows: int) -> int:
        """Bytes of records in a cache of `cache_rows` rows over all groups, of each trainer."""
        slots = slots_of(cache_rows, self.groups)
        return sum(
            count * group.record_bytes for count, group in zip(slots, self.groups, strict=True)
        )


def dry_run(
    trace: Trace,
    grid: Grid,
    *,
    find_smallest: bool = True,
    threads: int | None = None,
    progress: Progress | None = None,
) -> DryRun:
    """Replays `trace` for every point of `grid`. ConfigError: the trace ends before the first
    counted step, or a bad lookahead.
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
    with ThreadPoolExecutor(
        _num_threads(trace, grid, threads), thread_name_prefix="bagpipe-replay"
    ) as pool:
        points = tuple(
            _told(
                pool.map(lambda point: replay(trace, grid, *point), todo),
                "replaying",
                len(todo),
                progress,
            )
        )
    smallest: dict[int, int] = {}
    for lookahead in _told(
        lookaheads if find_smallest else (), "finding the smallest cache", len(lookaheads), progress
    ):
        guess = next(reversed(smallest.values()), None)
        smallest[lookahead] = _find_smallest(
            trace, grid, [point for point in points if point.lookahead == lookahead], guess
        )
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
    """Replays one point; with `until_it_waits` no further than the first counted step that
    waits.
    """
    num_trainers = trace.num_trainers
    # one rank's plan tells whether any waits
    topology = trace.topology(range(1 if until_it_waits else num_trainers))
    oracle = Oracle(
        trace.groups,
        num_slots=trace.slots(cache_rows),
        lookahead=lookahead,
        prefetch_depth=grid.prefetch_depth,
        topology=topology,
    )
    report = OracleReport.for_groups(trace.groups)
    counts_traffic = num_trainers > 1 and not until_it_waits
    traffic = (
        Traffic(num_trainers=num_trainers, num_hosts=trace.num_hosts, groups=trace.groups)
        if counts_traffic
        else None
    )
    try:
        for plans, batch in islice(oracle.plan_ranks(oracle.link(trace.batches)), grid.num_steps):
            if plans[0].step >= grid.num_warmup_steps:
                report.add_ranks(
                    plans,
                    num_uniques(batch),
                    [-(-peak // num_trainers) for peak in oracle.peak_slots],
                )
                if traffic is not None:
                    traffic.add(plans, batch.groups)
            if until_it_waits and report.num_waiting_steps:
                break
    except CacheTooSmallError as error:
        num_needed = -(-error.num_needed // num_trainers)
        return Point(cache_rows=cache_rows, lookahead=lookahead, report=None, num_needed=num_needed)
    return Point(cache_rows=cache_rows, lookahead=lookahead, report=report, traffic=traffic)


def _find_smallest(trace: Trace, grid: Grid, points: Sequence[Point], guess: int | None) -> int:
    """The module's bisection among the points of one lookahead. A cache that holds all rows never
    stalls.

    `guess`, the result for a shorter lookahead, is tried first: the border hardly depends on the
    lookahead.
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
    return max(1, int(RESOLUTION * cache_rows))


def _told(
    items: Iterable[Item], stage: str, total: int, progress: Progress | None
) -> Iterator[Item]:
    """Passes `items` on and tells of each once the next one is asked for."""
    for done, item in enumerate(items, start=1):
        yield item
        if progress is not None:
            progress(stage, done, total)


def _num_threads(trace: Trace, grid: Grid, threads: int | None) -> int:
    num_rows = sum(group.num_rows for group in trace.groups)
    # Rings are powers of two, hence twice what is in use at most.
    num_slots = min(trace.num_trainers * max(grid.cache_rows), num_rows)
    cacher_bytes = (
        8 * num_rows
        + 36 * num_slots
        + (8 * int(trace.uniques_per_step) + 8192) * max(grid.lookaheads)
    )
    return max(1, min(threads or os.cpu_count() or 1, CACHERS_BYTES // cacher_bytes))
