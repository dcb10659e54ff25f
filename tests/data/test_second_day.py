"""`prepare.vocabulary_from`: tomorrow's file gets the ids of today, and new values ids behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bagpipe.config.data import PrepareConfig
from bagpipe.data.dictionaries import Dictionary
from bagpipe.data.manifest import PreparedManifest
from bagpipe.data.prepare import prepare
from bagpipe.data.prepared import PreparedSource
from bagpipe.errors import DataError

DAY1 = {"user": ["ann", "bob", "ann", "ann", None, "bob", "ann", "eve"], "item": [5, 5, 7, 7] * 2}
DAY2 = {"user": ["zoe", "bob", "kim", "zoe", "kim", "zoe", "rare", None], "item": [9, 9, 5, 7] * 2}
DICTIONARY = {"kind": "dictionary", "min_count": 2}


def config(folder: Path, days: dict[str, dict[str, Any]], **extra: Any) -> PrepareConfig:
    """Prepares the files of some days, in their order, into `folder`."""
    files = []
    for name, columns in days.items():
        num_rows = len(next(iter(columns.values())))
        table = pa.table({"y": [0.0, 1.0] * (num_rows // 2), **columns})
        files.append(folder.parent / f"{name}.parquet")
        pq.write_table(table, files[-1])
    columns = list(next(iter(days.values())))
    source = {
        "kind": "parquet",
        "files": [str(file) for file in files],
        "label": {"column": "y"},
        "sparse": extra.pop("sparse", None) or [{"column": name} for name in columns],
    }
    settings = {
        "output": folder,
        "source": source,
        "vocabulary": DICTIONARY,
        "split": {"validation_share": 0.0},
    }
    return PrepareConfig.model_validate(settings | extra)


def ids(folder: Path, table: str) -> dict[Any, int]:
    """The id of each value of a table."""
    values = Dictionary.open(folder, table).require_values().to_pylist()
    assert len(set(values)) == len(values)
    return {value: place + 1 for place, value in enumerate(values)}


def read(folder: Path) -> list[list[int]]:
    (batch,) = PreparedSource(folder, "train").batches(batch_size=100)
    found: list[list[int]] = batch.sparse.values.reshape(len(batch.sparse.keys), -1).tolist()
    return found


@pytest.fixture
def day1(tmp_path: Path) -> Path:
    prepare(config(tmp_path / "day1", {"one": DAY1}))
    return tmp_path / "day1"


def test_known_values_keep_their_ids_and_new_ones_get_ids_behind(
    tmp_path: Path, day1: Path
) -> None:
    assert ids(day1, "user") == {"ann": 1, "bob": 2}
    assert ids(day1, "item") == {5: 1, 7: 2}
    manifest = prepare(config(tmp_path / "day2", {"two": DAY2}, vocabulary_from=day1))
    day2 = tmp_path / "day2"
    assert ids(day2, "user") == {"ann": 1, "bob": 2, "zoe": 3, "kim": 4}
    assert ids(day2, "item") == {5: 1, 7: 2, 9: 3}
    # unknown and rare values have id 0, as in training on the first day
    assert read(day2) == [[3, 2, 4, 3, 4, 3, 0, 0], [3, 3, 1, 2] * 2]
    assert Dictionary.open(day2, "user").counts.tolist() == [4, 3, 3, 2]
    assert manifest.vocabulary_from is not None
    assert manifest.vocabulary_from.folder == str(day1)
    assert manifest.vocabulary_from.num_known == {"user": 3, "item": 3}


def test_the_days_after_go_on_and_the_order_of_files_changes_nothing(
    tmp_path: Path, day1: Path
) -> None:
    day3 = {"user": ["new", "zoe"] * 4, "item": [1, 2] * 4}
    for name, days in (
        ("forth", {"two": DAY2, "three": day3}),
        ("back", {"three": day3, "two": DAY2}),
    ):
        prepare(config(tmp_path / name, days, vocabulary_from=day1))
    assert ids(tmp_path / "forth", "user") == ids(tmp_path / "back", "user")
    assert ids(tmp_path / "forth", "item") == ids(tmp_path / "back", "item")
    prepare(config(tmp_path / "day2", {"two": DAY2}, vocabulary_from=day1))
    prepare(config(tmp_path / "day3", {"three": day3}, vocabulary_from=tmp_path / "day2"))
    assert ids(tmp_path / "day3", "user") == ids(tmp_path / "day2", "user") | {"new": 5}
    # the first day again, with all that is known by now
    prepare(config(tmp_path / "again", {"one": DAY1}, vocabulary_from=tmp_path / "day3"))
    assert read(tmp_path / "again") == read(day1)


def test_a_run_names_the_data_that_it_was_trained_with(tmp_path: Path, day1: Path) -> None:
    run = tmp_path / "run"
    data = {"kind": "prepared", "folder": str(day1)}
    content = PreparedManifest.load(day1).content

    def save(step: int, data: dict[str, str]) -> None:
        folder = run / "checkpoints" / f"step-{step:010d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps({"config": {"data": data}}))

    save(1, {"kind": "synthetic"})
    with pytest.raises(DataError, match="trains with synthetic data, which have no vocabulary"):
        prepare(config(tmp_path / "out", {"two": DAY2}, vocabulary_from=run))
    save(2, data | {"content": content})
    prepare(config(tmp_path / "out", {"two": DAY2}, vocabulary_from=run))
    assert ids(tmp_path / "out", "user") == {"ann": 1, "bob": 2, "zoe": 3, "kim": 4}
    save(3, data | {"content": "other"})
    with pytest.raises(DataError, match="has other data than that run was trained with"):
        prepare(config(tmp_path / "more", {"two": DAY2}, vocabulary_from=run))


def test_what_would_change_ids_is_refused_with_both_sides(tmp_path: Path, day1: Path) -> None:
    texts = {"user": DAY2["user"], "item": [str(item) for item in DAY2["item"]]}
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        (texts, {}, "'item' has values of kind integer there and text here"),
        (DAY2, {"vocabulary": {"kind": "dictionary"}}, "min_count is 2 there and 1 here"),
        ({"user": DAY2["user"]}, {}, "feature 'item' is there, and not here"),
        (
            DAY2 | {"product": DAY2["item"]},
            {"sparse": [{"column": "user"}, {"column": "product", "name": "item"}]},
            "'item' is read from column 'item' there and 'product' here",
        ),
        (
            DAY2,
            {"sparse": [{"column": "user", "table": "item"}, {"column": "item"}]},
            "'user' has the table 'user' there and 'item' here",
        ),
        (
            DAY2,
            {"sparse": [{"column": "user", "separator": "|"}, {"column": "item"}]},
            "'user' has the separator None there and '|' here",
        ),
        (
            DAY2,
            {"sparse": [{"column": "user", "num_embeddings": 2}, {"column": "item"}]},
            "table 'user' has 3 ids there and num_embeddings = 2 here: give at least 3",
        ),
        (
            DAY2,
            {
                "vocabulary": {"kind": "hash"},
                "sparse": [{"column": name, "num_embeddings": 9} for name in DAY2],
            },
            "vocabulary.kind is 'dictionary' there and 'hash' here",
        ),
        (DAY2, {"output": day1, "overwrite": True}, "is the output too, and would be gone"),
        (DAY2, {"vocabulary_from": tmp_path}, "holds neither prepared data nor a run's"),
    ]
    for columns, extra, message in cases:
        settings = {"vocabulary_from": day1, **extra}
        with pytest.raises(DataError) as told:
            prepare(config(tmp_path / "day2", {"two": columns}, **settings))
        assert message in str(told.value)
        assert str(settings["vocabulary_from"]) in str(told.value)
    assert not (tmp_path / "day2").exists()
    assert ids(day1, "item") == {5: 1, 7: 2}


def test_more_features_tables_and_room_are_no_difference(tmp_path: Path) -> None:
    small = [{"column": "user", "num_embeddings": 3}, {"column": "item"}]
    prepare(config(tmp_path / "day1", {"one": DAY1}, sparse=small))
    columns = DAY2 | {"friend": ["bob", "new"] * 4, "shop": ["s"] * 8}
    sparse = [
        {"column": "user", "num_embeddings": 4},
        {"column": "friend", "table": "user", "num_embeddings": 4},
        {"column": "item"},
        {"column": "shop"},
    ]
    prepare(
        config(
            tmp_path / "day2", {"two": columns}, sparse=sparse, vocabulary_from=tmp_path / "day1"
        )
    )
    assert ids(tmp_path / "day2", "user") == {"ann": 1, "bob": 2, "new": 3}  # the most frequent
    assert ids(tmp_path / "day2", "shop") == {"s": 1}


def test_hashed_tables_must_have_as_many_rows(tmp_path: Path) -> None:
    def of(name: str, num_embeddings: int, **extra: Any) -> PrepareConfig:
        sparse = [{"column": each, "num_embeddings": num_embeddings} for each in DAY1]
        hashed = {"kind": "hash"}
        return config(tmp_path / name, {name: DAY1}, sparse=sparse, vocabulary=hashed, **extra)

    prepare(of("one", 9))
    prepare(of("two", 9, vocabulary_from=tmp_path / "one"))
    with pytest.raises(DataError, match="table 'user' hashes to 9 rows there and to 10 here"):
        prepare(of("three", 10, vocabulary_from=tmp_path / "one"))


def test_a_column_without_values_today_is_of_its_kind_tomorrow(tmp_path: Path, day1: Path) -> None:
    empty = {"user": pa.nulls(8), "item": DAY2["item"]}
    prepare(config(tmp_path / "day2", {"two": empty}, vocabulary_from=day1))
    day2 = tmp_path / "day2"
    assert ids(day2, "user") == {"ann": 1, "bob": 2, None: 3}
    prepare(config(tmp_path / "day3", {"three": DAY2}, vocabulary_from=day2))
    assert ids(tmp_path / "day3", "user") == {"ann": 1, "bob": 2, None: 3, "zoe": 4, "kim": 5}


def test_data_of_an_older_version_are_to_be_prepared_again(tmp_path: Path, day1: Path) -> None:
    manifest = PreparedManifest.load(day1)
    older = [feature.model_copy(update={"kind": None}) for feature in manifest.features]
    manifest.model_copy(update={"features": tuple(older)}).save(day1)
    with pytest.raises(DataError, match=r"of an older version.*prepare that data again"):
        prepare(config(tmp_path / "day2", {"two": DAY2}, vocabulary_from=day1))
