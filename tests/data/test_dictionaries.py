"""Dictionaries hold the values themselves, in the order of ids, of every kind there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.data.naive import criteo_line, frequency_ids, write_criteo

from bagpipe.config.data import PrepareConfig
from bagpipe.data import dictionaries, values
from bagpipe.data.dictionaries import Dictionary
from bagpipe.data.manifest import PreparedManifest
from bagpipe.data.prepare import prepare
from bagpipe.data.prepared import PreparedSource
from bagpipe.errors import DataError

BIG = 2**63
COLUMNS: dict[str, Any] = {
    "text": ["b", "a", None, "b", "", "ü", "a", "a"],
    "integer": pa.array([3, -1, None, 3, -BIG, 5, 3, 3]),
    "unsigned": pa.array([BIG, BIG + 1, None, 7, 7, 7, 0, 0], pa.uint64()),
    "boolean": [True, False, True, None, True, True, True, True],
    "binary": pa.array([b"\xff", b"a", b"a", None, b"\xff\xfe", b"a", b"a", b"a"], pa.binary()),
    "category": pa.array(["x", "y", "y", "x", None, "z", "y", "y"]).dictionary_encode(),
    "list": pa.array([["p", None], [], None, ["q", "p"], ["p"], ["p"], ["r"], ["q", "q"]]),
    "split": ["c|d", "", None, "d", "d", "e|d|c", "c", "d"],
    "nothing": pa.nulls(8),
}


def config(tmp_path: Path, columns: dict[str, Any], **extra: Any) -> PrepareConfig:
    """All rows are for training but those that `extra` holds out; each column is a feature."""
    table = pa.table({"y": [0, 1] * (len(next(iter(columns.values()))) // 2), **columns})
    pq.write_table(table, tmp_path / "raw.parquet", row_group_size=3)
    sparse = extra.pop("sparse", None) or [
        {"column": name, **({"separator": "|"} if name == "split" else {})} for name in columns
    ]
    source = {
        "kind": "parquet",
        "files": [str(tmp_path / "raw.parquet")],
        "label": {"column": "y"},
        "sparse": sparse,
    }
    return PrepareConfig.model_validate(
        {
            "output": tmp_path / "out",
            "source": source,
            "vocabulary": {"kind": "dictionary"},
            "split": {"validation_share": 0.0},
            **extra,
        }
    )


def listed(column: Any, name: str) -> list[list[Any]]:
    """The values of each row of a column, as they are to be found again."""
    rows = pa.array(column).to_pylist()
    if name == "list":
        return [[value for value in row or [] if value] for row in rows]
    if name == "split":
        return [[value for value in (row or "").split("|") if value] for row in rows]
    return [[value] for value in rows]


def decoded(folder: Path) -> dict[str, list[list[Any]]]:
    """What each row of training had for each feature, by its ids; "?" for id 0."""
    source = PreparedSource(folder, "train")
    (batch,) = source.batches(batch_size=1000)
    found = {}
    offsets = batch.sparse.offsets
    if offsets is None:
        offsets = np.arange(len(source.features) * batch.batch_size + 1)
    for place, feature in enumerate(source.features):
        names = ["?", *Dictionary.open(folder, feature.table).require_values().to_pylist()]
        bags = range(place * batch.batch_size, (place + 1) * batch.batch_size)
        found[feature.name] = [
            [names[id] for id in batch.sparse.values[offsets[bag] : offsets[bag + 1]]]
            for bag in bags
        ]
    return found


def check_file(folder: Path, table: str) -> None:
    """The file's other columns: ids in order, keys each once, counts that fall."""
    manifest = PreparedManifest.load(folder)
    found = pa.ipc.open_file(folder / manifest.dictionaries[table].name).read_all()
    assert found.column_names == ["id", "value", "key", "count"]
    assert found.column("id").to_pylist() == list(range(1, len(found) + 1))
    counts = found.column("count").to_pylist()
    assert counts == sorted(counts, reverse=True)
    assert len(set(found.column("key").to_pylist())) == len(found)


@pytest.mark.parametrize(("run_ids", "buffer_bytes"), [(1 << 18, 1 << 20), (2, 1)])
def test_ids_are_turned_back_into_values_of_every_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_ids: int, buffer_bytes: int
) -> None:
    for module in (values, dictionaries):
        monkeypatch.setattr(module, "RUN_IDS", run_ids)
    monkeypatch.setattr(values, "BUFFER_BYTES", buffer_bytes)
    manifest = prepare(config(tmp_path, COLUMNS))
    folder = tmp_path / "out"
    expected = {name: listed(column, name) for name, column in COLUMNS.items()}
    assert decoded(folder) == expected | {"binary": [[value] for [value] in expected["binary"]]}
    for table in COLUMNS:
        check_file(folder, table)
    types = {name: str(Dictionary.open(folder, name).values.type) for name in COLUMNS}
    assert types == {
        "text": "large_string",
        "integer": "int64",
        "unsigned": "uint64",
        "boolean": "int64",
        "binary": "large_binary",
        "category": "large_string",
        "list": "large_string",
        "split": "large_string",
        "nothing": "int64",
    }
    assert {feature.name: feature.kind for feature in manifest.features} == {
        **dict.fromkeys(("text", "binary", "category", "list", "split"), "text"),
        **dict.fromkeys(("integer", "boolean"), "integer"),
        "unsigned": "unsigned",
        "nothing": "nothing",
    }
    assert [path.name for path in folder.iterdir() if "tmp" in path.name] == []


