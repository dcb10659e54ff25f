"""Preparing end to end against a plain parse; skipping, interruption and repetition."""

from __future__ import annotations

import errno
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.data.naive import (
    criteo_key,
    criteo_line,
    frequency_ids,
    hash_id,
    log_dense,
    write_criteo,
)

from bagpipe.config.data import PrepareConfig
from bagpipe.data import prepare as prepare_module
from bagpipe.data.base import Split
from bagpipe.data.files import HashingFile
from bagpipe.data.manifest import MANIFEST_NAME, PreparedManifest
from bagpipe.data.prepare import COUNT_STAGE, WRITE_STAGE, prepare
from bagpipe.data.prepared import PreparedSource
from bagpipe.data.raw import Progress
from bagpipe.errors import DataError

LINES = [criteo_line(seed) for seed in range(100)]


def config(tmp_path: Path, lines: list[str] = LINES, **extra: Any) -> PrepareConfig:
    path = write_criteo(tmp_path / "raw.txt", lines)
    source = {"kind": "criteo", "files": [str(path)], "num_embeddings": 17}
    small = {"rows_per_batch": 7, "batches_per_file": 3}
    return PrepareConfig.model_validate(
        {"output": tmp_path / "out", "source": source, **small, **extra}
    )


def read(folder: Path, split: Split) -> dict[str, list[Any]]:
    (batch,) = PreparedSource(folder, split).batches(batch_size=10_000)
    ids = batch.sparse.values.reshape(len(batch.sparse.keys), -1)
    return {"labels": batch.labels.tolist(), "dense": batch.dense.tolist(), "ids": ids.tolist()}


def test_hash_by_time_equals_a_plain_parse(tmp_path: Path) -> None:
    manifest = prepare(config(tmp_path))
    assert (manifest.num_rows("train"), manifest.num_rows("validation")) == (90, 10)
    assert [entry.num_rows for entry in manifest.splits["train"]] == [21, 21, 21, 21, 6]
    assert manifest.num_embeddings == {f"C{i}": 17 for i in range(1, 27)}
    for split, lines in (("train", LINES[:90]), ("validation", LINES[90:])):
        rows = [line.split("\t") for line in lines]
        found = read(tmp_path / "out", split)
        assert found["labels"] == [float(row[0]) for row in rows]
        np.testing.assert_allclose(
            found["dense"], [[log_dense(x) for x in row[1:14]] for row in rows], rtol=1e-6
        )
        assert found["ids"] == [
            [hash_id(criteo_key(row[14 + f]), 17) for row in rows] for f in range(26)
        ]


def test_dictionary_by_share_is_built_on_training_rows_alone(tmp_path: Path) -> None:
    extra = {
        "vocabulary": {"kind": "dictionary", "min_count": 2},
        "split": {"by": "share", "validation_share": 0.3},
    }
    settings = config(tmp_path, dense_transform="none", **extra)
    sized = settings.source.model_copy(update={"num_embeddings": None})
    seen: list[Progress] = []
    manifest = prepare(settings.model_copy(update={"source": sized}), seen.append)
    assert [progress.stage for progress in seen] == [COUNT_STAGE, WRITE_STAGE]
    train, held_out = read(tmp_path / "out", "train"), read(tmp_path / "out", "validation")
    lines = {split: [] for split in ("train", "validation")}  # type: dict[str, list[list[str]]]
    remaining = {"train": list(train["dense"]), "validation": list(held_out["dense"])}
    for line in LINES:
        dense = [float(x or 0) for x in line.split("\t")[1:14]]
        split = "train" if remaining["train"] and remaining["train"][0] == dense else "validation"
        assert remaining[split].pop(0) == dense
        lines[split].append(line.split("\t"))
    assert 15 <= len(lines["validation"]) <= 45
    for f in range(26):
        ids = frequency_ids([criteo_key(row[14 + f]) for row in lines["train"]], 2)
        for split, found in (("train", train), ("validation", held_out)):
            assert found["ids"][f] == [ids.get(criteo_key(row[14 + f]), 0) for row in lines[split]]
        assert manifest.num_embeddings[f"C{f + 1}"] == len(ids) + 1
        assert manifest.dictionaries[f"C{f + 1}"].num_rows == len(ids)


def parquet_config(tmp_path: Path, columns: dict[str, Any], **source: Any) -> PrepareConfig:
    pq.write_table(pa.table(columns), tmp_path / "raw.parquet", row_group_size=11)
    base = {
        "kind": "parquet",
        "files": [str(tmp_path / "*.parquet")],
        "label": {"column": "y"},
        **source,
    }
    return PrepareConfig.model_validate(
        {"output": tmp_path / "out", "source": base, "rows_per_batch": 8}
    )


