"""Columns that are read together mean what they mean one by one."""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from bagpipe.data.arrow_keys import single_keys
from bagpipe.data.vocabulary import HashVocabulary
from bagpipe.errors import DataError
from bagpipe.serving.inputs import Columns, FeatureColumn, Inputs
from bagpipe.serving.requests import arrow_values, as_record_batch
from bagpipe.serving.together import Apart, ArrowRows, DictRows
from bagpipe.serving.vocabularies import GivenIds, IdVocabulary, KnownValues

KINDS: dict[str, Any] = {
    "a": "integer",
    "b": "integer",
    "big": "unsigned",
    "city": "text",
    "town": "text",
    "hex": "hexadecimal",
    "digits": "hexadecimal",
    "none": "nothing",
    "tags": "text",
    "split": "text",
}
ROWS: list[dict[str, Any]] = [
    {
        **{"x": 1.5, "y": 2, "z": None},
        **{"a": 3, "b": None, "big": 2**63 + 5, "city": "Rome", "town": "", "hex": "ff"},
        **{"digits": "0", "none": None, "tags": ["War", "Noir"], "split": "a|b"},
    },
    {
        **{"x": -1.0, "y": None, "z": 1e30},
        **{"a": 7, "b": 2, "big": 1, "city": None, "town": "Rome", "hex": None},
        **{"digits": "ABCDEF12", "none": None, "tags": [], "split": None},
    },
    {
        **{"x": 0.0, "y": 2**40, "z": None},
        **{"a": -(2**63), "b": 5, "big": None, "city": "Bonn", "town": None, "hex": ""},
        **{"digits": "ff", "none": None, "tags": ["Opera", None, ""], "split": "b||c"},
    },
]


def known(*values: Any) -> KnownValues:
    return KnownValues(single_keys(arrow_values(values), "values").values)


INPUTS = Inputs(
    Columns(
        features=tuple(
            FeatureColumn(
                feature=f"of {name}",
                table=name,
                column=name,
                kind=kind,
                separator="|" if name == "split" else None,
                multi_hot=name in ("tags", "split"),
            )
            for name, kind in KINDS.items()
        ),
        dense=("x", "y", "z"),
        transform="log",
    ),
    {
        "a": known(7, 3, None, 9),
        "b": known(),
        "big": known(1, 2**63 + 5),
        "city": known("Bonn", "Rome"),
        "town": HashVocabulary(1000),
        "hex": HashVocabulary(90),
        "digits": known(0x12, 0xABCDEF12),
        "none": HashVocabulary(50),
        "tags": HashVocabulary(70),
        "split": known("a", "c"),
    },
)


def slow(rows: Any) -> list[Any]:
    encoded = INPUTS.encode_arrow(as_record_batch(rows, INPUTS.columns.names), "the rows")
    return flat(encoded)


def fast(rows: Any) -> list[Any]:
    of = DictRows(rows) if isinstance(rows, list) else ArrowRows(rows)
    return flat(INPUTS.encode_together(of, "the rows"))


def flat(encoded: Any) -> list[Any]:
    bags = [part.tolist() for bag in encoded.bags for part in bag]
    return [encoded.dense.tobytes(), encoded.single.tolist(), *bags]


@pytest.mark.parametrize("numbers", [[0, 1, 2], [0], [1], [2], [2, 0]])
def test_rows_are_encoded_as_column_by_column(numbers: list[int]) -> None:
    rows = [ROWS[number] for number in numbers]
    expected = slow(rows)
    batch = as_record_batch(rows, INPUTS.columns.names)
    assert fast(batch) == expected
    assert fast(batch.append_column("more", pa.array([1.5] * len(rows)))) == expected
    twice = pa.concat_batches([batch, batch])
    assert fast(twice.slice(len(rows))) == expected
    shorter = [row | {"x": None, "y": None, "big": row["b"]} for row in rows]
    assert fast(shorter) == slow(shorter)


@pytest.mark.parametrize(
    "columns",
    [
        {"a": pa.array([3, 7, 9], pa.int8()), "b": pa.array([1, 2, 3], pa.uint64())},
        {"a": pa.array([True, None, False]), "x": pa.array([True, None, False])},
        {"city": pa.array(["Rome", "Bonn", None]).dictionary_encode()},
        {"city": pa.array([b"Rome", b"Bonn", None]), "town": pa.array(["Rome"] * 3).view("binary")},
        {"town": pa.array(["Rome", "Bonn", "x"], pa.large_string())},
        {"town": pa.array(["Rome", "Bonn", "x"], pa.string_view())},
        {"x": pa.array([1, 2, 3], pa.float16()), "z": pa.array([Decimal("1.5")] * 3)},
        {"tags": pa.array([["War"], None, []]).cast(pa.large_list(pa.string()))},
    ],
)
def test_arrow_types_that_mean_the_same_may_mix(columns: dict[str, Any]) -> None:
    batch = as_record_batch(ROWS, INPUTS.columns.names)
    for name, values in columns.items():
        batch = batch.set_column(batch.schema.names.index(name), name, values)
    assert fast(batch) == slow(batch)


@pytest.mark.parametrize(
    "change",
    [
        {"a": True},
        {"a": 7.0},
        {"a": "7"},
        {"a": ["7"]},
        {"a": date(2026, 1, 1)},
        {"city": 3},
        {"hex": "xyz"},
        {"hex": "123456789"},
        {"x": float("nan")},
        {"x": 1e39},
        {"x": "1"},
        {"x": Decimal("1.5")},
        {"x": ...},
    ],
)
def test_what_is_rare_or_wrong_is_left_to_be_read_one_by_one(change: dict[str, Any]) -> None:
    changed = {name: value for name, value in (ROWS[1] | change).items() if value is not ...}
    with pytest.raises(Apart):
        fast([ROWS[0], changed])


def test_a_feature_s_lists_are_told_what_is_wrong_with_them() -> None:
    with pytest.raises(DataError, match=r"column 'tags'.*has one value a row"):
        fast([ROWS[1] | {"tags": "War"}])
    with pytest.raises(Apart):
        fast(pa.RecordBatch.from_arrays([pa.array([1])] * 2, names=["x", "x"]))


def test_ids_that_a_table_has_not_are_told_with_it() -> None:
    features = tuple(
        FeatureColumn(feature=name, table=name, column=name, kind="integer") for name in "abc"
    )
    inputs = Inputs(
        Columns(features=features, dense=(), transform="none"),
        {
            "a": IdVocabulary("a", 5),
            "b": GivenIds("b", np.array([8, 9]), np.array([0, 1], np.int32), 2),
            "c": IdVocabulary("c", 3),
        },
    )
    encoded = inputs.encode_together(DictRows([{"a": 4, "b": 9, "c": 0}]), "the rows")
    assert encoded.single.tolist() == [[4], [1], [0]]
    for row, fact in (
        ({"a": 4, "b": 9, "c": 3}, "table 'c': an id is 3, must be from 0 to 2"),
        ({"a": None, "b": 9, "c": 0}, "table 'a': an id is missing"),
        ({"a": 4, "b": None, "c": 0}, "table 'b': of 1 values 1 are missing or not in the voc"),
    ):
        with pytest.raises(DataError, match=fact):
            inputs.encode_together(DictRows([row]), "the rows")
