"""`bagpipe bench`: measures again what docs/results.md states. The benchmarks are in
`bagpipe.bench`.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from bagpipe.cli_common import (
    JsonFile,
    console_progress,
    mistakes_told,
    prepare_environment,
    save_json,
)

if TYPE_CHECKING:
    from bagpipe.bench.measure import Progress, Result


class Benchmark(StrEnum):
    """What can be measured."""

    oracle = "oracle"
    step = "step"
    curve = "curve"
    gpu = "gpu"
    trainers = "trainers"
    all = "all"  # but for gpu


def bench(
    what: Annotated[Benchmark, typer.Argument(show_default=True)] = Benchmark.all,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Tiny sizes, to see that it works; the numbers mean nothing."),
    ] = False,
    batch_size: Annotated[
        list[int] | None,
        typer.Option(
            "--batch",
            "--batch-size",
            min=1,
            help="Batch size, of each trainer; may be repeated for step.",
        ),
    ] = None,
    max_rows: Annotated[
        int | None,
        typer.Option(min=1, help="Cut tables to so many rows; step cuts to 2,200,000 by default."),
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(help="step, gpu, trainers: an arm to run; may be repeated. All by default."),
    ] = None,
    lookahead: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Batches ahead; may be repeated for oracle and curve."),
    ] = None,
    cache: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="oracle, step: share of the rows in the cache."),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            min=1, help="step, gpu, trainers: turns of each arm; oracle: batches measured."
        ),
    ] = None,
    workload: Annotated[
        str | None,
        typer.Option(
            help="gpu, trainers: which tables, stream, model and cache: W1 (gpu), W2, W3, W4, "
            "W4-file, small (trainers)."
        ),
    ] = None,
    num_trainers: Annotated[
        int | None,
        typer.Option(
            "--trainers", help="trainers: how many, 2 by default; oracle: plan for so many, too."
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="gpu, trainers: steps measured in a turn.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="trainers: cpu; cuda, a device each; or cuda:0, which all share.")
    ] = "cpu",
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="oracle, gpu, trainers: threads that read and de-duplicate; by default as in "
            "training.",
        ),
    ] = None,
    scaling: Annotated[
        bool | None,
        typer.Option(
            "--scaling/--no-scaling", help="trainers: one trainer alone, too; on cuda by default."
        ),
    ] = None,
    graph: Annotated[
        bool, typer.Option("--graph", help="trainers: the dense part as a CUDA graph.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="curve, gpu: save the plot here (.png, .svg, .pdf).")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure the oracle, a step against tables in RAM, rows fetched over cache size, a step on a
    GPU or of several trainers.
    """
    console = Console()
    given = {
        "batch_sizes": batch_size,
        "max_rows": max_rows,
        "arms": arm,
        "lookaheads": lookahead,
        "cache_share": cache,
        "rounds": rounds,
        "steps": steps,
        "dedup_threads": threads,
    }
    of_trainers = {
        "num_trainers": num_trainers,
        "device": device,
        "scaling": device == "cuda" if scaling is None else scaling,
        "graph": graph,
    }
    options = {name: value for name, value in given.items() if value is not None}
    prepare_environment("auto" if what is Benchmark.gpu else device)
    with mistakes_told():
        from bagpipe.bench.measure import as_json, describe_environment

        values: dict[str, Any] = {"environment": describe_environment(), "quick": quick}
        for run in _chosen(what, quick, options, of_trainers, workload, plot):
            with console_progress(console) as progress:
                result = run(progress)
            _show(console, result)
            values[result.name] = as_json(result.values)
        if what is Benchmark.all:
            console.print(
                "left out gpu, which takes minutes and means something on a CUDA device only: "
                "bagpipe bench gpu"
            )
        if json_file is not None:
            save_json(values, json_file)


def _show(console: Console, result: Result) -> None:
    for table in result.tables:
        console.print(table)
    for note in result.notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)


def _chosen(
    what: Benchmark,
    quick: bool,
    options: dict[str, Any],
    of_trainers: dict[str, Any],
    workload: str | None,
    plot: Path | None,
) -> list[Callable[[Progress], Result]]:
    """The benchmarks to run, in order, each with its sizes; that of a GPU only when it is asked
    for.
    """
    from bagpipe.bench.sizes import curve_sizes, gpu_sizes, oracle_sizes, step_sizes, trainers_sizes

    def oracle(progress: Progress) -> Result:
        from bagpipe.bench.oracle_bench import bench_oracle

        given = (
            {}
            if of_trainers["num_trainers"] is None
            else {"num_trainers": of_trainers["num_trainers"]}
        )
        return bench_oracle(oracle_sizes(options | given, quick=quick), progress)

    def step(progress: Progress) -> Result:
        from bagpipe.bench.step_bench import bench_step

        return bench_step(step_sizes(options, quick=quick), progress)

    def curve(progress: Progress) -> Result:
        from bagpipe.bench.curve_bench import bench_curve

        return bench_curve(curve_sizes(options, quick=quick), progress, plot)

    def gpu(progress: Progress) -> Result:
        from bagpipe.bench.gpu_bench import bench_gpu

        return bench_gpu(
            gpu_sizes(workload or "W1", options, quick=quick), options.get("arms"), progress, plot
        )

    def trainers(progress: Progress) -> Result:
        from bagpipe.bench.trainers_bench import bench_trainers

        given = {name: value for name, value in of_trainers.items() if value is not None}
        return bench_trainers(
            trainers_sizes(workload or "small", options | given, quick=quick), progress
        )

    if what is Benchmark.all:
        return [step, curve, trainers, oracle]  # the last one changes how memory is allocated
    return [
        {"oracle": oracle, "step": step, "curve": curve, "gpu": gpu, "trainers": trainers}[what]
    ]
