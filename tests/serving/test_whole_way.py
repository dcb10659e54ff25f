"""docs/serving.md runs as it stands, from a Parquet file to a served model, and keeps its word."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import shlex
import threading
import urllib.error
import urllib.request
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.cli.test_cli import invoke

import bagpipe.serving
from bagpipe.data.manifest import PreparedManifest
from bagpipe.errors import DataError

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/serving.md").read_text()
EXAMPLE = ROOT / "examples/serve_http.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the page's code and commands have run."""
    folder = tmp_path_factory.mktemp("page")
    make, use = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    (settings,) = re.findall(r"```toml\n(.*?)```", PAGE, flags=re.DOTALL)
    told = [shlex.split(line) for line in PAGE.splitlines() if line.startswith("    bagpipe ")]
    assert [words[1] for words in told] == ["data", "train", "eval", "predict", "export"]
    with contextlib.chdir(folder):
        exec(make, {})
        Path("run.toml").write_text(settings)
        for words in told:
            small = ["--set", "log.tensorboard=false", "--set", "train.device=cpu"]
            result = invoke(*words[1:], *(small if "train" in words else []))
            assert result.exit_code == 0, result.output
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(use, {})
    scores = printed.getvalue().strip("[]\n").split()
    assert len(scores) == 2
    assert all(0 < float(score) < 1 for score in scores)
    return folder


def predicted(folder: Path, data: str, *options: object) -> Any:
    with contextlib.chdir(folder):
        result = invoke("predict", "runs/clicks", data, "-o", "out.parquet", *options)
        assert result.exit_code == 0, result.output
        return pq.read_table("out.parquet")


def write_held_out(folder: Path, prepared: str, raw: str) -> None:
    """Writes the raw rows of a validation split to held_out.parquet, in their order."""
    held_out = pa.ipc.open_file(folder / prepared / "validation-00000.arrow").read_all()
    rows = pq.read_table(folder / raw)
    price = np.log(np.float32(1) + rows.column("price").to_numpy().astype(np.float32))
    chosen = np.flatnonzero(np.isin(price, held_out.column("dense").combine_chunks().flatten()))
    pq.write_table(rows.take(chosen).drop_columns("clicked"), folder / "held_out.parquet")


def test_a_file_of_raw_rows_gets_the_bits_of_prepared_ones(folder: Path) -> None:
    validation = predicted(folder, "prepared", "--batch-size", 64)
    write_held_out(folder, "prepared", "clicks.parquet")
    raw = predicted(folder, "held_out.parquet", "--batch-size", 64)
    assert raw.schema.names == ["score"]  # there are no labels
    assert raw.column("score").equals(validation.column("score"))


def test_new_values_of_later_prepared_data_are_unknown_ones(folder: Path) -> None:
    random = np.random.default_rng(1)
    later = pq.read_table(folder / "clicks.parquet").slice(0, 400)
    columns = {
        "user": later.column("user").to_numpy() + 250,  # half of them are new
        "city": later.column("city"),
        "genres": [["Opera", *genres] for genres in later.column("genres").to_pylist()],
        "price": random.gamma(2.0, 10.0, len(later)),
        "clicked": later.column("clicked"),
    }
    pq.write_table(pa.table(columns), folder / "later.parquet")
    settings = {
        "output": "later",
        "vocabulary_from": "prepared",
        "source.files": '["later.parquet"]',
    }
    words = [word for each in settings.items() for word in ("--set", "prepare.{}={}".format(*each))]
    with contextlib.chdir(folder):
        assert invoke("data", "prepare", "run.toml", *words).exit_code == 0
        sizes = [PreparedManifest.load(Path(each)).num_embeddings for each in ("prepared", "later")]
        assert sizes[0]["user"] < sizes[1]["user"]
        assert sizes[0]["genres"] + 1 == sizes[1]["genres"]
        assert invoke("eval", "runs/clicks", "later").exit_code == 0
    validation = predicted(folder, "later", "--batch-size", 64)
    write_held_out(folder, "later", "later.parquet")
    # as on a GPU, where an oracle process reads the source
    in_process = ["--batch-size", 64, "--set", "cache.oracle=process"]
    assert predicted(folder, "later", *in_process).equals(validation)
    raw = predicted(folder, "held_out.parquet", *in_process)
    assert raw.num_rows == validation.num_rows > 0
    assert raw.column("score").equals(validation.column("score"))


def test_requests_get_the_bits_of_the_file(folder: Path) -> None:
    model = bagpipe.serving.load(folder / "exported")
    rows = pq.read_table(folder / "clicks.parquet").slice(0, 100)
    new = {
        "user": [10**12, None, -1],
        "city": ["elsewhere", "", None],
        "genres": [["Opera", "War", None, ""], None, ["War", "War"]],
        "price": [None, -3.0, 1e6],
    }
    rows = pa.concat_tables([rows.drop_columns("clicked"), pa.table(new)])
    pq.write_table(rows, folder / "rows.parquet")
    for size in (64, 1):
        from_file = predicted(folder, "rows.parquet", "--batch-size", size)
        expected = from_file.column("score").to_numpy()
        pieces = [rows.slice(begin, size) for begin in range(0, len(rows), size)]
        of_dicts = np.concatenate([model.predict(piece.to_pylist()) for piece in pieces])
        assert (of_dicts == expected).all()
        assert (np.concatenate([model.predict(piece) for piece in pieces]) == expected).all()


