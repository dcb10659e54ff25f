"""`bagpipe eval`, `bagpipe predict` and `bagpipe export`: what comes after training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from bagpipe.cli.common import (
    JsonFile,
    Overrides,
    console_progress,
    mistakes_told,
    prepare_environment,
    save_json,
    tell,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from bagpipe.train.saved import LoadedModel
    from bagpipe.train.scored import ScoredData

RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", show_default=False, help="A run's folder (log.folder).")
]
Data = Annotated[
    Path | None,
    typer.Argument(
        metavar="[DATA]",
        show_default=False,
        help="Raw files as the run's data were prepared from, or a folder of prepared data. By "
        "default the run's own data.",
    ),
]
Which = Annotated[str, typer.Option("--checkpoint", help="last or best.")]
PartName = Annotated[
    str | None,
    typer.Option(
        "--split",
        help="Part of prepared data: train, validation or test. By default test, if there is one, "
        "else validation.",
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(min=1, help="Rows that are predicted together; by default train.eval_batch_size."),
]


def evaluate(
    run: RunFolder,
    overrides: Overrides,
    data: Data = None,
    checkpoint: Which = "last",
    split: PartName = None,
    batch_size: BatchSize = None,
    json_file: JsonFile = None,
) -> None:
    """Tell how well a run's saved model predicts."""
    console = Console()
    with (
        mistakes_told(),
        _opened(console, run, overrides, data, checkpoint, split) as (loaded, scored),
    ):
        from bagpipe.errors import DataError
        from bagpipe.train.predict import score

        if not scored.has_labels:
            raise DataError(
                f"{data}: lacks a label to be compared with ({', '.join(scored.labels)}): give "
                "data that have all, or predict them (bagpipe predict)"
            )
        if scored.weight is not None and not scored.source.has_weights:
            raise DataError(
                f"{data}: has no column {scored.weight!r}, by whose weights the run's scores count "
                "samples: give data that have it, or count all alike (--set "
                "data.ignore_weights=true)"
            )
        size = batch_size or loaded.of.config.train.eval_batch_size
        with console_progress(console) as show:
            scores = score(
                loaded, scored.source, size, lambda done, total: show("batches", done, total)
            )
        step = loaded.of.saved.step
    if json_file is not None:
        save_json({"step": step, **scores.as_dict()}, json_file)
    if str(json_file) != "-":
        tell(console, f"step {step:,}: {scored.name} {scores}")


def predict(
    run: RunFolder,
    overrides: Overrides,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="FILE", help="The Parquet file to write.", show_default=False
        ),
    ],
    data: Data = None,
    checkpoint: Which = "last",
    split: PartName = None,
    batch_size: BatchSize = None,
) -> None:
    """Write the probability of each row to a Parquet file, in the order of the rows.

    Its columns are `score`, and `label` where the data have labels; of several labels `score_NAME`
    and `label_NAME` of each.
    """
    console = Console()
    with mistakes_told():
        from bagpipe.plots import check_can_write

        check_can_write(output)
        with _opened(console, run, overrides, data, checkpoint, split) as (loaded, scored):
            from bagpipe.train.predict import write_predictions

            with console_progress(console) as show:
                num_rows = write_predictions(
                    loaded,
                    scored.source,
                    output,
                    batch_size or loaded.of.config.train.eval_batch_size,
                    lambda done, total: show("batches", done, total),
                    has_labels=scored.has_labels,
                )
            step = loaded.of.saved.step
    tell(console, f"{output}: scores of {num_rows:,} rows, by the model of step {step:,}")


def export(
    run: RunFolder,
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", show_default=False, help="A new folder.")
    ],
    overrides: Overrides,
    checkpoint: Which = "last",
    arrow: Annotated[
        bool, typer.Option(help="Write each table as an Arrow file, for other programs.")
    ] = True,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Write the dense part as ONNX, too.")
    ] = False,
) -> None:
    """Write a run's saved model as a folder that bagpipe.serving answers requests from."""
    console = Console()
    with mistakes_told():
        prepare_environment("cpu")
        from bagpipe.train.export import export as export_model
        from bagpipe.train.saved import open_saved

        of = open_saved(run, checkpoint, overrides, lambda text: tell(console, text))
        with console_progress(console, counted=False) as show:
            manifest = export_model(of, folder, arrow=arrow, onnx=onnx, on_stage=show)
    num_rows = sum(table.num_embeddings for table in manifest.tables)
    tell(
        console,
        f"{folder}: the model of step {manifest.step:,}, {len(manifest.tables)} tables of "
        f"{num_rows:,} rows; bagpipe.serving.load({str(folder)!r}) answers requests",
    )


@contextmanager
def _opened(
    console: Console,
    run: Path,
    overrides: list[str],
    data: Path | None,
    checkpoint: str,
    split: str | None,
) -> Iterator[tuple[LoadedModel, ScoredData]]:
    """A run's model, loaded, and the data that it is to predict."""
    prepare_environment("auto")  # the run's device is known only once torch is loaded
    from bagpipe.train.saved import load_model, open_saved
    from bagpipe.train.scored import open_scored

    say: Callable[[str], None] = lambda text: tell(console, text)  # noqa: E731
    of = open_saved(run, checkpoint, overrides, say)
    scored = open_scored(of, data, split)
    with load_model(of) as loaded:
        yield loaded, scored
