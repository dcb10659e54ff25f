"""What `bagpipe plan` says of a run of `trainers`: a dry run of the same stream."""

from __future__ import annotations

from pathlib import Path

from bagpipe.data.prepared import PreparedSource
from bagpipe.oracle.dry_run import Grid, replay
from bagpipe.oracle.row_trace import read_trace
from bagpipe.oracle.traffic import URGENT
from benchmarks.measure import Progress
from benchmarks.trainers.settings import TrainersBench


def plan_run(bench: TrainersBench, folder: Path, progress: Progress) -> dict[str, float]:
    """Replays the stream in `folder`, and counts the steps whose bytes the arms count.

    Returns:
        Of a rank in a step: `sent_bytes`, `critical_bytes`, `num_fetched`; and of all steps the
        share that waits for a transfer, `waiting_share`.
    """
    workload, num_trainers = bench.workload, bench.num_trainers
    source = PreparedSource(folder, "train", verify=False)
    batches = source.batches(batch_size=workload.batch_size * num_trainers)
    trace = read_trace(
        [workload.group],
        (batch.sparse for batch in batches),
        max_batches=bench.num_batches,
        num_trainers=num_trainers,
        progress=lambda _, done, total: progress("planning without trainers", done, total),
    )
    grid = Grid(
        cache_rows=[workload.cache_rows],
        lookaheads=[workload.lookahead],
        num_steps=bench.num_steps - 1,  # see `rank._Rank._seen`
        prefetch_depth=workload.prefetch_depth,
        warmup_steps=workload.warmup_steps,
    )
    point = replay(trace, grid, workload.cache_rows, workload.lookahead)
    report, traffic = point.report, point.traffic
    assert report is not None  # or the arm has raised, which ran before
    rank_steps = num_trainers * report.num_steps
    sent = [0, 0] if traffic is None else traffic.sent_bytes.sum(axis=0).tolist()
    return {
        "sent_bytes": sum(sent) / rank_steps,
        "critical_bytes": sent[URGENT] / rank_steps,
        "num_fetched": report.num_fetched / rank_steps,
        "waiting_share": report.num_waiting_steps / report.num_steps,
    }
