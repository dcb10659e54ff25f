"""Requests as users send them, dicts or Arrow, made one Arrow record batch."""

from __future__ import annotations

import decimal
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import pyarrow as pa

from bagpipe.errors import DataError

Requests: TypeAlias = Any
"""A list of dicts from column to value, or a pyarrow Table or RecordBatch."""
WHERE = "the request"


def as_record_batch(requests: Requests, names: Sequence[str], where: str = WHERE) -> Any:
    """The record batch of some requests; of dicts it has the columns `names`.

    `where` is what messages call them.

    Raises:
        DataError: they are something else, or a dict lacks a column or has a value in it that no
            type of Arrow holds together with the others'.
    """
    if isinstance(requests, pa.RecordBatch):
        return requests
    if isinstance(requests, pa.Table):
        batches = requests.combine_chunks().to_batches()
        return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=requests.schema)
    if isinstance(requests, Mapping):
        raise DataError(f"{where} is one dict, must be a list of dicts, one for each row")
    if not isinstance(requests, Sequence) or not all(isinstance(row, Mapping) for row in requests):
        raise DataError(
            f"{where} is a {type(requests).__name__}, must be a list of dicts, or a pyarrow Table "
            "or RecordBatch"
        )
    return pa.RecordBatch.from_arrays(
        [_column(requests, name, where) for name in names], names=list(names)
    )


def _column(rows: Sequence[Mapping[str, Any]], name: str, where: str) -> Any:
    try:
        values = [row[name] for row in rows]
    except KeyError:
        place = next(place for place, row in enumerate(rows) if name not in row)
        raise DataError(
            f"{where}, row {place} (from 0) has no {name!r}; it has "
            f"{', '.join(map(repr, rows[place])) or 'nothing'}: give each row every column, None "
            "where a value is missing"
        ) from None
    try:
        return arrow_values(values)
    except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
        if _are_numbers(values):
            return pa.array([None if value is None else float(value) for value in values])
        raise DataError(
            f"{where}, column {name!r}: its values are of no common type ({_types(values)}): "
            f"{error}"
        ) from error


def arrow_values(values: Sequence[Any]) -> Any:
    """An Arrow array of some values, as of `pyarrow.array`, and of integers up to 2**64, too."""
    try:
        return pa.array(values)
    except OverflowError:  # from 2**63 on
        return pa.array(values, pa.uint64())


def _are_numbers(values: Sequence[Any]) -> bool:
    """Whether all are numbers, of types that Arrow does not mix by itself."""
    return all(
        value is None or isinstance(value, numbers.Real | decimal.Decimal) for value in values
    )


def _types(values: Sequence[Any]) -> str:
    """The types of values, each with the row in which it comes first."""
    first: dict[str, int] = {}
    for row, value in enumerate(values):
        if value is not None:
            first.setdefault(type(value).__name__, row)
    return ", ".join(f"{kind} in row {row}" for kind, row in first.items()) or "none"
