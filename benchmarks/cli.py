"""Benchmarks that anybody can run, from the top of the repository: `python -m benchmarks`.

Each subcommand is one benchmark and measures again what docs/results.md states.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bagpipe.cli.common import JsonFile
from benchmarks.cli_servers import cuts, cutting, network, recovery, remote, saving
from benchmarks.options import (
    Arms,
    BatchSize,
    BatchSizes,
    CacheShare,
    Device,
    Lookahead,
    Lookaheads,
    MaxRows,
    NumTrainers,
    OracleOf,
    Plot,
    Quick,
    Rounds,
    Steps,
    Threads,
    WorkloadName,
    chosen,
    chosen_arms,
    of_workload,
    sizes_of,
    takes,
)
from benchmarks.showing import measure

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

    measure(run, "cpu", quick=quick, json_file=json_file)


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

    measure(run, "cpu", quick=quick, json_file=json_file)


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

    measure(run, "cpu", quick=quick, json_file=json_file, plot=plot)


@app.command()
@takes(of_workload)
def gpu(
    sizes: dict[str, Any],
    workload: WorkloadName = "W1",
    quick: Quick = False,
    arms: Arms = None,
    oracle: OracleOf = None,
    plot: Plot = None,
    json_file: JsonFile = None,
) -> None:
    """Train on one GPU, against FBGEMM and against no embeddings at all. Takes minutes."""

    def run(progress: Progress) -> Result:
        from benchmarks.gpu.bench import ALWAYS, ARMS, bench_gpu
        from benchmarks.workloads import make_workload

        chosen = chosen_arms(arms, ARMS, ALWAYS)
        trained = make_workload(workload, sizes | sizes_of({}, oracle=oracle), quick=quick)
        return bench_gpu(trained, chosen, progress, plot)

    measure(run, "auto", quick=quick, json_file=json_file, plot=plot)


@app.command()
def planner(
    workload: WorkloadName = "W1",
    quick: Quick = False,
    batch_size: BatchSize = None,
    max_rows: MaxRows = None,
    lookahead: Lookahead = None,
    steps: Steps = None,
    row_map: Annotated[
        bool, typer.Option(help="Let the index of rows be a map, as for billions of rows.")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Plan on one GPU, alone and beside the dense part of a step."""

    def run(progress: Progress) -> Result:
        from benchmarks.planner import bench_planner
        from benchmarks.workloads import make_workload

        sizes = sizes_of(
            {}, batch_size=batch_size, max_rows=max_rows, lookahead=lookahead, turn_steps=steps
        )
        return bench_planner(make_workload(workload, sizes, quick=quick), progress, row_map=row_map)

    measure(run, "auto", quick=quick, json_file=json_file)


