"""What it costs to turn ids into plans, without a trainer.

1. De-duplication with gradient schedule, one batch at a time on one thread. All results are kept,
   as those of the window are in real use, so that every call writes to cold memory.
2. Slot assignment for each lookahead, once the cache is full. Its two stages, `Linker.link` and
   `Cacher.admit` + `plan`, run in two threads when live; here they are timed alone and together.
3. The whole pipeline live, from batches in memory: a pool that de-duplicates, the Cacher in its
   thread, and a consumer that only takes plans. It counts batches a second while the cache and the
   window are full. With `num_trainers` it then runs for that many trainers, too: batches are that
   many times as large, the cache is the same in all, and each trainer gets a plan.
4. Memory: bytes of the oracle's arrays by row, slot and batch of lookahead. And how much this
   process grew while the live pipeline ran, which also counts what the allocator keeps.

Freed memory is kept, as in the oracle's own process.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from bagpipe.errors import ConfigError
from bagpipe.feed.stream import StreamOptions, plan_stream
from bagpipe.jagged import share_of
from bagpipe.native.memory import keep_freed_memory
from bagpipe.native.pipeline import BackgroundIterator
from bagpipe.oracle.cache_plan import CachePlan
from bagpipe.oracle.dedup import dedup
from bagpipe.oracle.eviction.cacher import Cacher
from bagpipe.oracle.merge import MergedGroup, merge
from bagpipe.plan import GroupPlan
from bagpipe.topology import ONE_TRAINER, Topology
from bagpipe.types import Group, Jagged
from benchmarks.measure import Progress, Result, Timing, resident_bytes
from benchmarks.streams import SKEW, kaggle_group, make_batches

PREFETCH_DEPTH = 2
QUICK: dict[str, Any] = {
    "batch_size": 64,
    "max_rows": 300,
    "cache_share": 0.5,
    "lookaheads": (1, 4),
    "num_warmup": 8,
    "num_measured": 3,
}
_PLANS_AHEAD = 2
_READ_AHEAD = 16
"""Batches that the live pipeline may have read beyond the window."""
_MiB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class OracleBench:
    """Sizes of the benchmark."""

    batch_size: int = 16_384
    max_rows: int | None = None
    skew: float = SKEW
    cache_share: float = 0.02
    lookaheads: Sequence[int] = (20, 100)
    num_measured: int = 50
    num_warmup: int = 40
    """Batches planned before measuring. They must fill the cache; the result says whether it was
    full at the end."""
    dedup_threads: int | None = None
    """Threads of the live pipeline that de-duplicate; None: as many as in training."""
    num_trainers: int = 1
    """Trainers for which the live pipeline plans, after it has planned for one; each has a batch of
    `batch_size`."""

    def __post_init__(self) -> None:
        if self.num_trainers < 1:
            raise ConfigError(f"--trainers {self.num_trainers}: must be at least 1")

    @property
    def num_batches(self) -> int:
        """Batches needed, none of which is used twice."""
        return self.num_warmup + self.num_measured + max(self.lookaheads) + _READ_AHEAD


def bench_oracle(sizes: OracleBench, progress: Progress) -> Result:
    """Runs all four parts; the memory allocator keeps the settings that it is given here."""
    keep_freed_memory()
    group = kaggle_group(max_rows=sizes.max_rows)
    num_slots = int(sizes.cache_share * group.num_rows)
    jagged = _make_ids(sizes, group, 1, progress)
    live = [
        _run_live(sizes, group, num_slots, jagged, lookahead, 1, progress)
        for lookahead in sizes.lookaheads
    ]
    if sizes.num_trainers > 1:
        every = _make_ids(sizes, group, sizes.num_trainers, progress)
        live += [
            _run_live(sizes, group, num_slots, every, lookahead, sizes.num_trainers, progress)
            for lookahead in sizes.lookaheads
        ]
    deduped, dedup_times = _time_dedup(sizes, group, jagged, progress)
    slots = {
        lookahead: _time_slots(sizes, group, num_slots, deduped, lookahead, progress)
        for lookahead in sizes.lookaheads
    }
    values: dict[str, Any] = {
        "sizes": asdict(sizes),
        "num_rows": group.num_rows,
        "num_slots": num_slots,
        "num_lookups": len(jagged[0].values),
        "num_uniques": sum(len(batch.unique_rows) for batch in deduped) / len(deduped),
        "bytes": _bytes_per_item(),
        "dedup": dedup_times,
        "slots": slots,
        "live": live,
    }
    return Result(name="oracle", tables=(_times_table(values), _live_table(values)), values=values)


def _make_ids(
    sizes: OracleBench, group: Group, num_trainers: int, progress: Progress
) -> list[Jagged]:
    """The ids of all global batches of so many trainers."""
    batch_size = num_trainers * sizes.batch_size
    batches = make_batches(
        group,
        num_batches=sizes.num_batches,
        batch_size=batch_size,
        skew=sizes.skew,
        progress=progress,
    )
    return [batch.sparse for batch in batches]


def _time_dedup(
    sizes: OracleBench, group: Group, batches: list[Jagged], progress: Progress
) -> tuple[list[MergedGroup], Timing]:
    """De-duplicates all batches; returns them and the times of the last `num_measured`."""
    deduped, times = [], []
    for index, batch in enumerate(batches):
        started = time.perf_counter()
        deduped.append(merge(group, [dedup(group, batch)]))
        times.append(time.perf_counter() - started)
        progress("de-duplicating", index + 1, len(batches))
    return deduped, Timing.of(times[-sizes.num_measured :])


def _time_slots(
    sizes: OracleBench,
    group: Group,
    num_slots: int,
    batches: list[MergedGroup],
    lookahead: int,
    progress: Progress,
) -> dict[str, Any]:
    """Times both stages once they are warmed up."""
    cacher = Cacher(
        group, num_slots=num_slots, max_lookahead=lookahead, prefetch_depth=PREFETCH_DEPTH
    )
    for batch in batches[:lookahead]:
        cacher.admit(cacher.link(batch))
    linking, assigning, both = [], [], []
    num_fetched = 0
    num_steps = sizes.num_warmup + sizes.num_measured
    for step in range(num_steps):
        batch = batches[step + lookahead]
        started = time.perf_counter()
        linked = cacher.link(batch)
        linked_at = time.perf_counter()
        cacher.admit(linked)
        plan = cacher.plan()
        planned_at = time.perf_counter()
        if step >= sizes.num_warmup:
            linking.append(linked_at - started)
            assigning.append(planned_at - linked_at)
            both.append(planned_at - started)
            num_fetched += _num_fetched(plan)
        progress(f"assigning slots, lookahead {lookahead}", step + 1, num_steps)
    return {
        "linking": Timing.of(linking),
        "assigning": Timing.of(assigning),
        "both": Timing.of(both),
        "cache_was_full": cacher.num_used_slots == num_slots,
        "fetched_rows_per_step": num_fetched / sizes.num_measured,
    }


def _num_fetched(plan: CachePlan | GroupPlan) -> int:
    return len(plan.overlapped.fetch_rows) + len(plan.urgent.fetch_rows)


def _run_live(
    sizes: OracleBench,
    group: Group,
    num_slots: int,
    batches: list[Jagged],
    lookahead: int,
    num_trainers: int,
    progress: Progress,
) -> dict[str, Any]:
    """Runs the pipeline as `bagpipe.lookahead` builds it, with a consumer that does nothing."""
    gc.collect()
    resident_before = resident_bytes()
    options = StreamOptions(
        groups=(group,),
        num_slots=(-(-num_slots // num_trainers),),
        lookahead=lookahead,
        prefetch_depth=PREFETCH_DEPTH,
        dedup_threads=sizes.dedup_threads,
        topology=_topology(num_trainers, len(batches[0].values)),
    )
    plans = BackgroundIterator(plan_stream(batches, options), ahead=_PLANS_AHEAD, name="oracle")
    num_steps = sizes.num_warmup + sizes.num_measured
    started = cpu_started = 0.0
    for step in range(num_steps):
        if step == sizes.num_warmup:
            started, cpu_started = time.perf_counter(), time.process_time()
        planned = next(plans)
        progress(f"live, {num_trainers} trainers, lookahead {lookahead}", step + 1, num_steps)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    resident_after = resident_bytes()
    plans.close()
    grown = (
        None
        if resident_before is None or resident_after is None
        else resident_after - resident_before
    )
    batch = _deduped(group, batches[0], num_trainers)
    place_bytes = 4 * len(batch.unique_rows)  # where the batch's rows are among unsettled uses
    return {
        "lookahead": lookahead,
        "num_trainers": num_trainers,
        "dedup_threads": options.num_dedup_threads,
        "cache_was_full": planned[0].peak_slots[0] == num_trainers * options.num_slots[0],
        "batches_per_s": sizes.num_measured / seconds,
        "lookups_per_s": sizes.num_measured * len(batches[0].values) / seconds,
        "cpu_ms_per_batch": 1e3 * cpu_seconds / sizes.num_measured,
        "state_bytes": planned[0].oracle_bytes,
        "bytes_per_batch": batch.nbytes + place_bytes,
        "window_bytes": lookahead * batch.nbytes,
        "resident_growth_bytes": grown,
    }


def _deduped(group: Group, batch: Jagged, num_trainers: int) -> MergedGroup:
    """A batch in the form in which the window holds it."""
    if num_trainers == 1:
        return merge(group, [dedup(group, batch)])
    return merge(
        group, [dedup(group, share_of(batch, rank, num_trainers)) for rank in range(num_trainers)]
    )


def _topology(num_trainers: int, max_replicas: int) -> Topology:
    """Plans for all of so many trainers."""
    if num_trainers == 1:
        return ONE_TRAINER
    return Topology(
        num_trainers=num_trainers,
        ranks=tuple(range(num_trainers)),
        num_replica_slots=(max_replicas,),
    )


def _bytes_per_item() -> dict[str, float]:
    """Bytes that a Cacher's arrays take for each row and slot, found by making larger ones."""
    small, large = kaggle_group(max_rows=1_000), kaggle_group(max_rows=100_000)
    settings = {"max_lookahead": 1, "prefetch_depth": PREFETCH_DEPTH}
    base = Cacher(small, num_slots=1_000, **settings).nbytes
    return {
        "row": (Cacher(large, num_slots=1_000, **settings).nbytes - base)
        / (large.num_rows - small.num_rows),
        "slot": (Cacher(small, num_slots=11_000, **settings).nbytes - base) / 10_000,
    }


