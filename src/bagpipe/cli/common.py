"""What the subcommands of `bagpipe` share: arguments, messages, and the environment of torch."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bagpipe.errors import BackgroundError, BagpipeError, LostError, PlanError
from bagpipe.native.files import replaced

File = Annotated[Path, typer.Argument(metavar="RUN.toml", show_default=False)]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        default_factory=list,
        show_default=False,
        help="Set a key; may be repeated.",
    ),
]
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Save all numbers here; - prints them."),
]


@contextmanager
def mistakes_told() -> Iterator[None]:
    """Turns the errors that a user can do something about into a message and status 2."""
    try:
        yield
    except BagpipeError as error:
        is_told_by_cause = isinstance(error, BackgroundError) and not isinstance(error, LostError)
        cause = error.__cause__ if is_told_by_cause else error
        # a wrong plan, or an error of a thread that is none of ours, is a defect: show where it is
        if (
            isinstance(error, PlanError)
            or not isinstance(cause, BagpipeError)
            or isinstance(cause, PlanError)
        ):
            raise
        notes = getattr(error, "__notes__", [])
        tell(Console(stderr=True), "\n".join([f"error: {cause}", *notes]), style="red")
        raise typer.Exit(2) from error


def tell(console: Console, text: str, style: str | None = None) -> None:
    """Prints a sentence as it stands: no word is taken for markup, and no path is cut in two."""
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def prepare_environment(device: str) -> None:
    """Sets what torch reads when it is loaded; a setting of the user's stays.

    Without transparent huge pages the pooled output page-faults anew at every step on a CPU, and a
    forward takes two to three times as long. Deterministic matrix products on CUDA need a fixed
    workspace.
    """
    if device != "cuda":
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if device != "cpu":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # where a process is gone torch warns with its own stack, and of waits that go on, too
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def load_training() -> None:
    """Imports what trains, in two thirds of the time that Python would take by itself.

    It would look for garbage again and again among 360,000 objects that stay.
    """
    if "torch" in sys.modules:  # then it is not the program's start
        return
    gc.disable()
    try:
        import bagpipe.train.trainer  # noqa: F401
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def console_progress(
    console: Console, *, counted: bool = True
) -> Iterator[Callable[[str, int, int], None]]:
    """Draws a bar for each stage of a long command.

    Args:
        console: Where to draw.
        counted: Whether the numbers are shown beside the bar.

    Yields:
        A function to call with the stage, how much is done, and how much there is.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *((MofNCompleteColumn(),) if counted else ()),
        TimeRemainingColumn(),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console) as bar:

        def tell(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage)
            bar.update(tasks[stage], completed=done, total=total)

        yield tell


def save_json(values: Mapping[str, Any], path: Path) -> None:
    """Writes values as JSON.

    Args:
        values: What `json` can write.
        path: The file, or "-" for stdout.

    Raises:
        ConfigError: The file can't be written.
    """
    text = json.dumps(values, indent=2) + "\n"
    if str(path) == "-":
        typer.echo(text, nl=False)
        return
    with replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