@pytest.mark.parametrize(
    ("columns", "facts"),
    [
        ({"city": None}, ["has no column 'city'", "its columns are user, genres, price"]),
        ({"user": ["17"] * 3}, ["'user'", "is of type string", "in training it held integers"]),
        ({"city": [1, 2, 3]}, ["'city'", "is of type int64", "in training it held strings"]),
        ({"genres": ["War"] * 3}, ["'genres'", "one value a row", "a list of values a row"]),
        ({"price": ["1"] * 3}, ["'price'", "must be a number"]),
        ({"price": [1.0, 2.0, float("inf")]}, ["row 2", "'price'", "each row is to be scored"]),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    folder: Path, columns: dict[str, Any], facts: list[str]
) -> None:
    rows = {"user": [1, 2, 3], "city": ["a"] * 3, "genres": [["War"]] * 3, "price": [1.0] * 3}
    rows |= columns
    kept = {name: values for name, values in rows.items() if values is not None}
    pq.write_table(pa.table(kept), folder / "bad.parquet")
    with contextlib.chdir(folder):
        result = invoke("predict", "runs/clicks", "bad.parquet", "-o", "bad_scores.parquet")
    assert result.exit_code == 2
    assert all(fact in result.stderr for fact in ["bad.parquet", *facts]), result.stderr
    assert not (folder / "bad_scores.parquet").exists()


def test_other_prepared_data_are_refused(folder: Path) -> None:
    other = ["--set", "prepare.output=other", "--set", "prepare.vocabulary.min_count=30"]
    with contextlib.chdir(folder):
        assert invoke("data", "prepare", "run.toml", *other).exit_code == 0
        result = invoke("eval", "runs/clicks", "other")
        assert result.exit_code == 2
        assert "other: has other ids for the values of table 'user'" in result.stderr
        assert "prepare.vocabulary_from, which keeps the run's ids" in result.stderr
        moved = invoke("eval", "runs/clicks", "--set", "data.folder=other")
        assert moved.exit_code == 2
        assert "other: holds other data than" in moved.stderr


def test_a_served_model_answers_over_http(folder: Path) -> None:
    spec = importlib.util.spec_from_file_location("serve_http", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    model = example.Handler.model = bagpipe.serving.load(folder / "exported")
    example.Handler.log_message = lambda *_: None
    row = {"user": 17, "city": None, "genres": ["War"], "price": 3}
    with ThreadingHTTPServer(("127.0.0.1", 0), example.Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            with urllib.request.urlopen(f"{url}/predict", json.dumps([row]).encode()) as answer:
                assert json.load(answer) == {"scores": model.predict([row]).tolist()}
            with urllib.request.urlopen(url) as answer:
                told = json.load(answer)
                assert (told["dense"], told["labels"]) == (["price"], ["clicked"])
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(f"{url}/predict", b'[{"user": 1}]')
            with caught.value as refused:
                assert refused.code == 400
                assert "has no 'price'" in json.load(refused)["error"]
        finally:
            server.shutdown()


def test_criteo_text_is_hashed_as_it_was_prepared(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    categories = [f"{value:x}" for value in random.integers(0, 2**32, 40)]
    lines = [
        [str(row % 2), *random.integers(-2, 9, 13).astype(str), *random.choice(categories, 26)]
        for row in range(90)
    ]
    lines[80][3] = lines[81][20] = ""
    (tmp_path / "all.txt").write_text("".join("\t".join(line) + "\n" for line in lines))
    (tmp_path / "last.txt").write_text("".join("\t".join(line) + "\n" for line in lines[60:]))
    (tmp_path / "run.toml").write_text(
        """
        [prepare]
        output = "prepared"
        split = {validation_share = 0.3333}
        source = {kind = "criteo", files = ["all.txt"], num_embeddings = 50}
        [data]
        kind = "prepared"
        folder = "prepared"
        [embeddings]
        embedding_dim = 4
        [model]
        bottom = [4]
        top = [8, 1]
        [train]
        batch_size = 32
        device = "cpu"
        [log]
        folder = "run"
        tensorboard = false
        """
    )
    with contextlib.chdir(tmp_path):
        for arguments in (
            ["data", "prepare", "run.toml"],
            ["train", "run.toml"],
            ["predict", "run", "-o", "own.parquet"],
            ["predict", "run", "last.txt", "-o", "raw.parquet"],
            ["export", "run", "model"],
        ):
            result = invoke(*arguments)
            assert result.exit_code == 0, result.output
        own, raw = (pq.read_table(f"{name}.parquet") for name in ("own", "raw"))
        model = bagpipe.serving.load("model")
    assert own.num_rows == 30
    assert own.equals(raw)
    names = [*(f"I{i}" for i in range(1, 14)), *(f"C{i}" for i in range(1, 27))]
    rows = [
        {
            name: (int(value) if value else None) if name[0] == "I" else value
            for name, value in zip(names, line[1:], strict=True)
        }
        for line in lines[60:]
    ]
    assert model.predict(rows).tolist() == own.column("score").to_pylist()
    with pytest.raises(DataError, match="'C3' is 'xyz', must be 1 to 8 hexadecimal digits"):
        model.predict([rows[0] | {"C3": "xyz"}])