def test_features_of_a_table_share_its_values_also_texts_and_integers(tmp_path: Path) -> None:
    columns = {"a": ["7", "x", "x", None], "b": pa.array([7, 7, 8, 7])}
    sparse = [{"column": "a", "table": "t"}, {"column": "b", "table": "t"}]
    prepare(config(tmp_path, columns, sparse=sparse))
    found = decoded(tmp_path / "out")
    assert found == {"a": [["7"], ["x"], ["x"], [None]], "b": [["7"], ["7"], ["8"], ["7"]]}
    table = Dictionary.open(tmp_path / "out", "t")
    assert sorted(table.values.to_pylist(), key=str) == ["7", "7", "8", None, "x"]
    assert len(table) == 5  # the text "7" is not the integer


def test_a_text_of_validation_alone_has_no_id_and_no_value(tmp_path: Path) -> None:
    columns = {"a": ["x", "y", "x", "rare", "x", "y", "only", "y"]}
    settings = config(
        tmp_path,
        columns,
        split={"validation_share": 0.25},
        vocabulary={"kind": "dictionary", "min_count": 2},
    )
    prepare(settings)
    assert Dictionary.open(tmp_path / "out", "a").values.to_pylist() == ["x", "y"]


def test_criteo_values_are_eight_hexadecimal_digits(tmp_path: Path) -> None:
    lines = [criteo_line(seed) for seed in range(40)]
    source = {"kind": "criteo", "files": [str(write_criteo(tmp_path / "raw.txt", lines))]}
    settings = {
        "output": tmp_path / "out",
        "source": source,
        "vocabulary": {"kind": "dictionary", "min_count": 2},
        "split": {"validation_share": 0.0},
    }
    prepare(PrepareConfig.model_validate(settings))
    for column in (0, 25):
        texts = [line.split("\t")[14 + column] for line in lines]
        ids = frequency_ids(texts, 2, order=lambda text: int(text, 16) if text else -1)
        expected = [text or None for text in ids]
        found = Dictionary.open(tmp_path / "out", f"C{column + 1}")
        assert found.require_values().to_pylist() == expected


def test_hashed_tables_have_no_dictionary(tmp_path: Path) -> None:
    sparse = [{"column": "a", "num_embeddings": 3}]
    prepare(config(tmp_path, {"a": ["x", "y"]}, sparse=sparse, vocabulary={"kind": "hash"}))
    with pytest.raises(DataError, match=r"no dictionary of table 'a'.*vocabulary.kind = 'hash'"):
        Dictionary.open(tmp_path / "out", "a")


def test_files_of_older_versions_are_read_and_say_that_they_have_no_values(tmp_path: Path) -> None:
    manifest = prepare(config(tmp_path, {"a": ["x", "y", "x", "x"]}))
    folder = tmp_path / "out"
    path = folder / manifest.dictionaries["a"].name
    older = pa.ipc.open_file(pa.py_buffer(path.read_bytes())).read_all().select(["key", "count"])
    with dictionaries.HashingFile(path) as file, pa.ipc.new_file(file, older.schema) as writer:
        writer.write_table(older)
    entry = manifest.dictionaries["a"].model_copy(
        update={"num_bytes": file.num_bytes, "checksum": file.checksum}
    )
    manifest.model_copy(update={"dictionaries": {"a": entry}}).save(folder)
    assert PreparedSource(folder, "train").num_samples == 4
    found = Dictionary.open(folder, "a")
    assert found.counts.tolist() == [3, 1]
    with pytest.raises(DataError, match="older version wrote it: prepare the data again"):
        found.require_values()


def test_a_damaged_dictionary_is_refused(tmp_path: Path) -> None:
    manifest = prepare(config(tmp_path, {"a": ["x", "y"]}))
    path = tmp_path / "out" / manifest.dictionaries["a"].name
    content = path.read_bytes()
    path.write_bytes(content[:-9] + b"X" + content[-8:])
    with pytest.raises(DataError, match=r"dictionary-00000\.arrow has checksum"):
        Dictionary.open(tmp_path / "out", "a")
    path.write_bytes(content[:-9])
    with pytest.raises(DataError, match="truncated or altered"):
        Dictionary.open(tmp_path / "out", "a", verify=False)
