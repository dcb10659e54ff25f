"""One value has one key.

Every Arrow type and encoding of the same values is tried, flat and in every kind of list, straight
and through a Parquet file.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from bagpipe.data.arrow_keys import is_list, list_keys, single_keys, split_keys
from bagpipe.data.raw import MISSING_KEY, Keys

TEXTS = ["a", "", None, "bc", None, "a", "€", "bc"]
BYTES = [None if text is None else text.encode() for text in TEXTS]
WORDS = [b"ab", None, b"cd", b"ab", None, b"\0\0", b"cd", b"ab"]
SMALL = [0, 1, None, 1, None, 0, 127, 5]
SIGNED = [0, 1, None, -1, None, 2**63 - 1, -(2**63), -(2**63) + 1]
UNSIGNED = [0, 1, None, 2**63 - 1, None, 2**63, 2**63 + 1, 2**64 - 1]
INDICES = [pa.int8(), pa.int16(), pa.int32(), pa.int64()]
INDICES += [pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()]


def key(value: str | bytes | int | None) -> int:
    """What a value's key is, by the words of `bagpipe.data.raw`."""
    if value is None:
        return MISSING_KEY
    if isinstance(value, int):
        if value in (2**63, -(2**63)):
            return key(str(value))
        return value - 2**64 if value >= 2**63 else int(value)
    data = value.encode() if isinstance(value, str) else value
    return int(np.uint64(xxhash.xxh3_64_intdigest(data)).astype(np.int64))


def encoded(values: list[Any], *kinds: Any) -> Iterator[tuple[Any, list[Any]]]:
    """`values` in each of the types, and in dictionaries of each with each type of index."""
    for kind in kinds:
        yield pa.array(values, kind), values
        distinct = list(dict.fromkeys(values))  # a dictionary may hold a null, too
        for index in INDICES:
            places = pa.array([distinct.index(value) for value in values], index)
            items = pa.array(distinct, kind)
            yield pa.DictionaryArray.from_arrays(places, items), values


def all_arrays() -> Iterator[tuple[Any, list[Any]]]:
    yield from encoded(TEXTS, pa.string(), pa.large_string(), pa.string_view())
    yield from encoded(BYTES, pa.binary(), pa.large_binary(), pa.binary_view())
    yield from encoded(WORDS, pa.binary(2))
    yield from encoded(SMALL, *INDICES)
    yield from encoded(SIGNED, pa.int64())
    yield from encoded(UNSIGNED, pa.uint64())
    yield from encoded([True, False, None, True, None, False, True, True], pa.bool_())
    yield pa.ExtensionArray.from_storage(pa.bool8(), pa.array(SMALL, pa.int8())), SMALL
    yield pa.nulls(8), [None] * 8


ARRAYS = [
    pytest.param(array, values, id=f"{number}-{array.type}")
    for number, (array, values) in enumerate(all_arrays())
]


def lists_of(items: Any) -> Iterator[Any]:
    """Rows [0, 1, 2], null, [], [3, 4], [5, 6, 7] of the items in each kind of list.

    In list views the items lie in another order. Lists of a fixed size hold pairs.
    """
    offsets, nulls = [0, 3, 3, 3, 5, 8], pa.array([False, True, False, False, False])
    yield pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), items, mask=nulls)
    yield pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), items, mask=nulls)
    turned = pa.concat_arrays([items.slice(5), items.slice(0, 5)])
    starts, sizes = [3, 0, 0, 6, 0], [3, 2, 0, 2, 3]
    yield pa.ListViewArray.from_arrays(
        pa.array(starts, pa.int32()), pa.array(sizes, pa.int32()), turned, mask=nulls
    )
    yield pa.LargeListViewArray.from_arrays(
        pa.array(starts, pa.int64()), pa.array(sizes, pa.int64()), turned, mask=nulls
    )


def pairs_of(items: Any) -> Any:
    """Rows [0, 1], null, [4, 5], [6, 7] of the items."""
    nulls = pa.array([False, True, False, False])
    return pa.FixedSizeListArray.from_arrays(items, 2, mask=nulls)


def bags(keys: Keys) -> list[list[int]]:
    assert keys.offsets is not None
    parts = zip(keys.offsets[:-1], keys.offsets[1:], strict=True)
    return [keys.values[begin:end].tolist() for begin, end in parts]


def expected_bags(values: list[Any], rows: list[list[int]]) -> list[list[int]]:
    return [[key(values[i]) for i in row if values[i] not in (None, "", b"")] for row in rows]


def through_parquet(array: Any) -> Keys | None:
    """The keys of a column that was written and read again; None: Parquet can't hold it."""
    table = pa.table({"y": pa.array([0] * len(array)), "c": array})
    file = io.BytesIO()
    try:
        pq.write_table(table, file)
    except pa.ArrowNotImplementedError:
        return None
    batch = next(pq.ParquetFile(file).iter_batches())
    column = batch.column("c")
    return list_keys(column, "c") if is_list(column.type) else single_keys(column, "c")


@pytest.mark.parametrize(("array", "values"), ARRAYS)
def test_one_value_has_one_key_whatever_its_encoding(array: Any, values: list[Any]) -> None:
    expected = [key(value) for value in values]
    assert single_keys(array, "c").values.tolist() == expected
    assert single_keys(array.slice(1, 6), "c").values.tolist() == expected[1:7]
    if (read := through_parquet(array)) is not None:
        assert read.values.tolist() == expected


@pytest.mark.parametrize(("array", "values"), ARRAYS)
def test_and_in_every_kind_of_list(array: Any, values: list[Any]) -> None:
    expected = expected_bags(values, [[0, 1, 2], [], [], [3, 4], [5, 6, 7]])
    for lists in lists_of(array):
        assert is_list(lists.type)
        assert bags(list_keys(lists, "c")) == expected
        assert bags(list_keys(lists.slice(1, 3), "c")) == expected[1:4]
        if (read := through_parquet(lists)) is not None:
            assert bags(read) == expected
    pairs, expected = pairs_of(array), expected_bags(values, [[0, 1], [], [4, 5], [6, 7]])
    assert bags(list_keys(pairs, "c")) == expected
    assert bags(list_keys(pairs.slice(1), "c")) == expected[1:]
    if (read := through_parquet(pairs)) is not None:
        assert bags(read) == expected


def test_values_that_must_be_split() -> None:
    values = ["a|b", None, "", "b||€"]
    for array, _ in encoded(values, pa.string(), pa.large_string(), pa.string_view(), pa.binary()):
        expected = [[key("a"), key("b")], [], [], [key("b"), key("€")]]
        assert bags(split_keys(array, "|", "c")) == expected
    assert bags(split_keys(pa.nulls(2), "|", "c")) == [[], []]


def test_distinct_integers_at_the_ends_have_distinct_keys_and_none_is_that_of_a_missing_one() -> (
    None
):
    signed = single_keys(pa.array([-(2**63), -(2**63) + 1, None]), "c").values
    unsigned = single_keys(pa.array([2**63, 2**63 + 1, None], pa.uint64()), "c").values
    assert len({*signed.tolist(), *unsigned[:1].tolist()}) == 4
    assert unsigned[0] != MISSING_KEY
    assert signed[2] == unsigned[2] == MISSING_KEY
