"""The `bagpipe` command.

Commands import what they need when they run, so that `--help` is quick and torch sees its settings.

A user's mistake prints one message on stderr and ends with status 2, without a traceback. A run
that a signal ends at a step boundary, with a checkpoint, has status 128 + the signal's number. A
traceback means a defect of ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer
from rich.console import Console

import bagpipe
from bagpipe.cli.common import (
    File,
    Overrides,
    console_progress,
    load_training,
    mistakes_told,
    prepare_environment,
    tell,
)
from bagpipe.cli.example import example
from bagpipe.cli.plan import plan
from bagpipe.cli.scoring import evaluate, export, predict
from bagpipe.cli.serve import serve
from bagpipe.cli.settings import settings

if TYPE_CHECKING:
    from bagpipe.config.run import RunConfig
    from bagpipe.distributed.alone import Peers
    from bagpipe.train.loop import Result

# rich's own markup would swallow words in brackets, such as a section's name
app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown")
data_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown", help="Prepare data and look at them."
)
app.add_typer(data_app, name="data")
app.command()(example)
app.command()(plan)
app.command()(serve)
app.command()(settings)
app.command("eval")(evaluate)
app.command()(predict)
app.command()(export)


@app.callback(invoke_without_command=True)
def main(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", is_eager=True)
    ] = False,
) -> None:
    """Train deep recommendation models whose embedding tables do not fit the GPU.

    A TOML file says what to train on what; `--set train.batch_size=4096` changes one of its keys.
    """
    if show_version:
        typer.echo(f"bagpipe {bagpipe.__version__}")
        raise typer.Exit


@app.command()
def train(
    file: File,
    overrides: Overrides,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on from the newest valid checkpoint of the run's folder."
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove the checkpoints that an earlier run left.")
    ] = False,
    start_from: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="RUN",
            help="Start with the tables and the dense part of another run: its folder, or one of "
            "its checkpoints.",
            show_default=False,
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Write a profile of some steps here, a .json that ui.perfetto.dev opens."
        ),
    ] = None,
    trace_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps to profile; 10 by default.")
    ] = None,
    trace_after: Annotated[
        int | None, typer.Option(min=0, help="Steps before the first of them; 20 by default.")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="ray: start trainers and shard servers on a Ray cluster, and start them again "
            "when they die. By default this process is a trainer, of those that torchrun started."
        ),
    ] = None,
    trainers: Annotated[int, typer.Option(min=1, help="Trainers on Ray.")] = 1,
    servers: Annotated[int, typer.Option(min=1, help="Shard servers on Ray.")] = 1,
    address: Annotated[
        str | None,
        typer.Option(
            help="Of the Ray cluster; by default one that runs here or that RAY_ADDRESS names, "
            "else one is started on this machine."
        ),
    ] = None,
    life_timeout: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="How long a trainer or server on Ray may give no sign of life before all trainers "
            "start again; 30 by default.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Train a model."""
    console = Console()
    with mistakes_told():
        if resume and overwrite:
            raise typer.BadParameter(
                "--resume goes on with the earlier run that --overwrite removes: give one of them"
            )
        if trace is None and not (trace_steps is None and trace_after is None):
            raise typer.BadParameter(
                "--trace-steps and --trace-after say which steps --trace FILE writes: give it too"
            )
        if engine not in (None, "ray"):
            raise typer.BadParameter(f"--engine {engine}: must be ray")
        if engine is None and (trainers, servers, address, life_timeout) != (1, 1, None, None):
            raise typer.BadParameter(
                "these belong to --engine ray: --trainers, --servers, --address, --life-timeout"
            )
        if engine is not None and trace is not None:
            raise typer.BadParameter("--trace is not supported with --engine ray")
        from bagpipe.config.load import load_config
        from bagpipe.config.run import RunConfig

        config = load_config(RunConfig, file, overrides)
        prepare_environment(config.train.device)  # before the import of torch below
        traced = {"path": trace, "num_steps": trace_steps, "after": trace_after}
        if engine is not None:
            from bagpipe.launch.ray import LIFE_TIMEOUT_S, Roles, train_on_ray
            from bagpipe.train.progress import ConsoleReporter

            roles = Roles(
                num_trainers=trainers,
                num_servers=servers,
                life_timeout_s=LIFE_TIMEOUT_S if life_timeout is None else life_timeout,
            )
            with ConsoleReporter(console) as reporter:
                result = train_on_ray(
                    config,
                    roles,
                    reporter=reporter,
                    address=address,
                    resume=resume,
                    overwrite=overwrite,
                    start_from=start_from,
                )
            return _tell_end(console, config, result)
        load_training()
        from bagpipe.launch.torchrun import joined_trainers

        with joined_trainers(config.train.wait_timeout_s) as peers:
            console.quiet = peers.rank > 0
            result = _train(
                console,
                config,
                peers,
                resume=resume,
                overwrite=overwrite,
                start_from=start_from,
                traced=traced,
            )
    _tell_end(console, config, result)


