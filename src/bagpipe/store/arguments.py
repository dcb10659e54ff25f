"""What every store checks of its arguments before anything is read or written."""

from __future__ import annotations

import numpy as np

from bagpipe.errors import StoreError
from bagpipe.native.jit import jit
from bagpipe.types import Float32Array, Group, Int64Array


def check_arguments(group: Group, rows: Int64Array, records: Float32Array, what: str) -> None:
    """Checks rows (n,) and their records (n, record_width), which errors call `what`.

    Raises:
        StoreError: One is of another type or layout, or a row is out of range.
    """
    check_type(group, rows)
    wanted = (len(rows), group.record_width)
    fits = (
        isinstance(records, np.ndarray) and records.dtype == np.float32 and records.shape == wanted
    )
    if not fits or not records.flags.c_contiguous:
        raise StoreError(
            f"{what} for {len(rows):,} rows of {group.name} must be C-contiguous float32 of shape "
            f"{wanted}, is {_describe(records)}"
        )
    check_range(group, rows)


def check_out(group: Group, rows: Int64Array, out: Float32Array) -> None:
    """As `check_arguments`, for what a fetch fills."""
    check_arguments(group, rows, out, "out")
    if not out.flags.writeable:
        raise StoreError(
            f"out for a fetch of {len(rows):,} rows of {group.name} is read-only: pass an array "
            "of your own"
        )


def check_type(group: Group, rows: Int64Array) -> None:
    """Raises StoreError unless rows are a 1-D int64 array."""
    if not isinstance(rows, np.ndarray) or rows.dtype != np.int64 or rows.ndim != 1:
        raise StoreError(f"rows for {group.name} must be a 1-D int64 array, are {_describe(rows)}")


def check_range(group: Group, rows: Int64Array) -> None:
    """Raises StoreError unless all rows are the group's."""
    bad = _first_outside(rows, group.num_rows)
    if bad >= 0:
        raise StoreError(
            f"row {rows[bad]:,} lies outside {group.name}, whose rows are 0 to "
            f"{group.num_rows - 1:,}"
        )


def check_block_rows(group: Group, block_rows: int) -> None:
    """Raises StoreError unless a snapshot's blocks have at least one row."""
    if block_rows < 1:
        raise StoreError(
            f"block_rows of a snapshot of {group.name} is {block_rows}, must be at least 1"
        )


def closed(group: Group) -> StoreError:
    """What any use of a closed store raises."""
    return StoreError(
        f"the store of {group.name} is closed: make a new one, and restore it from a checkpoint"
    )


def _describe(value: object) -> str:
    """An argument's type and layout, for error messages."""
    if not isinstance(value, np.ndarray):
        return f"a {type(value).__name__}"
    layout = "C-contiguous" if value.flags.c_contiguous else "not C-contiguous"
    return f"{value.dtype} of shape {value.shape}, {layout}"


@jit
def _first_outside(rows: Int64Array, num_rows: int) -> int:
    """Index of the first row that is not in [0, num_rows), or -1."""
    for index in range(len(rows)):
        if rows[index] < 0 or rows[index] >= num_rows:
            return index
    return -1
