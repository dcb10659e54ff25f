"""Which rows of a table an index names, as torch and numpy read it."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from bagpipe.types import Int64Array


def rows_asked_for(index: Any, table: str, num_rows: int) -> Int64Array:
    """Returns the rows that `index` names: (n,), or () where it is a single number.

    Raises:
        IndexError: the table has no such row, or `index` is neither a slice, nor a number, nor
            numbers or truth values in one dimension.
    """
    if isinstance(index, slice):
        return np.arange(*index.indices(num_rows), dtype=np.int64)
    ids = np.asarray(index.cpu() if isinstance(index, Tensor) else index)
    if ids.shape == (0,):
        return np.empty(0, np.int64)
    if ids.dtype == bool and ids.shape == (num_rows,):
        return np.flatnonzero(ids)
    # a tuple is row and column to torch
    if isinstance(index, tuple) or ids.ndim > 1 or ids.dtype.kind not in "iu":
        raise IndexError(
            f"table {table!r} is indexed by rows: a number, a slice or a list of numbers, not "
            f"{index!r}"
        )
    outside = (ids < -num_rows) | (ids >= num_rows)
    if outside.any():
        raise IndexError(
            f"table {table!r} has no row {np.atleast_1d(ids)[np.atleast_1d(outside)][0]}: its rows "
            f"are 0 to {num_rows - 1:,}"
        )
    return np.where(ids < 0, ids + num_rows, ids).astype(np.int64)
