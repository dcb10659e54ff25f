"""What is counted while data are prepared, and said about them afterwards.

These are clipped values, validation's values that training does not have, and training rows that
lie grouped by label.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.data.naive import criteo_line, write_criteo

from bagpipe.config.data import PrepareConfig, PreparedData, SyntheticData
from bagpipe.data.manifest import PreparedManifest
from bagpipe.data.notes import prepare_notes, run_notes
from bagpipe.data.observed import LabelClustering
from bagpipe.data.prepare import prepare
from bagpipe.data.prepared import PreparedSource


def prepare_columns(
    tmp_path: Path, columns: dict[str, Any], sparse: list[dict[str, Any]], **extra: Any
) -> PreparedManifest:
    num_rows = len(next(iter(columns.values())))
    table = {"y": np.arange(num_rows) % 2, **columns}
    pq.write_table(pa.table(table), tmp_path / "raw.parquet")
    dense = [name for name in columns if name.startswith("x")]
    source = {"kind": "parquet", "files": [str(tmp_path / "raw.parquet")], "dense": dense}
    source |= {"label": {"column": "y"}, "sparse": sparse}
    config = {"output": tmp_path / "out", "source": source, "overwrite": True, **extra}
    return prepare(PrepareConfig.model_validate(config))


def read_dense(tmp_path: Path) -> list[list[float]]:
    (batch,) = PreparedSource(tmp_path / "out", "train").batches(batch_size=10_000)
    return batch.dense.tolist()  # type: ignore[no-any-return]


NUMBERS = {"x": [-2.0, -0.5, 0.0, 3.0], "x2": [0, 1, 2, 3], "c": [1, 2, 3, 4]}
ONE = [{"column": "c", "num_embeddings": 9}]
NO_VALIDATION = {"split": {"validation_share": 0.0}}


def test_numbers_of_parquet_are_kept_unless_a_transform_is_asked_for(tmp_path: Path) -> None:
    manifest = prepare_columns(tmp_path, NUMBERS, ONE, **NO_VALIDATION)
    assert manifest.dense_transform == "none"
    assert read_dense(tmp_path) == [[-2, 0], [-0.5, 1], [0, 2], [3, 3]]
    assert prepare_notes(manifest) == []
    manifest = prepare_columns(tmp_path, NUMBERS, ONE, dense_transform="log", **NO_VALIDATION)
    assert read_dense(tmp_path)[0][0] == read_dense(tmp_path)[1][0] == 0
    (note,) = prepare_notes(manifest)
    assert note == "dense_transform = 'log' has made 0 of values below 0: x 2 (50.0%)"


def test_criteo_has_the_logarithm_by_default_and_what_it_clips_is_told(tmp_path: Path) -> None:
    lines = [criteo_line(seed).split("\t") for seed in range(20)]
    for number, line in enumerate(lines):
        line[2] = "-1" if number < 5 else "7"
    path = write_criteo(tmp_path / "raw.txt", ["\t".join(line) for line in lines])
    source = {"kind": "criteo", "files": [str(path)], "num_embeddings": 17}
    config = {"output": tmp_path / "out", "source": source, **NO_VALIDATION}
    manifest = prepare(PrepareConfig.model_validate(config))
    assert manifest.dense_transform == "log"
    below = [sum(float(line[1 + i] or 0) < 0 for line in lines) for i in range(13)]
    assert below[1] == 5
    assert manifest.num_clipped == {f"I{i + 1}": n for i, n in enumerate(below) if n}
    assert "made 0 of values below 0: " in prepare_notes(manifest)[0]
    assert "I2 5 (25.0%)" in prepare_notes(manifest)[0]


@pytest.mark.parametrize("by", ["time", "share"])
@pytest.mark.parametrize("min_count", [1, 2])
def test_values_that_training_does_not_have_are_counted_by_dictionary(
    tmp_path: Path, by: str, min_count: int
) -> None:
    rng = np.random.default_rng(0)
    users, items = rng.integers(0, 300, 600), rng.integers(0, 20, 600)
    users[540:] += 270  # most users of the last rows are new
    bags = [[int(user)] * int(user % 3) for user in users]
    columns = {"user": users, "item": items, "bag": pa.array(bags, pa.list_(pa.int64()))}
    manifest = prepare_columns(
        tmp_path,
        {**columns, "x": np.arange(600)},
        [{"column": "user"}, {"column": "item"}, {"column": "bag"}],
        vocabulary={"kind": "dictionary", "min_count": min_count},
        split={"by": by},
        rows_per_batch=16,
    )
    (held_out,) = PreparedSource(tmp_path / "out", "validation").batches(batch_size=1000)
    rows = held_out.dense[:, 0].astype(int).tolist()
    rest = sorted(set(range(600)) - set(rows))
    values: dict[str, list[list[int]]] = {
        "user": [[user] for user in users.tolist()],
        "item": [[item] for item in items.tolist()],
        "bag": bags,
    }
    for name, by_row in values.items():
        training = [value for row in rest for value in by_row[row]]
        known = {value for value in training if training.count(value) >= min_count}
        lookups = [value for row in rows for value in by_row[row]]
        unseen = sum(value not in known for value in lookups)
        entry = manifest.unseen[name]
        assert (entry.num_lookups, entry.num_unused) == (len(lookups), unseen)
        assert entry.share == unseen / len(lookups)
    (note,) = prepare_notes(manifest)
    assert "validation looks up values that training never has, or too rarely for a row" in note
    assert f"user {manifest.unseen['user'].share:.2%}" in note
    assert ("item" in note) == (manifest.unseen["item"].num_unused > 0)
    data = {"kind": "prepared", "folder": tmp_path / "out"}
    assert run_notes(PreparedData.model_validate(data)) == [note]
    assert run_notes(PreparedData.model_validate({**data, "features": ["item"]})) == (
        [note[: note.index("of the lookups ")] + "of the lookups " + f"item {share:.2%}"]
        if (share := manifest.unseen["item"].share)
        else []
    )


def test_and_are_estimated_where_values_are_hashed(tmp_path: Path) -> None:
    """Training has values 0 to 3,999; of validation's lookups a quarter are of others."""
    rng = np.random.default_rng(0)
    seen, new = rng.integers(0, 4000, 20_000), 4000 + np.arange(500)
    values = np.concatenate([np.arange(4000), seen[:16_000], seen[16_000:17_500], new])
    sizes = {"wide": 1_000_000, "narrow": 4000, "full": 500}
    manifest = prepare_columns(
        tmp_path,
        {name: values for name in sizes},
        [{"column": name, "num_embeddings": size} for name, size in sizes.items()],
        split={"validation_share": 2000 / len(values)},
    )
    assert {entry.num_lookups for entry in manifest.unseen.values()} == {2000}
    assert manifest.unseen["wide"].share == pytest.approx(0.25, abs=0.005)
    assert manifest.unseen["narrow"].num_unused < 0.5 * 500  # most fall on rows that are used
    assert manifest.unseen["narrow"].share == pytest.approx(0.25, abs=0.04)
    assert manifest.unseen["full"].share is None
    told, unknown = prepare_notes(manifest)
    assert "estimated by the hashed rows that it leaves unused" in told
    assert "wide about 25%" in told
    assert "not known for full: it uses nearly all rows" in unknown


