"""`bagpipe plan`, the dry run: replays the oracle over a run's data, without torch.

It compares cache sizes and lookaheads. With several trainers, which share each batch, it also says
what they would send each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from bagpipe.cli.common import (
    File,
    JsonFile,
    Overrides,
    console_progress,
    mistakes_told,
    save_json,
    tell,
)

if TYPE_CHECKING:
    from bagpipe.config.run import RunConfig
    from bagpipe.oracle.dry_run import DryRun
    from bagpipe.oracle.row_trace import OnProgress

DEFAULT_CACHES = ("0.3%", "1%", "2%", "5%", "10%")
DEFAULT_LOOKAHEADS = (1, 20, 100, 200)


def plan(
    file: File,
    overrides: Overrides,
    cache: Annotated[
        list[str] | None,
        typer.Option(
            help="A cache size, of each trainer: rows (675_000), a share (2%) or memory (4GiB); "
            "may be repeated.",
            show_default=False,
        ),
    ] = None,
    lookahead: Annotated[
        list[int] | None,
        typer.Option(
            help="Batches that the oracle sees ahead; may be repeated.", min=1, show_default=False
        ),
    ] = None,
    steps: Annotated[
        int,
        typer.Option(
            min=2, help="Steps to replay; the first quarter warms the cache up and is not counted."
        ),
    ] = 400,
    trainers: Annotated[
        int,
        typer.Option(
            min=1,
            help="Trainers that share the tables and each batch, as `torchrun -m bagpipe train` "
            "has them; --cache is that of each. Also says what they send each other.",
        ),
    ] = 1,
    hosts: Annotated[
        int,
        typer.Option(
            min=1,
            help="Hosts on which the trainers are; says how much of what they send leaves one.",
        ),
    ] = 1,
    plot: Annotated[
        Path | None,
        typer.Option(help="Save a plot of rows fetched a step here (.png, .svg, .pdf)."),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Say what caches and lookaheads of several sizes would fetch, without training."""
    console = Console()
    with mistakes_told():
        from bagpipe.config.data import data_name
        from bagpipe.config.load import load_config
        from bagpipe.config.run import RunConfig
        from bagpipe.oracle.dry_run_view import (
            as_dict,
            describe_largest,
            render_points,
            render_smallest,
            render_traffic,
            save_plot,
        )
        from bagpipe.plots import check_can_plot, check_can_write

        config = load_config(RunConfig, file, overrides)
        if plot is not None:
            check_can_plot(plot)
        if json_file is not None and str(json_file) != "-":
            check_can_write(json_file)
        with console_progress(console) as progress:
            result = _dry_run(
                config,
                cache or (),
                lookahead or DEFAULT_LOOKAHEADS,
                steps,
                (trainers, hosts),
                progress,
            )
        console.print(render_points(result))
        if trainers > 1:
            console.print(render_traffic(result))
        console.print(render_smallest(result))
        tell(console, describe_largest(result))
        if plot is not None:
            batches = f"a step of {config.train.batch_size:,} samples"
            save_plot(result, plot, title=f"Rows fetched {batches}\n{data_name(config.data)}")
            tell(console, f"plot: {plot}")
        if json_file is not None:
            save_json(as_dict(result), json_file)


def _dry_run(
    config: RunConfig,
    caches: Sequence[str],
    lookaheads: Sequence[int],
    num_steps: int,
    trainers: tuple[int, int],
    progress: OnProgress,
) -> DryRun:
    """Reads a trace of the data once and replays it at each point of the grid.

    Args:
        config: The run.
        caches: Cache sizes as the command line spells them; none: `DEFAULT_CACHES`.
        lookaheads: In batches.
        num_steps: Steps to replay.
        trainers: How many trainers there are, and on how many hosts.
        progress: Is told how far it is.
    """
    from dataclasses import replace

    from bagpipe.config.tables import make_tables
    from bagpipe.data import open_source
    from bagpipe.oracle.dry_run import Grid, dry_run
    from bagpipe.oracle.row_trace import read_trace
    from bagpipe.oracle.sizes import parse_rows
    from bagpipe.types import group_tables

    source = open_source(config.data, "train")
    groups = group_tables(make_tables(source.features, config), config.table_optimizer.build())
    grid = Grid(
        cache_rows=[parse_rows(cache, groups, "--cache") for cache in caches or DEFAULT_CACHES],
        lookaheads=lookaheads,
        num_steps=num_steps,
        prefetch_depth=config.cache.prefetch_depth,
    )
    batches = source.batches(batch_size=config.train.batch_size, drop_last=config.train.drop_last)
    sparse = (batch.sparse for batch in batches)
    num_trainers, num_hosts = trainers
    trace = read_trace(
        groups,
        sparse,
        max_batches=grid.num_batches,
        num_trainers=num_trainers,
        num_hosts=num_hosts,
        progress=progress,
    )
    if not caches:
        # a default below what the largest batch needs could not be planned, so it is raised, and
        # twice the least shows what a little more would save
        sizes = [
            max(parse_rows(size, groups, "--cache"), trace.smallest_cache)
            for size in DEFAULT_CACHES
        ]
        twice = min(2 * trace.smallest_cache, sum(group.num_rows for group in groups))
        grid = replace(grid, cache_rows=sorted({*sizes, twice}))
    return dry_run(trace, grid, progress=progress)
