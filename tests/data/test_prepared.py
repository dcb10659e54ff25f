"""Reading prepared files: any batches from anywhere, shuffled or not, and damaged files."""

from __future__ import annotations

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bagpipe.config.data import PrepareConfig, PreparedData
from bagpipe.data import open_source, reading_order
from bagpipe.data.base import Batch
from bagpipe.data.files import checksum_file
from bagpipe.data.manifest import MANIFEST_NAME, PreparedManifest
from bagpipe.data.prepare import prepare
from bagpipe.data.prepared import PreparedSource
from bagpipe.errors import ConfigError, DataError

NUM_ROWS = 150


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 rows; feature `row` holds the row's number, `bag` that many modulo 4 ids."""
    path = tmp_path_factory.mktemp("prepared")
    rows = np.arange(NUM_ROWS)
    bags = [[row] * (row % 4) for row in range(NUM_ROWS)]
    table = pa.table(
        {
            "y": rows % 2,
            "x": rows.astype(np.float32),
            "row": rows,
            "bag": pa.array(bags, pa.list_(pa.int64())),
        }
    )
    pq.write_table(table, path / "raw.parquet")
    source = {
        "kind": "parquet",
        "files": [str(path / "raw.parquet")],
        "label": {"column": "y"},
        "dense": ["x"],
        "sparse": [{"column": "row"}, {"column": "bag"}],
    }
    config = {
        "output": path / "out",
        "source": source,
        "dense_transform": "none",
        "vocabulary": {"kind": "dictionary"},
    }
    small = {"split": {"validation_share": 0.0}, "rows_per_batch": 7, "batches_per_file": 4}
    prepare(PrepareConfig.model_validate({**config, **small}))
    return path / "out"


def unpack(batches: list[Batch], keys: tuple[str, ...]) -> list[int]:
    """The numbers of the rows in the order read.

    Checks on the way that the parts of each row belong together.
    """
    read: list[int] = []
    for batch in batches:
        n = batch.batch_size
        rows = batch.dense[:, 0].astype(int).tolist()
        assert batch.sparse.keys == keys
        assert batch.labels.tolist() == [row % 2 for row in rows]
        assert (batch.sparse.offsets is None) == ("bag" not in keys)
        offsets = (
            np.arange(len(keys) * n + 1) if batch.sparse.offsets is None else batch.sparse.offsets
        )
        for f, name in enumerate(keys):
            for b, row in enumerate(rows):
                ids = batch.sparse.values[offsets[f * n + b] : offsets[f * n + b + 1]].tolist()
                assert len(ids) == (1 if name == "row" else row % 4)
                assert len(set(ids)) <= 1
        if "row" in keys:  # equally frequent keys are numbered in ascending order, from 1
            begin = keys.index("row") * n
            assert batch.sparse.values[offsets[begin] : offsets[begin + n]].tolist() == [
                row + 1 for row in rows
            ]
        read += rows
    return read


@settings(max_examples=60, deadline=None)
@given(
    batch_size=st.integers(1, 170),
    start=st.integers(0, 5),
    drop_last=st.booleans(),
    shuffle=st.booleans(),
    epoch=st.integers(0, 2),
    keys=st.sampled_from([("row", "bag"), ("bag", "row"), ("row",), ("bag",)]),
    window=st.sampled_from([1, 3, 100]),
)
def test_any_batches_from_anywhere(
    folder: Path,
    batch_size: int,
    start: int,
    drop_last: bool,
    shuffle: bool,
    epoch: int,
    keys: tuple[str, ...],
    window: int,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading_order, "WINDOW_BATCHES", window)
        source = PreparedSource(
            folder, "train", features=keys, shuffle=shuffle, seed=5, verify=False
        )
        assert (source.num_samples, source.num_dense) == (NUM_ROWS, 1)
        whole = unpack(list(source.batches(batch_size=batch_size, epoch=epoch)), keys)
        assert sorted(whole) == list(range(NUM_ROWS))
        assert shuffle or whole == list(range(NUM_ROWS))
        part = list(
            source.batches(batch_size=batch_size, epoch=epoch, start=start, drop_last=drop_last)
        )
        last = NUM_ROWS - NUM_ROWS % batch_size if drop_last else NUM_ROWS
        assert unpack(part, keys) == whole[start * batch_size : last]


