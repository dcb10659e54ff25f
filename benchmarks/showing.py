"""How a subcommand runs its benchmark, and shows and saves what it found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from bagpipe.cli.common import console_progress, mistakes_told, prepare_environment, save_json

if TYPE_CHECKING:
    from benchmarks.measure import Progress, Result


def measure(
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
