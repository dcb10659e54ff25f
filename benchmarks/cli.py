"""Benchmarks that anybody can run, from the top of the repository: `python -m benchmarks`.

Each subcommand is one benchmark and measures again what docs/results.md states.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from bagpipe.cli.common import (
    JsonFile,
    console_progress,
    mistakes_told,
    prepare_environment,
    save_json,
)
from benchmarks.options import (
    Arms,
    BatchSize,
    BatchSizes,
    CacheShare,
    Delays,
    DeviceTimes,
    Gbits,
    InFlight,
    Lookahead,
    Lookaheads,
    MaxRows,
    NumTrainers,
    Plot,
    Quick,
    Rounds,
    StepRows,
    Steps,
    Threads,
    WorkloadName,
    chosen_arms,
    sizes_of,
)

if TYPE_CHECKING:
    from benchmarks.measure import Progress, Result

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__.splitlines()[0]
)


@app.command()
def oracle(
    quick: Quick = False,
    batch_size: BatchSize = None,
    max_rows: MaxRows = None,
    lookaheads: Lookaheads = None,
    cache: CacheShare = None,
    steps: Steps = None,
    threads: Threads = None,
    num_trainers: NumTrainers = None,
    json_file: JsonFile = None,
) -> None:
    """Turn ids into plans, without a trainer."""

    def run(progress: Progress) -> Result:
        from benchmarks.oracle import QUICK, OracleBench, bench_oracle

        sizes = sizes_of(
            QUICK if quick else {},
            batch_size=batch_size,
            max_rows=max_rows,
            lookaheads=lookaheads,
            cache_share=cache,
            num_measured=steps,
            dedup_threads=threads,
            num_trainers=num_trainers,
        )
        return bench_oracle(OracleBench(**sizes), progress)

    _measure(run, "cpu", quick=quick, json_file=json_file)


@app.command()
def step(
    quick: Quick = False,
    batch_sizes: BatchSizes = None,
    max_rows: MaxRows = None,
    arms: Arms = None,
    lookahead: Lookahead = None,
    cache: CacheShare = None,
    rounds: Rounds = None,
    json_file: JsonFile = None,
) -> None:
    """Train on a CPU, against whole tables in memory."""

    def run(progress: Progress) -> Result:
        from benchmarks.step.bench import ALWAYS, ARMS, QUICK, StepBench, bench_step

        sizes = sizes_of(
            QUICK if quick else {},
            batch_sizes=batch_sizes,
            max_rows=max_rows,
            arms=chosen_arms(arms, ARMS, ALWAYS),
            lookahead=lookahead,
            cache_share=cache,
            num_rounds=rounds,
        )
        return bench_step(StepBench(**sizes), progress)

    _measure(run, "cpu", quick=quick, json_file=json_file)


@app.command()
def curve(
    quick: Quick = False,
    batch_size: BatchSize = None,
    max_rows: MaxRows = None,
    lookaheads: Lookaheads = None,
    plot: Plot = None,
    json_file: JsonFile = None,
) -> None:
    """Count the rows that are fetched, over cache size and lookahead."""

    def run(progress: Progress) -> Result:
        from benchmarks.curve import QUICK, CurveBench, bench_curve

        sizes = sizes_of(
            QUICK if quick else {},
            batch_size=batch_size,
            max_rows=max_rows,
            lookaheads=lookaheads,
        )
        return bench_curve(CurveBench(**sizes), progress, plot)

    _measure(run, "cpu", quick=quick, json_file=json_file, plot=plot)


@app.command()
def gpu(
    workload: WorkloadName = "W1",
    quick: Quick = False,
    batch_size: BatchSize = None,
    max_rows: MaxRows = None,
    arms: Arms = None,
    lookahead: Lookahead = None,
    rounds: Rounds = None,
    steps: Steps = None,
    threads: Threads = None,
    plot: Plot = None,
    json_file: JsonFile = None,
) -> None:
    """Train on one GPU, against FBGEMM and against no embeddings at all. Takes minutes."""

    def run(progress: Progress) -> Result:
        from benchmarks.gpu.bench import ALWAYS, ARMS, bench_gpu
        from benchmarks.workloads import make_workload

        options = sizes_of(
            {},
            batch_size=batch_size,
            max_rows=max_rows,
            lookahead=lookahead,
            rounds=rounds,
            turn_steps=steps,
            dedup_threads=threads,
        )
        chosen = chosen_arms(arms, ARMS, ALWAYS)
        return bench_gpu(make_workload(workload, options, quick=quick), chosen, progress, plot)

    _measure(run, "auto", quick=quick, json_file=json_file, plot=plot)


@app.command()
def trainers(
    workload: WorkloadName = "small",
    quick: Quick = False,
    batch_size: BatchSize = None,
    max_rows: MaxRows = None,
    arms: Arms = None,
    lookahead: Lookahead = None,
    rounds: Rounds = None,
    steps: Steps = None,
    threads: Threads = None,
    num_trainers: NumTrainers = None,
    device: Annotated[
        str, typer.Option(help="cpu; cuda, a device each; or cuda:0, which all share.")
    ] = "cpu",
    graph: Annotated[
        bool, typer.Option("--graph", help="On CUDA: the dense part as a CUDA graph.")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Train on several trainers of one host, against other ways to share tables."""

    def run(progress: Progress) -> Result:
        from benchmarks.trainers.bench import bench_trainers
        from benchmarks.trainers.settings import ALWAYS, ARMS, QUICK, TrainersBench
        from benchmarks.workloads import make_workload

        options = sizes_of(
            {},
            batch_size=batch_size,
            max_rows=max_rows,
            lookahead=lookahead,
            rounds=rounds,
            turn_steps=steps,
            dedup_threads=threads,
        )
        settings = sizes_of(
            QUICK if quick else {},
            workload=make_workload(workload, options, quick=quick),
            arms=chosen_arms(arms, ARMS, ALWAYS),
            num_trainers=num_trainers,
            device=device,
            graph=graph,
        )
        return bench_trainers(TrainersBench(**settings), progress)

    _measure(run, device, quick=quick, json_file=json_file)