@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_may_be_read_by_several_threads_and_in_another_process(
    folder: Path, shuffle: bool
) -> None:
    source = PreparedSource(folder, "train", shuffle=shuffle)
    whole = unpack(list(source.batches(batch_size=7, epoch=1)), ("row", "bag"))
    with ThreadPoolExecutor(4) as pool:
        for one in (source, pickle.loads(pickle.dumps(source))):
            batches = pool.map(lambda read: read(), one.reads(batch_size=7, epoch=1))
            assert unpack(list(batches), ("row", "bag")) == whole


def test_shuffling_depends_on_seed_and_epoch_only(folder: Path) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        source = PreparedSource(folder, "train", shuffle=True, seed=seed)
        return unpack(list(source.batches(batch_size=32, epoch=epoch)), ("row", "bag"))

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


def test_batches_outlive_the_source(folder: Path) -> None:
    batch = next(PreparedSource(folder, "train").batches(batch_size=10))
    assert batch.sparse.values.flags.owndata or batch.sparse.values.base is not None
    assert batch.labels.flags.writeable


def copy_of(folder: Path, to: Path) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def test_truncated_altered_and_missing_files_are_refused(folder: Path, tmp_path: Path) -> None:
    copy = copy_of(folder, tmp_path / "copy")
    path = copy / "train-00001.arrow"
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    for verify in (True, False):
        with pytest.raises(
            DataError,
            match=rf"00001\.arrow has {len(good) - 1:,} bytes, but {len(good):,} were written",
        ):
            PreparedSource(copy, "train", verify=verify)
    path.write_bytes(good[:600] + bytes([good[600] ^ 1]) + good[601:])
    with pytest.raises(DataError, match=r"train-00001\.arrow has checksum .* it is altered"):
        PreparedSource(copy, "train")
    path.unlink()
    with pytest.raises(DataError, match=r"train-00001\.arrow is missing"):
        PreparedSource(copy, "train")


def test_an_id_outside_its_table_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = copy_of(folder, tmp_path / "copy")
    manifest = PreparedManifest.load(copy)
    manifest.model_copy(update={"num_embeddings": {"row": 100, "bag": 1000}}).save(copy)
    batches = PreparedSource(copy, "train").batches(batch_size=50, epoch=3)
    next(batches)
    with pytest.raises(
        DataError,
        match=r"batch 1 of train, epoch 3: feature 'row' of sample 49 has id 100, but table 'row'",
    ):
        next(batches)


def test_an_edited_manifest_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = copy_of(folder, tmp_path / "copy")
    path = copy / MANIFEST_NAME
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "rows_per_batch": 8}))
    with pytest.raises(DataError, match=r"manifest\.json is not as it was written"):
        PreparedManifest.load(copy)
    path.write_text(json.dumps({**content, "format_version": 99}))
    with pytest.raises(DataError, match="format version 99, this version of Bagpipe reads 1"):
        PreparedManifest.load(copy)
    for damaged in ("{", "[]", "\x00"):
        path.write_text(damaged)
        with pytest.raises(DataError):
            PreparedManifest.load(copy)


@pytest.mark.parametrize("name", ["../outside.arrow", "/etc/passwd", "a/b", "..", ".", "", "a\0"])
@pytest.mark.parametrize("kind", ["splits", "dictionaries"])
def test_a_manifest_names_files_of_its_own_folder_only(
    folder: Path, tmp_path: Path, name: str, kind: str
) -> None:
    copy = copy_of(folder, tmp_path / "copy")
    (copy / "train-00000.arrow").rename(tmp_path / "outside.arrow")
    manifest = PreparedManifest.load(copy)
    entry = manifest.splits["train"][0].model_copy(update={"name": name})
    splits = {"train": (entry, *manifest.splits["train"][1:])}
    manifest.model_copy(update={kind: splits if kind == "splits" else {"row": entry}}).save(copy)
    with pytest.raises(DataError, match="must be a file in its own folder") as raised:
        PreparedManifest.load(copy)
    assert repr(name) in str(raised.value)
    assert str(copy / MANIFEST_NAME) in str(raised.value)


