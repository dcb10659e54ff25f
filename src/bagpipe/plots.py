"""The door to matplotlib, which is an extra of the distribution.

A command checks its output file before the work that the file would show, since an hour of work is
lost otherwise.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bagpipe.errors import ConfigError
from bagpipe.native.files import replaced

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

DISTRIBUTION = "bagpipe-recsys"
"""The name of this package for pip; the package index has another project under `bagpipe`."""
_COLORS = 10  # of matplotlib's cycle
_DASHES = ("-", "--", ":", "-.")
_MARKERS = "osv^DPX*"
_LONG_AXIS = 5_000.0  # from its one end to the other; beyond that each power of ten has one tick


def check_can_plot(path: Path) -> None:
    """Checks that a plot can be saved at a path.

    Raises:
        ConfigError: matplotlib is not installed, does not know the path's ending, or the file can't
            be written.
    """
    known = sorted(new_figure().canvas.get_supported_filetypes())
    if path.suffix[1:].lower() not in known:
        raise ConfigError(
            f"{path}: the plot can't be saved: its ending must be one of .{', .'.join(known)}"
        )
    check_can_write(path)


def check_can_write(path: Path) -> None:
    """Checks that a file can be written, and leaves the path as it was.

    Raises:
        ConfigError: The file can't be written.
    """
    is_new = not path.exists()
    try:
        path.open("ab").close()  # only the file system knows; permission bits are not all
        if is_new:
            path.unlink()
    except OSError as error:
        raise ConfigError(f"{path}: can't be written: {error.strerror}") from error


def new_figure(*, width: float = 8.0, height: float = 5.0) -> Figure:
    """Makes an empty figure.

    Args:
        width: In inches.
        height: In inches.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            f"a plot needs matplotlib: pip install '{DISTRIBUTION}[plot]', or leave the plot out"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def line_style(index: int) -> dict[str, Any]:
    """Returns color, dashes and marker of a plot's line; forty lines differ in color or dashes."""
    return {
        "color": f"C{index % _COLORS}",
        "linestyle": _DASHES[index // _COLORS % len(_DASHES)],
        "marker": _MARKERS[index % len(_MARKERS)],
    }


def show_percent(axis: Axis) -> None:
    """Makes the ticks of an axis of shares, 0.02 for example, read as "2 %"; once all is drawn."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

    if axis.get_scale() == "log":
        low, high = axis.get_view_interval()
        is_long = high > _LONG_AXIS * low
        axis.set_major_locator(LogLocator(subs=(1.0,) if is_long else (1.0, 2.0, 5.0)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda share, _: _percent(share)))
    else:
        axis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=0, symbol=" %"))


def _percent(share: float) -> str:
    """Writes a share as people do, never as a power of ten."""
    digits = f"{100 * share:.12f}".rstrip("0").rstrip(".")
    return f"{digits} %"


def save_figure(figure: Figure, path: Path) -> None:
    """Saves a figure in the format of the path's ending.

    Raises:
        ConfigError: The figure can't be saved. A file that was there stays as it was.
    """
    with replaced(path) as temporary:
        try:
            figure.savefig(temporary, dpi=150)
        except ValueError as error:
            raise ConfigError(f"{path}: the plot can't be saved: {error}") from error