@app.command()
def network(
    quick: Quick = False,
    max_rows: MaxRows = None,
    rows: StepRows = None,
    gbits: Gbits = None,
    delays_ms: Delays = None,
    in_flight: InFlight = None,
    arms: Arms = None,
    json_file: JsonFile = None,
) -> None:
    """Fetch from a shard server, over loopback and over links that are made (as root)."""

    def run(progress: Progress) -> Result:
        from benchmarks.network.bench import bench_network
        from benchmarks.network.settings import ALWAYS, ARMS, QUICK, NetworkBench

        sizes = sizes_of(
            QUICK if quick else {},
            table_rows=max_rows,
            step_rows=rows,
            gbits=gbits,
            delays_ms=delays_ms,
            in_flight=in_flight,
            arms=chosen_arms(arms, ARMS, ALWAYS),
        )
        return bench_network(NetworkBench(**sizes), progress)

    _measure(run, "cpu", quick=quick, json_file=json_file)


@app.command()
def remote(
    quick: Quick = False,
    batch_size: BatchSize = None,
    max_rows: MaxRows = None,
    arms: Arms = None,
    lookahead: Lookahead = None,
    cache: CacheShare = None,
    devices_ms: DeviceTimes = None,
    gbits: Gbits = None,
    delays_ms: Delays = None,
    rounds: Rounds = None,
    steps: Steps = None,
    plot: Plot = None,
    json_file: JsonFile = None,
) -> None:
    """Train over a link to a shard server (as root), against ways that do not look ahead."""

    def run(progress: Progress) -> Result:
        from benchmarks.remote.bench import bench_remote
        from benchmarks.remote.settings import ALWAYS, ARMS, QUICK, RemoteBench

        sizes = sizes_of(
            QUICK if quick else {},
            batch_size=batch_size,
            max_rows=max_rows,
            lookahead=lookahead,
            cache_share=cache,
            devices_ms=devices_ms,
            gbits=gbits,
            delays_ms=delays_ms,
            num_rounds=rounds,
            measured_steps=steps,
            arms=chosen_arms(arms, ARMS, ALWAYS),
        )
        return bench_remote(RemoteBench(**sizes), progress, plot)

    _measure(run, "cpu", quick=quick, json_file=json_file, plot=plot)


@app.command()
def cuts(quick: Quick = False, json_file: JsonFile = None) -> None:
    """Write a shard's rows to checkpoints beside training, and put them back."""

    def run(progress: Progress) -> Result:
        from benchmarks.cuts import QUICK, CutsBench, bench_cuts

        return bench_cuts(CutsBench(**QUICK if quick else {}), progress)

    _measure(run, "cpu", quick=quick, json_file=json_file)


def _measure(
    run: Callable[[Progress], Result],
    device: str,
    *,
    quick: bool,
    json_file: Path | None,
    plot: Path | None = None,
) -> None:
    """Runs a benchmark, which loads torch, and shows what it found.

    It refuses files that can't be written before the benchmark has taken its minutes.
    """
    console = Console()
    prepare_environment(device)
    with mistakes_told():
        from bagpipe.plots import check_can_plot, check_can_write
        from benchmarks.measure import as_json, describe_environment

        if plot is not None:
            check_can_plot(plot)
        if json_file is not None:
            check_can_write(json_file)
        values: dict[str, Any] = {"environment": describe_environment(), "quick": quick}
        with console_progress(console) as progress:
            result = run(progress)
        for table in result.tables:
            console.print(table)
        for note in result.notes:
            console.print(note, highlight=False, markup=False, soft_wrap=True)
        values[result.name] = as_json(result.values)
        if json_file is not None:
            save_json(values, json_file)
