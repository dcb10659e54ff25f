"""Parquet columns of every type that can be mapped, bad rows, and types that can't."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from bagpipe.config.data import ParquetFiles
from bagpipe.data import parquet
from bagpipe.data.parquet import ParquetSource
from bagpipe.data.raw import MISSING_KEY, Problems, RawBlock
from bagpipe.errors import DataError


def make(
    tmp_path: Path,
    columns: dict[str, Any],
    sparse: list[dict[str, Any]],
    *,
    name: str = "a.parquet",
    **extra: Any,
) -> ParquetSource:
    path = tmp_path / name
    pq.write_table(pa.table(columns), path)
    config = {
        "kind": "parquet",
        "files": [str(path)],
        "label": {"column": "label"},
        "sparse": sparse,
        **extra,
    }
    return ParquetSource([path], ParquetFiles.model_validate(config))


def read(source: ParquetSource, problems: Problems | None = None) -> RawBlock:
    (block,) = source.blocks(problems or Problems(), lambda _: None, "test")
    return block


def key(text: str) -> int:
    return int(np.uint64(xxhash.xxh3_64_intdigest(text.encode())).astype(np.int64))


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([3, None, -1], pa.int32()), [3, MISSING_KEY, -1]),
        (pa.array([2**64 - 1, 0, 5], pa.uint64()), [-1, 0, 5]),
        (pa.array([True, None, False]), [1, MISSING_KEY, 0]),
        (pa.array(["a", None, ""]), [key("a"), MISSING_KEY, key("")]),
        (pa.array(["a", "b", "a"], pa.large_string()), [key("a"), key("b"), key("a")]),
        (pa.array(["a", None, "a"]).dictionary_encode(), [key("a"), MISSING_KEY, key("a")]),
        (pa.array([None, None, None]), [MISSING_KEY] * 3),
    ],
)
def test_keys_of_single_values(tmp_path: Path, column: Any, expected: list[int]) -> None:
    source = make(
        tmp_path, {"label": [0, 1, 0], "c": column}, [{"column": "c", "num_embeddings": 5}]
    )
    assert not source.features[0].multi_hot
    keys = read(source).keys[0]
    assert keys.offsets is None
    assert keys.values.tolist() == expected


@pytest.mark.parametrize(
    ("column", "separator", "expected"),
    [
        (
            pa.array([[1, 2], None, [], [None, 3]], pa.list_(pa.int64())),
            None,
            [[1, 2], [], [], [3]],
        ),
        (pa.array([[1], [2], [3], [4]], pa.large_list(pa.int8())), None, [[1], [2], [3], [4]]),
        (pa.array([[1, 2]] * 4, pa.list_(pa.int32(), 2)), None, [[1, 2]] * 4),
        (pa.array([["a", ""], ["b"], [], ["a"]]), None, [[key("a")], [key("b")], [], [key("a")]]),
        (
            pa.array(["a|b", None, "", "b||a"]),
            "|",
            [[key("a"), key("b")], [], [], [key("b"), key("a")]],
        ),
    ],
)
def test_keys_of_several_values(
    tmp_path: Path, column: Any, separator: str | None, expected: list[list[int]]
) -> None:
    sparse = [{"column": "c", "num_embeddings": 5, "separator": separator}]
    source = make(tmp_path, {"label": [0, 1, 0, 1], "c": column}, sparse)
    assert source.features[0].multi_hot
    keys = read(source).keys[0]
    assert keys.offsets is not None
    bags = [
        keys.values[a:b].tolist() for a, b in zip(keys.offsets[:-1], keys.offsets[1:], strict=True)
    ]
    assert bags == expected
    taken = keys.take(np.array([3, 0]))
    assert taken.offsets is not None
    assert taken.values.tolist() == expected[3] + expected[0]
    assert taken.offsets.tolist() == [0, len(expected[3]), len(expected[3]) + len(expected[0])]


SPARSE = [{"column": "c", "num_embeddings": 5}]


def test_label_threshold_and_dense_columns(tmp_path: Path) -> None:
    columns = {"label": [3, 4, 5], "c": [1, 2, 3], "x": [1, None, 3], "y": [0.5, 1.5, None]}
    extra = {"label": {"column": "label", "at_least": 4}, "dense": ["y", "x"]}
    block = read(make(tmp_path, columns, SPARSE, **extra))
    assert block.labels.tolist() == [0, 1, 1]
    assert block.dense.tolist() == [[0.5, 1], [1.5, 0], [0, 3]]


@pytest.mark.parametrize(
    ("columns", "facts"),
    [
        ({"label": [0, 1, 2.5]}, ["row 2 (from 0)", "'label' is 2.5", "[0, 1]", "at_least"]),
        ({"label": [0, 1, -1]}, ["row 2", "is -1"]),
        ({"label": [0, 1, float("nan")]}, ["row 2", "is nan", "finite"]),
        ({"label": [0, 1, None]}, ["row 2", "is missing"]),
        ({"label": [0, 1, 1], "x": [0.0, 1.0, float("inf")]}, ["row 2", "'x' is inf", "finite"]),
        ({"label": [0, 1, 1], "x": [0.0, 1.0, 1e300]}, ["row 2", "'x' is 1e+300"]),
        (
            {"label": [0, 1, 1], "t": [0.0, 1.0, float("nan")]},
            ["row 2", "'t'", "missing or not finite"],
        ),
    ],
)
def test_a_bad_row_is_named_or_skipped_and_counted(
    tmp_path: Path, columns: dict[str, Any], facts: list[str]
) -> None:
    columns = {"c": [1, 2, 3], "x": [0.0, 1.0, 2.0], "t": [1.0, 2.0, 3.0], **columns}
    source = make(tmp_path, columns, SPARSE, dense=["x"], time="t")
    with pytest.raises(DataError) as raised:
        read(source)
    for fact in ["a.parquet", *facts]:
        assert fact in str(raised.value)
    problems = Problems(on_error="skip")
    block = read(source, problems)
    assert block.rows.tolist() == [0, 1]
    assert block.keys[0].values.tolist() == [1, 2]
    assert [rows.count for rows in problems.skipped.values()] == [1]


def test_rows_are_named_within_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "BLOCK_ROWS", 2)
    make(tmp_path, {"label": [0, 1, 0], "c": [1, 2, 3]}, SPARSE)
    path = tmp_path / "b.parquet"
    pq.write_table(pa.table({"label": [0, 1, 0, 7], "c": [1, 2, 3, 4]}), path)
    config = ParquetFiles.model_validate(
        {
            "kind": "parquet",
            "files": ["x"],
            "label": {"column": "label"},
            "sparse": [{"column": "c"}],
        }
    )
    source = ParquetSource([tmp_path / "a.parquet", path], config)
    blocks = list(source.blocks(problems := Problems(on_error="skip"), lambda _: None, "test"))
    assert np.concatenate([block.rows for block in blocks]).tolist() == [0, 1, 2, 3, 4, 5]
    (skipped,) = problems.skipped.values()
    assert f"{path}, row 3 (from 0)" in skipped.first


def test_missing_column_names_those_that_exist(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.parquet has no column 'label'; its columns are c, d"):
        make(tmp_path, {"c": [1], "d": [2]}, SPARSE)


def test_types_that_can_not_be_used(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="column 'c' is of type double"):
        read(make(tmp_path, {"label": [0], "c": [1.5]}, SPARSE))
    with pytest.raises(DataError, match="column 'label' is of type string, must be a number"):
        read(make(tmp_path, {"label": ["0"], "c": [1]}, SPARSE))
    with pytest.raises(DataError, match="must be a string to be split by ' '"):
        read(make(tmp_path, {"label": [0], "c": [1]}, [{**SPARSE[0], "separator": " "}]))
    with pytest.raises(DataError, match="a time must be"):
        read(make(tmp_path, {"label": [0], "c": ["x"]}, SPARSE, time="c"))


def test_not_parquet_no_rows_and_other_types(tmp_path: Path) -> None:
    config = ParquetFiles.model_validate(
        {
            "kind": "parquet",
            "files": ["x"],
            "label": {"column": "label"},
            "sparse": [{"column": "c"}],
        }
    )
    bad = tmp_path / "bad.parquet"
    bad.write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r"bad\.parquet can't be read as Parquet"):
        ParquetSource([bad], config)
    with pytest.raises(DataError, match="no rows"):
        make(tmp_path, {"label": pa.array([], pa.int32()), "c": pa.array([], pa.int32())}, SPARSE)
    for name, kind in (("a", pa.int32()), ("b", pa.string())):
        pq.write_table(
            pa.table({"label": [0], "c": pa.array([1]).cast(kind)}), tmp_path / f"{name}.parquet"
        )
    with pytest.raises(DataError, match=r"b\.parquet: column 'c' is of type string, but int32"):
        ParquetSource([tmp_path / "a.parquet", tmp_path / "b.parquet"], config)


DAYS = [
    (pa.array(["a", None]).dictionary_encode(), [key("a"), MISSING_KEY]),
    (pa.DictionaryArray.from_arrays(pa.array([1, 0], pa.int8()), ["b", "a"]), [key("a"), key("b")]),
    (pa.DictionaryArray.from_arrays(pa.array([0, 0], pa.int16()), ["b"]), [key("b"), key("b")]),
    (pa.array(["b", "a"], pa.large_string()), [key("b"), key("a")]),
    (pa.nulls(2), [MISSING_KEY, MISSING_KEY]),
    (pa.array(["b", "a"], pa.string_view()), [key("b"), key("a")]),
    (pa.array([b"b", b"a"]), [key("b"), key("a")]),
]


@pytest.mark.parametrize("first", range(len(DAYS)))
def test_days_may_encode_a_column_differently(tmp_path: Path, first: int) -> None:
    days = DAYS[first:] + DAYS[:first]
    labels = [pa.array([0, 1]).cast(kind) for kind in (pa.int8(), pa.float64(), pa.bool_())]
    for number, (column, _) in enumerate(days):
        make(
            tmp_path,
            {"label": labels[number % 3], "x": labels[number % 2], "c": column},
            SPARSE,
            name=f"{number}.parquet",
        )
    files = [tmp_path / f"{number}.parquet" for number in range(len(days))]
    config = {"kind": "parquet", "files": ["x"], "label": {"column": "label"}, "dense": ["x"]}
    source = ParquetSource(files, ParquetFiles.model_validate({**config, "sparse": SPARSE}))
    blocks = list(source.blocks(Problems(), lambda _: None, "test"))
    assert [block.keys[0].values.tolist() for block in blocks] == [keys for _, keys in days]
    assert all(block.labels.tolist() == block.dense[:, 0].tolist() == [0, 1] for block in blocks)


@pytest.mark.parametrize("first", [0, 1, 2])
def test_days_of_lists_and_one_without_a_value(tmp_path: Path, first: int) -> None:
    lists = [
        pa.array([["a"], None]),
        pa.nulls(2),
        pa.array([["b", "a"], []], pa.large_list(pa.string())),
    ]
    lists = lists[first:] + lists[:first]
    for number, column in enumerate(lists):
        make(tmp_path, {"label": [0, 1], "c": column}, SPARSE, name=f"{number}.parquet")
    files = [tmp_path / f"{number}.parquet" for number in range(3)]
    config = {"kind": "parquet", "files": ["x"], "label": {"column": "label"}, "sparse": SPARSE}
    source = ParquetSource(files, ParquetFiles.model_validate(config))
    assert source.features[0].multi_hot
    read = [block.keys[0] for block in source.blocks(Problems(), lambda _: None, "test")]
    for keys, column in zip(read, lists, strict=True):
        assert keys.offsets is not None
        values = [value for bag in column.to_pylist() for value in bag or ()]
        assert keys.values.tolist() == [key(value) for value in values]
        lengths = [len(bag or ()) for bag in column.to_pylist()]
        assert np.diff(keys.offsets).tolist() == lengths


@pytest.mark.parametrize(
    ("column", "other"),
    [
        (pa.array([1, 2]), pa.array(["1", "2"])),
        (pa.array([1, 2]), pa.array([[1], [2]])),
        (pa.array([["a"], ["b"]]), pa.array([[1], [2]])),
        (pa.array(["a", "b"]).dictionary_encode(), pa.array([1, 2])),
    ],
)
def test_days_whose_keys_would_differ_are_refused(tmp_path: Path, column: Any, other: Any) -> None:
    for name, values in (("a", column), ("b", other)):
        make(tmp_path, {"label": [0, 1], "c": values}, SPARSE, name=f"{name}.parquet")
    config = {"kind": "parquet", "files": ["x"], "label": {"column": "label"}, "sparse": SPARSE}
    files = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    with pytest.raises(DataError, match=r"b\.parquet: column 'c' is of type .*, but .* in .*a\.pa"):
        ParquetSource(files, ParquetFiles.model_validate(config))


def test_a_page_that_is_not_as_its_checksum_says(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    columns = {"label": [0, 1] * 500, "c": np.arange(1000) + 7_000_000}
    options = {"write_page_checksum": True, "compression": "none", "use_dictionary": False}
    pq.write_table(pa.table(columns), path, **options)
    config = {"kind": "parquet", "files": ["x"], "label": {"column": "label"}, "sparse": SPARSE}
    source = ParquetSource([path], ParquetFiles.model_validate(config))
    assert read(source).keys[0].values.tolist() == columns["c"].tolist()  # type: ignore[attr-defined]
    data = path.read_bytes()
    place = data.index(np.int64(7_000_500).tobytes())
    path.write_bytes(data[:place] + b"\1" + data[place + 1 :])
    with pytest.raises(DataError, match=r"a\.parquet can't be read to its end, it is damaged.*CRC"):
        read(source)


def test_a_file_that_holds_a_mapped_column_twice(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table([pa.array([0, 1])] * 4, names=["label", "c", "x", "x"])
    pq.write_table(table, path)
    config = {"kind": "parquet", "files": ["x"], "label": {"column": "label"}, "sparse": SPARSE}
    assert ParquetSource([path], ParquetFiles.model_validate(config)).num_rows() == 2
    for doubled in ({"dense": ["x"]}, {"sparse": [{"column": "x"}]}, {"label": {"column": "x"}}):
        with pytest.raises(DataError, match=r"a\.parquet has 2 columns named 'x'"):
            ParquetSource([path], ParquetFiles.model_validate({**config, **doubled}))


@pytest.mark.parametrize(
    "times",
    [
        pa.array([-2.5, -0.0, 0.0, 1e-300, 7.0]),
        pa.array([1, 2, 3, 4, 5], pa.uint32()),
        pa.array([datetime.date(2020, 1, day) for day in range(1, 6)]),
        pa.array([datetime.datetime(2020, 1, 1, hour) for hour in range(5)]),
    ],
)
def test_times_keep_their_order(tmp_path: Path, times: Any) -> None:
    source = make(tmp_path, {"label": [0] * 5, "c": [1] * 5, "t": times}, SPARSE, time="t")
    (keys,) = source.times()
    assert (np.diff(keys) >= 0).all()
    assert keys[0] < keys[1]
    assert keys[3] < keys[4]
    block = read(source)
    assert block.times is not None
    assert block.times.tolist() == keys.tolist()
