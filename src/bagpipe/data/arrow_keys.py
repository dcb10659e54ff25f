"""Arrow columns to 64-bit keys, one a row or a list of them a row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from bagpipe.data.raw import MISSING_KEY, Keys
from bagpipe.errors import DataError
from bagpipe.types import Int64Array


def is_list(kind: Any) -> bool:
    """Whether an Arrow type holds several values a row."""
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def single_keys(column: Any, where: str) -> Keys:
    """One key a row of an Arrow array of integers, strings, binaries or booleans; null is
    MISSING_KEY.
    """
    return Keys(values=_keys(column, where), offsets=None)


def list_keys(column: Any, where: str) -> Keys:
    """The keys of each row of a list array. A null or empty list is an empty bag; null items and ""
    are left out.
    """
    lists = column.cast(pa.large_list(column.type.value_type))
    lengths = pc.fill_null(pc.list_value_length(lists), 0)
    offsets = np.concatenate([[0], np.cumsum(lengths.to_numpy(zero_copy_only=False))]).astype(
        np.int64
    )
    items = pc.list_flatten(lists)
    kept = items.is_valid()
    if _is_text(items.type):
        kept = pc.and_(kept, pc.fill_null(pc.not_equal(pc.binary_length(items), 0), False))
    if pc.all(kept, min_count=0).as_py():
        return Keys(values=_keys(items, where), offsets=offsets)
    before = np.concatenate([[0], np.cumsum(kept.to_numpy(zero_copy_only=False))]).astype(np.int64)
    return Keys(values=_keys(items.filter(kept), where), offsets=before[offsets])


def split_keys(column: Any, separator: str, where: str) -> Keys:
    """The keys of a string column whose values hold several, e.g. ``"Drama|War"``."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not _is_text(column.type):
        raise DataError(
            f"{where} is of type {column.type}, must be a string to be split by {separator!r}"
        )
    return list_keys(pc.split_pattern(column, separator), where)


def _keys(column: Any, where: str) -> Int64Array:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if pa.types.is_null(kind):
        return np.full(len(column), MISSING_KEY, np.int64)
    if _is_text(kind):
        return _string_keys(column)
    if pa.types.is_boolean(kind):
        column = column.cast(pa.int64())
    elif not pa.types.is_integer(kind):
        raise DataError(
            f"{where} is of type {kind}; a categorical feature must hold integers, strings or "
            "booleans: cast it first"
        )
    present = column.is_valid().to_numpy(zero_copy_only=False)
    # uint64 wraps, one to one
    values: Int64Array = pc.fill_null(column, 0).to_numpy(zero_copy_only=False).astype(np.int64)
    keys: Int64Array = np.where(present, values, MISSING_KEY)
    return keys


def _string_keys(column: Any) -> Int64Array:
    encoded = column.dictionary_encode()
    hashes = [xxhash.xxh3_64_intdigest(value.as_buffer()) for value in encoded.dictionary]
    keys = np.append(np.array(hashes, np.uint64).view(np.int64), MISSING_KEY)
    places = pc.fill_null(encoded.indices, len(hashes)).to_numpy(zero_copy_only=False)
    placed: Int64Array = keys[places]
    return placed


def _is_text(kind: Any) -> bool:
    return bool(
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
    )
