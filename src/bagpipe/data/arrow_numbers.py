"""Labels, weights and dense numbers of Arrow columns.

Rows without a good one are refused: `BlockPlace.refuse` takes them out of `good` (n,), which says
which rows of a block are whole so far.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bagpipe.errors import DataError
from bagpipe.types import BoolArray, Float32Array, Float64Array

if TYPE_CHECKING:
    from pathlib import Path

    from bagpipe.data.raw import BlockPlace


def label_values(
    array: Any, name: str, at_least: float | None, good: BoolArray, place: BlockPlace
) -> Float32Array:
    """The labels (n,) of a column, from 0 to 1.

    Raises:
        DataError: The column is of a type that is no number.
    """
    values, present = _numbers(array, name, place.file)
    place.refuse(~present, good, "label is missing", f"label column {name!r} is missing", None)
    place.refuse(
        ~np.isfinite(values),
        good,
        "label is not finite",
        f"label column {name!r}{{}}, must be finite",
        values,
    )
    if at_least is not None:
        return (values >= at_least).astype(np.float32)
    must = "must be in [0, 1]; set at_least of source.label to turn it into 0 and 1"
    place.refuse(
        (values < 0) | (values > 1),
        good,
        "label is outside [0, 1]",
        f"label column {name!r}{{}}, {must}",
        values,
    )
    return values.astype(np.float32)


def weight_values(array: Any, name: str, good: BoolArray, place: BlockPlace) -> Float32Array:
    """The samples' weights (n,) of a column, 0 or more.

    Raises:
        DataError: The column is of a type that is no number.
    """
    values, present = _numbers(array, name, place.file)
    what = f"weight column {name!r}"
    place.refuse(~present, good, "weight is missing", f"{what} is missing", None)
    with np.errstate(over="ignore"):
        narrow: Float32Array = values.astype(np.float32)
    must = f"{what}{{}}, must be finite in float32"
    place.refuse(~np.isfinite(narrow), good, "weight is not finite", must, values)
    must = f"{what}{{}}, must be 0 or more; a row of weight 0 counts nowhere"
    place.refuse(values < 0, good, "weight is negative", must, values)
    return narrow


def dense_values(array: Any, name: str, good: BoolArray, place: BlockPlace) -> Float32Array:
    """The numbers (n,) of a dense column, 0 where missing; rows without a good one are refused.

    Raises:
        DataError: The column is of a type that is no number.
    """
    values, _ = _numbers(array, name, place.file)
    with np.errstate(over="ignore"):
        narrow: Float32Array = values.astype(np.float32)
    what = f"dense column {name!r}{{}}, must be finite in float32 (a missing value is a null)"
    place.refuse(~np.isfinite(narrow), good, "dense value is not finite", what, values)
    return narrow


def _numbers(array: Any, name: str, file: Path | str) -> tuple[Float64Array, BoolArray]:
    """Values as float64 (0 where missing), and where they are present."""
    kind = array.type
    if not is_number(kind):
        raise DataError(
            f"{file}, column {name!r} is of type {kind}, must be a number: cast it first"
        )
    return numbers(array), array.is_valid().to_numpy(zero_copy_only=False)


def numbers(array: Any) -> Float64Array:
    """The values (n,) of an array of numbers as float64, 0 where missing."""
    values: Float64Array = pc.fill_null(array.cast(pa.float64(), safe=False), 0.0).to_numpy(
        zero_copy_only=False
    )
    return values


def is_number(kind: Any) -> bool:
    """Whether the values of an Arrow type are numbers."""
    return bool(
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_decimal(kind)
        or pa.types.is_null(kind)
    )