def written_by_somebody(folder: Path, fault: str) -> None:
    """A folder whose manifest and checksums are right, but not what the file holds."""
    n = 100
    bags = pa.array([[1, 2]] * n, pa.list_(pa.int32()))
    options = pa.ipc.IpcWriteOptions(compression="lz4") if fault == "compressed" else None
    table = pa.table(
        {
            "label": pa.array([0] * n, pa.float32()),
            "dense": pa.array([[1, 2]] * n, pa.list_(pa.float32(), 2)),
            "a": pa.array(range(n), pa.int32()),
            "b": bags,
        }
    )
    if fault == "another type":
        table = table.set_column(2, "a", table["a"].cast(pa.int8()))
    elif fault == "another order":
        table = table.select(["label", "dense", "b", "a"])
    elif fault == "no features":
        table = table.select(["label", "dense"])
    elif fault == "fewer rows":
        table = table.slice(0, 60)
    elif fault in ("label", "dense", "a"):
        values = table[fault].to_pylist()
        table = table.set_column(
            table.column_names.index(fault), fault, pa.array([*values[1:], None], table[fault].type)
        )
    elif fault == "wild offsets":
        offsets = np.arange(n + 1, dtype=np.int32) * 2
        offsets[50] = 2**30
        buffers = [None, pa.py_buffer(offsets)]
        wild = pa.Array.from_buffers(bags.type, n, buffers, children=[bags.values])
        table = table.set_column(3, "b", wild)
    with pa.ipc.new_file(str(folder / "a.arrow"), table.schema, options=options) as writer:
        writer.write_table(table)
    path = folder / "a.arrow"
    entry = {"name": path.name, "num_bytes": path.stat().st_size, "num_rows": n}
    content = {
        "label": "y",
        "dense_names": ("x", "z"),
        "dense_transform": "none",
        "features": [{"name": name, "table": "t", "multi_hot": name == "b"} for name in "ab"],
        "num_embeddings": {"t": 1000},
        "vocabulary": "hash",
        "dictionaries": {},
        "rows_per_batch": 1000,
        "splits": {"train": ({**entry, "checksum": checksum_file(path)},)},
        "source": {"kind": "x", "files": (), "num_rows_read": n, "skipped": {}},
    }
    PreparedManifest.model_validate(content).save(folder)


@pytest.mark.parametrize(
    ("fault", "fact"),
    [
        ("another type", "other columns than the manifest says"),
        ("another order", "other columns than the manifest says"),
        ("no features", "other columns than the manifest says"),
        ("fewer rows", "other rows than the manifest says"),
        ("compressed", "other buffers: compressed, or laid out otherwise"),
        ("label", "some have missing values"),
        ("dense", "some have missing values"),
        ("a", "some have missing values"),
        ("wild offsets", "record batch 0: "),
    ],
)
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_file_that_is_not_as_the_manifest_says_is_read_within_its_bounds(
    tmp_path: Path, fault: str, fact: str, shuffle: bool
) -> None:
    written_by_somebody(tmp_path, "none")
    assert len(list(PreparedSource(tmp_path, "train").batches(batch_size=64))) == 2
    written_by_somebody(tmp_path, fault)
    with pytest.raises(DataError) as raised:
        list(PreparedSource(tmp_path, "train", shuffle=shuffle).batches(batch_size=64))
    assert str(tmp_path / "a.arrow") in str(raised.value)
    assert fact in str(raised.value)


def test_what_is_not_there(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no validation rows"):
        PreparedSource(folder, "validation")
    with pytest.raises(DataError, match="is not prepared data"):
        PreparedSource(tmp_path, "train")
    with pytest.raises(
        ConfigError, match="feature 'nope' is not in the prepared data, which has row, bag"
    ):
        PreparedSource(folder, "train", features=["nope"])
    with pytest.raises(ConfigError, match="chosen more than once"):
        PreparedSource(folder, "train", features=["row", "row"])
    with pytest.raises(ValueError, match="batch_size is 0"):
        next(PreparedSource(folder, "train").batches(batch_size=0))


def test_opened_by_its_configuration(folder: Path) -> None:
    source = open_source(
        PreparedData(kind="prepared", folder=folder, features=("row",), shuffle=True), "train"
    )
    assert [feature.name for feature in source.features] == ["row"]
    assert unpack(list(source.batches(batch_size=40)), ("row",)) != list(range(NUM_ROWS))