@data_app.command("prepare")
def prepare_data(file: File, overrides: Overrides) -> None:
    """Turn raw files into prepared ones, as the [prepare] section says."""
    console = Console()
    with mistakes_told():
        from bagpipe.config.load import load_config
        from bagpipe.config.run import PrepareFile
        from bagpipe.data.notes import prepare_notes
        from bagpipe.data.prepare import prepare

        config = load_config(PrepareFile, file, overrides, only=["prepare"]).prepare
        with console_progress(console, counted=False) as show:
            manifest = prepare(config, lambda at: show(at.stage, at.done, at.total))
    rows = f"{manifest.num_rows('train'):,} training and {manifest.num_rows('validation'):,} "
    rows += "validation rows"
    if num_test := manifest.num_rows("test"):
        rows += f", {num_test:,} test rows"
    skipped = (
        f", {manifest.source.num_rows_skipped:,} skipped"
        if manifest.source.num_rows_skipped
        else ""
    )
    tell(
        console,
        f"{config.output}: {rows}{skipped}",
    )
    for note in prepare_notes(manifest):
        tell(console, note)


@data_app.command("inspect")
def inspect_data(
    file: File,
    overrides: Overrides,
    split: Annotated[str, typer.Option(help="train, validation or test")] = "train",
    batches: Annotated[int, typer.Option(min=1, help="Batches of 16,384 samples to read.")] = 100,
    plot: Annotated[
        Path | None, typer.Option(help="Save a plot of the skew here (.png, .svg, .pdf).")
    ] = None,
) -> None:
    """Print how many ids each table has and how skewed its accesses are."""
    console = Console()
    with mistakes_told():
        from bagpipe.config.data import data_name
        from bagpipe.config.load import load_config
        from bagpipe.config.run import DataFile
        from bagpipe.data import open_source
        from bagpipe.data.base import Split
        from bagpipe.data.inspect import (
            INSPECTED_BATCH_SIZE,
            inspect_source,
            render_table,
            save_plot,
        )
        from bagpipe.data.notes import run_notes
        from bagpipe.plots import check_can_plot

        if split not in get_args(Split):
            raise typer.BadParameter(f"--split {split}: must be train, validation or test")
        config = load_config(DataFile, file, overrides, only=["data"]).data
        if plot is not None:
            check_can_plot(plot)
        stats = inspect_source(open_source(config, cast(Split, split)), max_batches=batches)
        console.print(render_table(stats))
        for note in run_notes(config):
            tell(console, note)
        if plot is not None:
            what = f"{data_name(config)}, {split} split"
            read = f"up to {batches:,} batches of {INSPECTED_BATCH_SIZE:,} samples"
            save_plot(stats, plot, title=f"Skew of {what}\n{read}")
            tell(console, f"plot: {plot}")


def _train(
    console: Console,
    config: RunConfig,
    peers: Peers,
    *,
    resume: bool,
    overwrite: bool,
    start_from: Path | None,
    traced: Mapping[str, Any],
) -> Result:
    from bagpipe.launch.torchrun import torchrun_launcher
    from bagpipe.train.progress import ConsoleReporter
    from bagpipe.train.trace import TraceOptions
    from bagpipe.train.trainer import train

    given = {key: value for key, value in traced.items() if value is not None}
    trace = TraceOptions(**given) if given else None
    with ConsoleReporter(console) as reporter:
        return train(
            config,
            reporter=reporter,
            resume=resume,
            overwrite=overwrite,
            start_from=start_from,
            trace=trace,
            peers=peers,
            launcher=torchrun_launcher(),
        )


def _tell_end(console: Console, config: RunConfig, result: Result) -> None:
    saved = f"checkpoint: {result.checkpoint}" if result.checkpoint is not None else "no checkpoint"
    if result.stopped_by is not None:
        tell(
            console,
            f"stopped by {result.stopped_by.name} after step {result.step:,}; {saved}; go on with "
            "--resume",
        )
        raise typer.Exit(128 + result.stopped_by)
    tell(console, f"trained {result.step:,} steps; {saved}; log: {config.log.folder}")