def test_multi_hot_shared_table_and_time_column(tmp_path: Path) -> None:
    rng = random.Random(0)
    bags = [[rng.randrange(9) for _ in range(rng.randrange(4))] for _ in range(50)]
    times = [rng.randrange(30) for _ in range(50)]
    columns = {
        "y": [0, 1] * 25,
        "a": list(range(50)),
        "b": pa.array(bags, pa.list_(pa.int64())),
        "t": times,
    }
    sparse = [
        {"column": "a", "table": "t", "num_embeddings": 5},
        {"column": "b", "table": "t", "num_embeddings": 5},
    ]
    manifest = prepare(parquet_config(tmp_path, columns, sparse=sparse, time="t"))
    assert manifest.num_embeddings == {"t": 5}
    cut = sorted(times)[45]
    for split, rows in (
        ("train", [i for i in range(50) if times[i] < cut]),
        ("validation", [i for i in range(50) if times[i] >= cut]),
    ):
        source = PreparedSource(tmp_path / "out", split)
        assert [(f.name, f.table, f.num_embeddings, f.multi_hot) for f in source.features] == [
            ("a", "t", 5, False),
            ("b", "t", 5, True),
        ]
        (batch,) = source.batches(batch_size=100)
        assert batch.dense.shape == (len(rows), 0)
        assert batch.sparse.offsets is not None
        expected = [[i] for i in rows] + [bags[i] for i in rows]
        assert np.diff(batch.sparse.offsets).tolist() == [len(bag) for bag in expected]
        assert batch.sparse.values.tolist() == [hash_id(key, 5) for bag in expected for key in bag]


def test_skipped_rows_are_counted_and_reported(tmp_path: Path) -> None:
    lines = [*LINES[:5], "1\t2", *LINES[5:], LINES[0].replace("\t", " ")]
    with pytest.raises(DataError, match=r"raw\.txt, line 6: 2 columns"):
        prepare(config(tmp_path, lines))
    assert not (tmp_path / "out" / MANIFEST_NAME).exists()
    manifest = prepare(config(tmp_path, lines, on_error="skip"))
    assert manifest.source.num_rows_read == 102
    assert manifest.source.num_rows_skipped == 2
    assert "line 6" in manifest.source.skipped["wrong number of columns"].first
    assert manifest.num_rows("train") + manifest.num_rows("validation") == 100


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"no training rows are left of 2: all were skipped: 2 because of wrong number",
    ):
        prepare(config(tmp_path, ["1\t2", "x"], on_error="skip"))
    (tmp_path / "raw.parquet").unlink(missing_ok=True)
    columns = {"y": [0, 1], "a": [1, 2], "t": [5, 5]}
    sparse = [{"column": "a", "num_embeddings": 5}]
    settings = parquet_config(tmp_path, columns, sparse=sparse, time="t")
    split = settings.split.model_copy(update={"validation_share": 0.5})
    with pytest.raises(DataError, match="went to validation"):
        prepare(settings.model_copy(update={"split": split}))


def test_an_interrupted_prepare_leaves_no_manifest_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    first = prepare(config(tmp_path))
    with pytest.raises(
        DataError,
        match="already holds prepared data: choose another output, or set overwrite = true",
    ):
        prepare(config(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        prepare(config(tmp_path, overwrite=True), stop)
    with pytest.raises(DataError, match=r"holds no manifest\.json"):
        PreparedSource(tmp_path / "out", "train")
    assert prepare(config(tmp_path)).model_dump() == first.model_dump()  # the same bytes again


def test_nothing_is_named_whole_before_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module.PreparedManifest, "save", lambda self, folder: None)
    prepare(config(tmp_path))
    with pytest.raises(DataError, match="preparing was interrupted"):
        PreparedManifest.load(tmp_path / "out")


def test_output_that_is_a_file(tmp_path: Path) -> None:
    settings = config(tmp_path).model_copy(update={"output": tmp_path / "raw.txt"})
    with pytest.raises(DataError, match="must be a folder"):
        prepare(settings)


def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(self: HashingFile, data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(HashingFile, "write", write)
    with pytest.raises(DataError, match=r"preparing into .*out failed: .*No space left on device"):
        prepare(config(tmp_path))
    assert not (tmp_path / "out" / MANIFEST_NAME).exists()
