"""Columns of one type read in one call, since a call of Arrow costs as much as many values.

All of it means what it means column by column. Where something is wrong or rare, `Apart` is raised,
and the caller reads column by column, which says what is wrong and where.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import pyarrow as pa

from bagpipe.data.arrow_numbers import is_number, numbers
from bagpipe.types import Float32Array

Pieces: TypeAlias = list[tuple[Sequence[int], Any]]
"""Arrow arrays, each with the numbers of the columns whose values it has, column after column."""

_PLAIN = {
    kind.id
    for kind in (
        *(pa.bool_(), pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.null()),
        *(pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64(), pa.float32(), pa.float64()),
        *(pa.string(), pa.large_string(), pa.binary(), pa.large_binary()),
    )
}
"""Types that have no parameters, whose arrays can be put one behind the other."""


class Apart(Exception):
    """These columns can't be read together."""


class Rows(Protocol):
    """Some raw rows."""

    num_rows: int

    def pieces(self, names: Sequence[str]) -> Pieces:
        """The values of columns. Apart: there is no such column, or its values are of no type."""


class ArrowRows:
    """Rows of a record batch."""

    def __init__(self, rows: Any) -> None:
        self._rows, names = rows, rows.schema.names
        self._places = {name: place for place, name in enumerate(names)}
        if len(self._places) != len(names):
            raise Apart
        self.num_rows: int = len(rows)

    def pieces(self, names: Sequence[str]) -> Pieces:
        """See `Rows`."""
        alone: Pieces = []
        of_types: dict[int, tuple[list[int], list[Any]]] = {}
        for number, name in enumerate(names):
            if name not in self._places:
                raise Apart
            array = self._rows.column(self._places[name])
            if array.type.id not in _PLAIN:
                alone.append(([number], array))
                continue
            columns, arrays = of_types.setdefault(array.type.id, ([], []))
            columns.append(number)
            arrays.append(array)
        try:
            together = [
                (columns, arrays[0] if len(arrays) == 1 else pa.concat_arrays(arrays))
                for columns, arrays in of_types.values()
            ]
        except pa.ArrowException:  # texts of more than 2 GB
            raise Apart from None
        return [*together, *alone]


class DictRows:
    """Rows that are dicts."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._rows = rows
        self.num_rows = len(rows)

    def pieces(self, names: Sequence[str]) -> Pieces:
        """See `Rows`."""
        try:
            values = pa.array([row[name] for name in names for row in self._rows])
        except (pa.ArrowException, KeyError, OverflowError, TypeError, ValueError):
            raise Apart from None
        return [(range(len(names)), values)]


def dense_numbers(rows: Rows, names: Sequence[str]) -> Float32Array:
    """Dense numbers (n, D), 0 where missing. Apart: one is no number, or not finite."""
    dense = np.empty((rows.num_rows, len(names)), np.float32)
    if not names:
        return dense
    for columns, array in rows.pieces(names):
        if not is_number(array.type):
            raise Apart
        values = numbers(array).reshape(len(columns), rows.num_rows)
        with np.errstate(over="ignore"):
            dense[:, columns] = values.T
    if not np.isfinite(dense).all():
        raise Apart
    return dense
