"""`bagpipe example` prints a run's file to begin with; the examples come with the package."""

from __future__ import annotations

from importlib.resources import files
from typing import Annotated

import typer

from bagpipe.cli.common import mistakes_told


def example(
    name: Annotated[
        str | None, typer.Argument(help="Which one; without a name all are listed.")
    ] = None,
) -> None:
    """Print an example of a run's file: `bagpipe example quickstart > run.toml`."""
    texts = {
        entry.name.removesuffix(".toml"): entry.read_text(encoding="utf-8")
        for entry in files("bagpipe").joinpath("examples").iterdir()
        if entry.name.endswith(".toml")
    }
    with mistakes_told():
        if name is None:
            for known in sorted(texts):
                typer.echo(f"{known}: {_first_sentence(texts[known])}")
        elif name in texts:
            typer.echo(texts[name], nl=False)
        else:
            raise typer.BadParameter(
                f"there is no example {name!r}: there are {', '.join(sorted(texts))}"
            )


def _first_sentence(text: str) -> str:
    """The first sentence of the comment with which the file begins."""
    lines = [line for line in text.splitlines() if line.startswith("#")]
    return " ".join(line.lstrip("# ") for line in lines).partition(". ")[0]