@app.command()
@takes(of_workload)
def trainers(
    sizes: dict[str, Any],
    workload: WorkloadName = "small",
    quick: Quick = False,
    arms: Arms = None,
    num_trainers: NumTrainers = None,
    device: Device = "cpu",
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

        settings = sizes_of(
            QUICK if quick else {},
            workload=make_workload(workload, sizes, quick=quick),
            arms=chosen_arms(arms, ARMS, ALWAYS),
            num_trainers=num_trainers,
            device=device,
            graph=graph,
        )
        return bench_trainers(TrainersBench(**settings), progress)

    measure(run, device, quick=quick, json_file=json_file)


@app.command()
@takes(of_workload)
def scaling(
    sizes: dict[str, Any],
    workloads: Annotated[
        list[str] | None,
        typer.Option("--workload", help="As of trainers; may be repeated. W1, W2 and W3 on CUDA."),
    ] = None,
    quick: Quick = False,
    arms: Arms = None,
    trainers: Annotated[
        list[int] | None,
        typer.Option("--trainers", min=1, help="May be repeated. 1, 2, 4 and so on by default."),
    ] = None,
    modes: Annotated[
        list[str] | None, typer.Option("--mode", help="weak or strong. Both by default.")
    ] = None,
    device: Device = "cpu",
    keep: Annotated[
        Path | None, typer.Option(help="Keep each run here, and don't make those again.")
    ] = None,
    plot: Plot = None,
    json_file: JsonFile = None,
) -> None:
    """Train on one trainer, two, four, up to all GPUs: weak and strong scaling, by all arms."""

    def run(progress: Progress) -> Result:
        from benchmarks.trainers.scaling import (
            SCALING_ALWAYS,
            SCALING_ARMS,
            ScalingBench,
            bench_scaling,
            checked_modes,
            counts_on,
        )
        from benchmarks.trainers.settings import QUICK
        from benchmarks.workloads import make_workload

        names = workloads or (["small"] if device == "cpu" else ["W1", "W2", "W3"])
        settings = sizes_of(
            QUICK if quick else {},
            workloads=[make_workload(name, sizes, quick=quick) for name in names],
            trainers=trainers or counts_on(device),
            modes=checked_modes(modes),
            arms=chosen_arms(arms, SCALING_ARMS, SCALING_ALWAYS),
            device=device,
            keep=keep,
        )
        return bench_scaling(ScalingBench(**settings), progress, plot)

    measure(run, device, quick=quick, json_file=json_file, plot=plot)


@app.command()
def serving(
    quick: Quick = False,
    max_rows: MaxRows = None,
    steps: Steps = None,
    json_file: JsonFile = None,
) -> None:
    """Ask an exported model, of one row and of 256 at a time, against plain torch."""

    def run(progress: Progress) -> Result:
        from benchmarks.serving import QUICK, ServingBench, bench_serving

        sizes = sizes_of(QUICK if quick else {}, max_rows=max_rows, num_requests=steps)
        return bench_serving(ServingBench(**sizes), progress)

    measure(run, "cpu", quick=quick, json_file=json_file)


@app.command()
def predict(
    quick: Quick = False,
    batch_size: BatchSize = None,
    max_rows: MaxRows = None,
    rounds: Rounds = None,
    json_file: JsonFile = None,
) -> None:
    """Predict with a saved model, beside its training."""

    def run(progress: Progress) -> Result:
        from benchmarks.predicting import QUICK, PredictBench, bench_predict

        sizes = sizes_of(
            QUICK if quick else {}, batch_size=batch_size, max_rows=max_rows, num_rounds=rounds
        )
        return bench_predict(PredictBench(**sizes), progress)

    measure(run, "cpu", quick=quick, json_file=json_file)


@app.command()
def quality(
    quick: Quick = False,
    data: Annotated[
        Path,
        typer.Option(help="The folder of the samples' files; benchmarks/samples.py names them."),
    ] = Path("../shared/data"),
    samples: Annotated[
        list[str] | None, typer.Option("--sample", help="May be repeated. All by default.")
    ] = None,
    models: Annotated[
        list[str] | None, typer.Option("--model", help="May be repeated. All by default.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=2, help="How often each is trained.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Train models with their defaults on samples of real data, beside plain torch."""

    def run(progress: Progress) -> Result:
        from benchmarks.quality import MODELS, QUICK, QualityBench, bench_quality
        from benchmarks.samples import SAMPLES

        sizes = sizes_of(
            QUICK if quick else {},
            data=data,
            samples=chosen("--sample", samples, tuple(SAMPLES)),
            models=chosen("--model", models, MODELS),
            num_seeds=seeds,
        )
        return bench_quality(QualityBench(**sizes), progress)

    measure(run, "cpu", quick=quick, json_file=json_file)


@app.command()
def start(
    quick: Quick = False,
    other: Annotated[
        Path | None, typer.Option(help="Another clone that takes turns with this one.")
    ] = None,
    rounds: Rounds = None,
    json_file: JsonFile = None,
) -> None:
    """Time `bagpipe train` from the start of its process to its first step."""

    def run(progress: Progress) -> Result:
        from benchmarks.start import QUICK, StartBench, bench_start

        sizes = sizes_of(QUICK if quick else {}, other=other, num_rounds=rounds)
        return bench_start(StartBench(**sizes), progress)

    measure(run, "cpu", quick=quick, json_file=json_file)


for command in (network, remote, cuts, cutting, recovery, saving):
    app.command()(command)
