"""Real data, prepared and read back, equal a plain parse.

The data are not part of the project, and the tests are skipped without them. They are looked for in
BAGPIPE_SHARED_DATA, or in `shared/data` beside the repository.
"""

from __future__ import annotations

import gzip
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import xxhash
from tests.data.naive import criteo_key, frequency_ids, hash_id, log_dense

from bagpipe.config.data import PrepareConfig
from bagpipe.data.base import Batch, Split
from bagpipe.data.inspect import ALL_TABLES, inspect_source
from bagpipe.data.prepare import prepare
from bagpipe.data.prepared import PreparedSource

DATA = Path(os.environ.get("BAGPIPE_SHARED_DATA") or Path(__file__).parents[3] / "shared" / "data")
CRITEO, MOVIELENS = DATA / "criteo_kaggle_head.tsv.gz", DATA / "ml100k_ctr.parquet"

pytestmark = [
    pytest.mark.skipif("CI" in os.environ, reason="real data are never used in CI"),
    pytest.mark.skipif(
        not DATA.is_dir(), reason=f"no real data at {DATA}; set BAGPIPE_SHARED_DATA to their folder"
    ),
]


def read(folder: Path, split: Split) -> tuple[PreparedSource, Batch]:
    source = PreparedSource(folder, split)
    (batch,) = source.batches(batch_size=source.num_samples)
    return source, batch


def prepare_criteo(tmp_path: Path, num_embeddings: str | None = None, **extra: Any) -> None:
    source = {"kind": "criteo", "files": [str(CRITEO)], "num_embeddings": num_embeddings}
    prepare(
        PrepareConfig.model_validate(
            {"output": tmp_path, "source": source, "rows_per_batch": 1000, **extra}
        )
    )


@pytest.fixture(scope="module")
def criteo_rows() -> list[list[str]]:
    return [line.split("\t") for line in gzip.decompress(CRITEO.read_bytes()).decode().splitlines()]


def test_criteo_hashed(tmp_path: Path, criteo_rows: list[list[str]]) -> None:
    prepare_criteo(tmp_path, "kaggle")
    cut = len(criteo_rows) - round(len(criteo_rows) * 0.1)
    parts: tuple[tuple[Split, list[list[str]]], ...] = (
        ("train", criteo_rows[:cut]),
        ("validation", criteo_rows[cut:]),
    )
    for split, rows in parts:
        source, batch = read(tmp_path, split)
        assert batch.labels.tolist() == [float(row[0]) for row in rows]
        np.testing.assert_allclose(
            batch.dense, [[log_dense(x) for x in row[1:14]] for row in rows], rtol=2e-6
        )
        ids = batch.sparse.values.reshape(26, -1)
        for f, feature in enumerate(source.features):
            assert ids[f].tolist() == [
                hash_id(criteo_key(row[14 + f]), feature.num_embeddings) for row in rows
            ]


def test_criteo_by_dictionary(tmp_path: Path, criteo_rows: list[list[str]]) -> None:
    prepare_criteo(
        tmp_path, vocabulary={"kind": "dictionary", "min_count": 3}, split={"validation_share": 0}
    )
    source, batch = read(tmp_path, "train")
    ids = batch.sparse.values.reshape(26, -1)
    for f, feature in enumerate(source.features):
        keys = [criteo_key(row[14 + f]) for row in criteo_rows]
        expected = frequency_ids(keys, 3)
        assert feature.num_embeddings == len(expected) + 1
        assert ids[f].tolist() == [expected.get(key, 0) for key in keys]


def test_criteo_skew(tmp_path: Path, criteo_rows: list[list[str]]) -> None:
    prepare_criteo(tmp_path, vocabulary={"kind": "dictionary"}, split={"validation_share": 0})
    pooled = inspect_source(PreparedSource(tmp_path, "train"))[-1]
    counts = sorted(
        (n for f in range(26) for n in Counter(row[14 + f] for row in criteo_rows).values()),
        reverse=True,
    )
    assert (pooled.table, pooled.num_seen) == (ALL_TABLES, len(counts))
    assert pooled.top_seen_share == pytest.approx(sum(counts[: len(counts) // 100]) / sum(counts))


def test_movielens_with_multi_valued_genres(tmp_path: Path) -> None:
    sparse = [{"column": "user_id"}, {"column": "gender"}, {"column": "genres", "separator": " "}]
    label = {"column": "rating", "at_least": 4}
    source = {
        "kind": "parquet",
        "files": [str(MOVIELENS)],
        "label": label,
        "dense": ["age"],
        "time": "timestamp",
    }
    config = {"output": tmp_path, "vocabulary": {"kind": "dictionary"}, "dense_transform": "none"}
    prepare(PrepareConfig.model_validate({**config, "source": {**source, "sparse": sparse}}))
    rows = pq.read_table(MOVIELENS).to_pylist()
    cut = sorted(row["timestamp"] for row in rows)[len(rows) - round(len(rows) * 0.1)]
    splits: dict[Split, list[dict[str, Any]]] = {
        "train": [row for row in rows if row["timestamp"] < cut],
        "validation": [row for row in rows if row["timestamp"] >= cut],
    }
    users = frequency_ids([row["user_id"] for row in splits["train"]], 1)
    genders = frequency_ids([row["gender"] for row in splits["train"]], 1, signed_hash)
    genres = frequency_ids(
        [genre for row in splits["train"] for genre in row["genres"].split()], 1, signed_hash
    )
    for split, part in splits.items():
        opened, batch = read(tmp_path, split)
        assert [feature.multi_hot for feature in opened.features] == [False, False, True]
        assert batch.labels.tolist() == [float(row["label"]) for row in part]
        assert batch.dense[:, 0].tolist() == [row["age"] for row in part]
        expected = [[users.get(row["user_id"], 0)] for row in part] + [
            [genders.get(row["gender"], 0)] for row in part
        ]
        expected += [[genres.get(genre, 0) for genre in row["genres"].split()] for row in part]
        assert batch.sparse.offsets is not None
        assert np.diff(batch.sparse.offsets).tolist() == [len(bag) for bag in expected]
        assert batch.sparse.values.tolist() == [id for bag in expected for id in bag]


def signed_hash(text: str) -> int:
    number = xxhash.xxh3_64_intdigest(text.encode())
    return number - 2**64 if number >= 2**63 else number