def _times_table(values: dict[str, Any]) -> Table:
    table = Table(
        title=f"Oracle, {values['num_lookups']:,} lookups, {values['num_uniques']:,.0f} unique "
        "rows a batch"
    )
    table.add_column("")
    table.add_column("ms a batch", justify="right")
    table.add_row("de-duplication, one thread", str(values["dedup"]))
    for lookahead, timed in values["slots"].items():
        table.add_row(f"linking and slots, lookahead {lookahead}", str(timed["both"]))
        for stage in ("linking", "assigning"):
            table.add_row(f"  {stage}", str(timed[stage]))
    return table


def _live_table(values: dict[str, Any]) -> Table:
    each = values["bytes"]
    table = Table(
        title="Oracle live, and its memory",
        caption=f"state: {each['row']:.0f} B a row, {each['slot']:.0f} B a slot",
    )
    headings = (
        "trainers",
        "lookahead",
        "batches/s",
        "CPU ms a batch",
        "state MiB",
        "window MiB",
        "process grew MiB",
        "KiB a batch",
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    for live in values["live"]:
        grown = live["resident_growth_bytes"]
        table.add_row(
            str(live["num_trainers"]),
            str(live["lookahead"]),
            f"{live['batches_per_s']:.1f}",
            f"{live['cpu_ms_per_batch']:.1f}",
            f"{live['state_bytes'] / _MiB:.0f}",
            f"{live['window_bytes'] / _MiB:.0f}",
            "-" if grown is None else f"{grown / _MiB:.0f}",
            f"{live['bytes_per_batch'] / 1024:,.0f}",
        )
    return table