def test_rows_grouped_by_label_are_told_unless_they_are_shuffled(tmp_path: Path) -> None:
    values = np.arange(40_000)
    columns = {"y": (values < 10_000).astype(np.int8), "c": values % 7}
    manifest = prepare_columns(tmp_path, columns, ONE, **NO_VALIDATION)
    (note,) = prepare_notes(manifest)
    assert "training rows lie grouped by label (98% of its variance" in note
    assert "set data.shuffle = true" in note
    data = {"kind": "prepared", "folder": tmp_path / "out"}
    assert run_notes(PreparedData.model_validate(data)) == [note]
    assert run_notes(PreparedData.model_validate({**data, "shuffle": True})) == []
    columns["y"] = np.random.default_rng(0).permutation(columns["y"])
    manifest = prepare_columns(tmp_path, columns, ONE, **NO_VALIDATION)
    assert prepare_notes(manifest) == run_notes(PreparedData.model_validate(data)) == []


def test_clustering_of_labels() -> None:
    def share(labels: Any) -> float | None:
        clustering = LabelClustering()
        for part in np.array_split(np.asarray(labels, np.float32), 3):
            clustering.add(part)
        return clustering.share

    rng = np.random.default_rng(0)
    assert share(np.arange(100_000) < 20_000) == pytest.approx(0.98, abs=0.02)
    assert share(rng.random(100_000) < 0.2) == pytest.approx(0, abs=0.002)
    days = np.repeat(rng.uniform(0.1, 0.5, 30), 6 * 1024)  # the click rate of each
    clicks = rng.random(len(days)) < days
    assert share(clicks) == pytest.approx(days.var() / clicks.var(), abs=0.005)
    assert share(np.ones(5000)) is None
    assert share([0, 1] * 1000) is None  # fewer than two stretches


def test_of_synthetic_data_there_is_nothing_to_tell() -> None:
    assert run_notes(SyntheticData(kind="synthetic")) == []
