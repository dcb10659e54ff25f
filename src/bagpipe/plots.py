"""The door to matplotlib, which is an extra of the distribution: figures, and files that can't be
written told before the work that they would show.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bagpipe.errors import ConfigError
from bagpipe.native.files import replaced

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DISTRIBUTION = "bagpipe-recsys"
"""What pip calls this package; the package index has another project under the name `bagpipe`."""


def check_can_plot(path: Path) -> None:
    """ConfigError: matplotlib is not installed, does not know the path's ending, or the file can't
    be written.
    """
    known = sorted(new_figure().canvas.get_supported_filetypes())
    if path.suffix[1:].lower() not in known:
        raise ConfigError(
            f"{path}: the plot can't be saved: its ending must be one of .{', .'.join(known)}"
        )
    check_can_write(path)


def check_can_write(path: Path) -> None:
    """ConfigError: the file can't be written. Leaves what is there, and nothing where nothing
    was.
    """
    is_new = not path.exists()
    try:
        path.open("ab").close()
        if is_new:
            path.unlink()
    except OSError as error:
        raise ConfigError(f"{path}: can't be written: {error.strerror}") from error


def new_figure(*, width: float = 8.0, height: float = 5.0) -> Figure:
    """An empty figure of so many inches. ConfigError: matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            f"a plot needs matplotlib: pip install '{DISTRIBUTION}[plot]', or leave the plot out"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: Path) -> None:
    """Saves it in the format of the path's ending. ConfigError: it can't be, and a file that was
    there is as it was.
    """
    with replaced(path) as temporary:
        try:
            figure.savefig(temporary, dpi=150)
        except ValueError as error:
            raise ConfigError(f"{path}: the plot can't be saved: {error}") from error
