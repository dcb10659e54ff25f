"""Arrow columns to 64-bit keys: one key per row, or a list of them.

A value has one key, however Arrow encodes it. An integer of any width, or a boolean, is its own key
(`bagpipe.data.raw` names the two exceptions). A string or binary of any layout has the hash of its
bytes. Dictionaries, views and extension types are read as the values that they stand for.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from bagpipe.data.raw import MISSING_KEY, Keys, Texts, ValueKind
from bagpipe.errors import DataError
from bagpipe.types import Int64Array

KeyKind: TypeAlias = Literal["integer", "text", "nothing", "other"]
_LEAST: Final = -(2**63)


def is_list(kind: Any) -> bool:
    """Whether an Arrow type holds several values per row."""
    return bool(
        pa.types.is_list(kind)
        or pa.types.is_large_list(kind)
        or pa.types.is_list_view(kind)
        or pa.types.is_large_list_view(kind)
        or pa.types.is_fixed_size_list(kind)
    )


def key_kind(kind: Any) -> KeyKind:
    """What the values of an Arrow type, or of its lists, are as keys.

    Two types of one kind give a value the same key. A "nothing" type holds nulls only, and values
    of an "other" type can't be keys.
    """
    kind = _plain_type(kind)
    if pa.types.is_null(kind):
        return "nothing"
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return "integer"
    return "text" if _is_text(kind) else "other"


def value_kind(kinds: Iterable[Any]) -> ValueKind:
    """What the values of a column of these Arrow types are; the types are of one kind."""
    found: set[ValueKind] = set()
    for kind in kinds:
        plain = _plain_type(kind)
        if pa.types.is_uint64(plain):
            found.add("unsigned")
        elif pa.types.is_integer(plain) or pa.types.is_boolean(plain):
            found.add("integer")
        elif _is_text(plain):
            found.add("text")
    if len(found) > 1:
        found.discard("integer")
    return found.pop() if found else "nothing"


def _plain_type(kind: Any) -> Any:
    """The type of the values that a type stands for, or holds lists of."""
    if isinstance(kind, pa.BaseExtensionType):
        return _plain_type(kind.storage_type)
    if pa.types.is_dictionary(kind) or is_list(kind):
        return _plain_type(kind.value_type)
    return kind


def single_keys(column: Any, where: str) -> Keys:
    """The key of each row of an Arrow array of integers, strings, binaries or booleans.

    Args:
        column: The array (n,); null has the key MISSING_KEY.
        where: The file and column, for error messages.

    Raises:
        DataError: The array is of another type.
    """
    plain = _plain(column)
    return Keys(values=_keys(plain, where), offsets=None, texts=_texts(plain))


def list_keys(column: Any, where: str) -> Keys:
    """The keys of each row of a list array.

    A null or empty list is an empty bag. Null items and empty strings are left out.

    Args:
        column: The list array (n,).
        where: The file and column, for error messages.

    Raises:
        DataError: The items are of a type that can't be keys.
    """
    # Never by a cast to another type of list: pyarrow 26 loses rows of a sliced list_view in it.
    lengths = pc.fill_null(pc.list_value_length(column), 0)
    offsets = np.concatenate([[0], np.cumsum(lengths.to_numpy(zero_copy_only=False))]).astype(
        np.int64
    )
    items = _plain(pc.list_flatten(column))
    kept = items.is_valid()
    if _is_text(items.type):
        kept = pc.and_(kept, pc.fill_null(pc.not_equal(pc.binary_length(items), 0), False))
    if pc.all(kept, min_count=0).as_py():
        return Keys(values=_keys(items, where), offsets=offsets, texts=_texts(items))
    before = np.concatenate([[0], np.cumsum(kept.to_numpy(zero_copy_only=False))]).astype(np.int64)
    items = items.filter(kept)
    return Keys(values=_keys(items, where), offsets=before[offsets], texts=_texts(items))


def split_keys(column: Any, separator: str, where: str) -> Keys:
    """The keys of a string column whose values hold several each, e.g. ``"Drama|War"``.

    Args:
        column: The array of strings (n,).
        separator: What stands between the values.
        where: The file and column, for error messages.

    Raises:
        DataError: The column doesn't hold strings.
    """
    kind, column = column.type, _plain(column)
    if pa.types.is_null(column.type):
        column = column.cast(pa.string())
    if not _is_text(column.type):
        raise DataError(f"{where} is of type {kind}, must be a string to be split by {separator!r}")
    return list_keys(pc.split_pattern(column, separator), where)


def _plain(column: Any) -> Any:
    """The array's values without an encoding, and texts in a layout that has kernels."""
    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        return _plain(column.storage)
    if pa.types.is_dictionary(kind):
        return _plain(column.dictionary).take(column.indices)
    if pa.types.is_string_view(kind):
        return column.cast(pa.large_string())
    if pa.types.is_binary_view(kind) or pa.types.is_fixed_size_binary(kind):
        return column.cast(pa.large_binary())
    return column


def _texts(plain: Any) -> Texts | None:
    return Texts(items=plain) if _is_text(plain.type) else None


def _keys(column: Any, where: str) -> Int64Array:
    """The keys of a plain array (n,)."""
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
    taken = _LEAST if pa.types.is_signed_integer(kind) else -_LEAST
    values = np.where(values == MISSING_KEY, text_key(str(taken).encode()), values)
    keys: Int64Array = np.where(present, values, MISSING_KEY)
    return keys


def text_key(text: Any) -> np.int64:
    """The key of a string's bytes."""
    return np.uint64(xxhash.xxh3_64_intdigest(text)).astype(np.int64)


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
        or pa.types.is_string_view(kind)
        or pa.types.is_binary_view(kind)
        or pa.types.is_fixed_size_binary(kind)
    )
