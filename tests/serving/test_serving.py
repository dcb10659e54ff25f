"""An exported model answers raw requests with the bits that the trainer predicts."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.numpy import load_file
from tests.train.runs import small_config
from typer.testing import CliRunner

import bagpipe.serving
from bagpipe.data.base import Batch, BatchSource
from bagpipe.errors import ConfigError, DataError
from bagpipe.exporting import tables
from bagpipe.serving import ServedModel
from bagpipe.train.export import export
from bagpipe.train.predict import predictions, probabilities
from bagpipe.train.report import SilentReporter
from bagpipe.train.saved import SavedModel, load_model, open_saved
from bagpipe.train.scored import open_scored
from bagpipe.train.trainer import train
from bagpipe.types import Float32Array, Group, Int64Array
from benchmarks.cli import app as benchmarks

MULTI_HOT = {"data": {"multi_hot": {"C2": [0, 3]}}}
MODELS: dict[str, dict[str, dict[str, Any]]] = {
    "dlrm": MULTI_HOT,
    "one-hot": {},
    "mean of 16 bits": MULTI_HOT | {"embeddings": {"pooling": "mean", "data_type": "bf16"}},
    "bf16": {"train": {"precision": "bf16"}},
    "dcn": {"model": {"kind": "dcn", "bottom": [8, 4], "top": [8, 1], "cross_rank": 4}},
    "deepfm": {"model": {"kind": "deepfm", "top": [8, 1]}},
}


def saved(folder: Path, name: str) -> SavedModel:
    sections = {"train": {}} | MODELS[name]
    sections["train"] = {"steps": 6, **sections["train"]}
    train(small_config(folder, **sections), reporter=SilentReporter())
    return open_saved(folder)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[SavedModel, Path]:
    folder = tmp_path_factory.mktemp("exported")
    of = saved(folder / "run", "dlrm")
    export(of, folder / "model")
    return of, folder / "model"


def rows_of(batch: Batch) -> list[dict[str, Any]]:
    """Requests that mean what a batch holds."""
    size, sparse = batch.batch_size, batch.sparse
    bounds = np.arange(len(sparse.values) + 1) if sparse.offsets is None else sparse.offsets
    return [
        {f"I{index}": value.item() for index, value in enumerate(batch.dense[row], 1)}
        | {
            name: bag if name == "C2" and sparse.offsets is not None else bag[0]
            for place, name in enumerate(sparse.keys)
            for bag in [
                sparse.values[bounds[place * size + row] : bounds[place * size + row + 1]].tolist()
            ]
        }
        for row in range(size)
    ]


def predicted(of: SavedModel, source: BatchSource, batch_size: int) -> Iterator[torch.Tensor]:
    with load_model(of) as loaded:
        for batch in predictions(loaded, source, batch_size, lambda *_: None):
            yield probabilities(batch.logits)


@pytest.mark.parametrize("name", MODELS)
def test_requests_get_the_bits_that_the_trainer_predicts(name: str, tmp_path: Path) -> None:
    of = saved(tmp_path / "run", name)
    export(of, tmp_path / "model", arrow=False)
    model = bagpipe.serving.load(tmp_path / "model", verify=True)
    source = open_scored(of, None, None).source
    batches = source.batches(batch_size=64)
    for batch, expected in zip(batches, predicted(of, source, 64), strict=True):
        assert torch.equal(torch.from_numpy(model.predict(rows_of(batch))), expected)
    one = np.concatenate([model.predict([row]) for row in rows_of(batch)])
    np.testing.assert_allclose(one, expected, rtol=1e-2 if name == "bf16" else 1e-5)


def test_a_served_model_tells_a_person_what_it_is(exported: tuple[SavedModel, Path]) -> None:
    told = repr(bagpipe.serving.load(exported[1]))
    assert (
        told == "<ServedModel of step 6: label from I1, I2, I3, C1, C2, C3; 430 rows in 3 tables>"
    )


def test_arrow_requests_are_those_of_dicts(exported: tuple[SavedModel, Path]) -> None:
    of, folder = exported
    model = bagpipe.serving.load(folder)
    rows = rows_of(next(open_scored(of, None, None).source.batches(batch_size=8)))
    rows[2]["I2"] = None  # a missing number is 0
    table = pa.Table.from_pylist([row | {"label": 1} for row in rows])
    expected = model.predict(rows)
    assert (model.predict(table) == expected).all()
    assert (model.predict(table.to_batches()[0]) == expected).all()
    assert (model.predict([row | {"I2": row["I2"] or 0} for row in rows]) == expected).all()
    assert (
        model.predict([{**rows[0], "C2": None}]) == model.predict([{**rows[0], "C2": []}])
    ).all()
    assert model.predict([]).shape == (0,)
    assert model.predict(table[:0]).shape == (0,)


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"C1": ...}, ["row 1", "has no 'C1'", "None where a value is missing"]),
        ({"C1": "7"}, ["column 'C1'", "no common type", "str in row 1"]),
        ({"C1": 7.5}, ["'C1'", "type double", "in training it held integers"]),
        ({"C1": [7]}, ["'C1'", "no common type"]),
        ({"C1": None}, ["table 'C1'", "an id is missing", "from 0 to 39"]),
        ({"C1": 40}, ["table 'C1'", "an id is 40", "from 0 to 39"]),
        ({"I1": "x"}, ["'I1'", "str in row 1"]),
        ({"I1": float("nan")}, ["row 1 (from 0)", "'I1'", "is nan", "must be finite"]),
    ],
)
def test_a_wrong_row_is_named(
    exported: tuple[SavedModel, Path], change: dict[str, Any], facts: list[str]
) -> None:
    of, folder = exported
    rows = rows_of(next(open_scored(of, None, None).source.batches(batch_size=3)))
    rows[1] = {name: value for name, value in (rows[1] | change).items() if value is not ...}
    with pytest.raises(DataError) as caught:
        bagpipe.serving.load(folder).predict(rows)
    assert all(fact in str(caught.value) for fact in facts), caught.value


@pytest.mark.parametrize(
    ("requests", "fact"),
    [
        ({"C1": 1}, "is one dict, must be a list of dicts"),
        ([1], "is a list, must be a list of dicts"),
        ("C1", "is a str"),
        (pa.table({"C1": [1]}), "has no column 'I1'"),
        ([{"C1": 1, "C2": 1, "C3": 1, "I1": 1, "I2": 1, "I3": 1}], "in training it had a list"),
    ],
)
def test_what_is_no_request_is_refused(
    exported: tuple[SavedModel, Path], requests: Any, fact: str
) -> None:
    with pytest.raises(DataError, match=fact):
        bagpipe.serving.load(exported[1]).predict(requests)


def test_tables_are_written_for_other_programs(exported: tuple[SavedModel, Path]) -> None:
    of, folder = exported
    found = load_file(folder / "tables.safetensors")
    manifest = bagpipe.serving.load(folder).manifest
    with load_model(of) as loaded:
        for table in manifest.tables:
            expected = loaded.embeddings.tables()[table.name][:].numpy()
            assert (found[table.key] == expected).all()
            with pa.memory_map(str(folder / str(table.arrow))) as file:
                column = pa.ipc.open_file(file).read_all().column("weights").combine_chunks()
                assert (column.flatten().to_numpy().reshape(expected.shape) == expected).all()


def test_records_map_one_span_of_the_tables_at_a_time(
    exported: tuple[SavedModel, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of, folder = exported
    put, written = tables._put, []

    def watched(group: Group, views: Any, rows: Int64Array, records: Float32Array) -> None:
        written.append({int(row) // 50 for row in rows})
        put(group, views, rows, records)

    monkeypatch.setattr(tables, "_put", watched)
    monkeypatch.setattr(tables, "BLOCK_ROWS", 50)
    monkeypatch.setattr(tables, "SPAN_BYTES", 50 * 4 * of.groups[0].embedding_dim, raising=False)
    export(of, tmp_path / "model", arrow=False)
    assert all(len(spans) == 1 for spans in written)
    assert len(written) > -(-of.groups[0].num_rows // 50)  # initial weights, then records
    files = [each / "tables.safetensors" for each in (folder, tmp_path / "model")]
    assert files[0].read_bytes() == files[1].read_bytes()


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "copy"))


def edited(folder: Path, **values: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("damage", "facts"),
    [
        (shutil.rmtree, ["is no exported model", "no such folder"]),
        (lambda folder: (folder / "manifest.json").unlink(), ["is no exported model"]),
        (lambda folder: cut(folder / "manifest.json"), ["manifest.json", "can't be read"]),
        (lambda folder: edited(folder, step=3), ["manifest.json", "damaged or edited"]),
        (lambda folder: edited(folder, format=2), ["has format 2", "reads format 1", "install"]),
        (lambda folder: cut(folder / "tables.safetensors"), ["tables.safetensors", "cut off"]),
        (lambda folder: (folder / "dense.pt2").unlink(), ["dense.pt2", "copy the exported folder"]),
    ],
)
def test_a_damaged_folder_is_refused(
    exported: tuple[SavedModel, Path], tmp_path: Path, damage: Any, facts: list[str]
) -> None:
    folder = copied(exported[1], tmp_path)
    damage(folder)
    with pytest.raises(DataError) as caught:
        bagpipe.serving.load(folder)
    assert all(fact in str(caught.value) for fact in facts), caught.value


def test_altered_tables_are_found_when_asked_to(
    exported: tuple[SavedModel, Path], tmp_path: Path
) -> None:
    folder = copied(exported[1], tmp_path)
    path = folder / "tables.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert isinstance(bagpipe.serving.load(folder), ServedModel)
    with pytest.raises(DataError, match=r"tables\.safetensors: is damaged"):
        bagpipe.serving.load(folder, verify=True)


def test_a_warning_of_torch_on_its_own_bytes_is_not_passed_on(
    exported: tuple[SavedModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    load, told = torch.export.load, ["The given buffer is not writable, and PyTorch does not .."]

    def warn_and_load(path: Path) -> Any:
        for message in told:
            warnings.warn(message, UserWarning, stacklevel=2)
        return load(path)

    monkeypatch.setattr(torch.export, "load", warn_and_load)  # as torch 2.11 does
    assert isinstance(bagpipe.serving.load(exported[1]), ServedModel)
    told.append("The program is of an older torch")
    with pytest.warns(UserWarning, match="of an older torch"):
        bagpipe.serving.load(exported[1])


def test_nothing_is_exported_over_something(
    exported: tuple[SavedModel, Path], tmp_path: Path
) -> None:
    of, folder = exported
    with pytest.raises(ConfigError, match="is there already"):
        export(of, folder)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file/model: can't be written"):
        export(of, tmp_path / "file" / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_serving_loads_neither_the_trainer_nor_compiled_loops(
    exported: tuple[SavedModel, Path],
) -> None:
    of, folder = exported
    rows = rows_of(next(open_scored(of, None, None).source.batches(batch_size=2)))
    code = (
        "import sys, bagpipe.serving;"
        f"model = bagpipe.serving.load({str(folder)!r}); model.predict({rows!r});"
        "parts = ('oracle', 'feed', 'cache', 'store', 'train', 'checkpoint', 'config', 'server');"
        "loaded = [name for name in sys.modules if name.split('.')[0] in ('numba', 'llvmlite', "
        "'pydantic') or name in [f'bagpipe.{part}' for part in parts]];"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_benchmark_at_a_tiny_size(tmp_path: Path) -> None:
    options = ["serving", "--quick", "--json", str(tmp_path / "serving.json")]
    result = CliRunner().invoke(benchmarks, options, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "serving.json").read_text())["serving"]["requests"]
    assert found.keys() == {"1", "256"}
    for arms in found.values():
        assert arms.keys() == {"dicts", "arrow", "torch"}
        assert all(arm["count"] == 3 for arm in arms.values())


def test_onnx_says_how_to_install_it(
    exported: tuple[SavedModel, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"pip install 'bagpipe-recsys\[onnx\]'"):
        export(exported[0], tmp_path / "model", arrow=False, onnx=True)
    assert list(tmp_path.iterdir()) == []
