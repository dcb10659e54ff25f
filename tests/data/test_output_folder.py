"""Preparing removes from its folder what it made there and nothing else; one process at a time."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.data.naive import criteo_line, write_criteo

from bagpipe.config.data import PrepareConfig
from bagpipe.data.manifest import MANIFEST_NAME, PreparedManifest
from bagpipe.data.prepare import prepare
from bagpipe.data.prepared import PreparedSource
from bagpipe.data.raw import Progress
from bagpipe.errors import DataError

LINES = [criteo_line(seed) for seed in range(60)]


def config(tmp_path: Path, **extra: Any) -> PrepareConfig:
    path = write_criteo(tmp_path / "raw.txt", LINES)
    source = {"kind": "criteo", "files": [str(path)], "num_embeddings": 17}
    small = {"rows_per_batch": 7, "batches_per_file": 3, "vocabulary": {"kind": "dictionary"}}
    return PrepareConfig.model_validate(
        {"output": tmp_path / "out", "source": source, **small, **extra}
    )


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def put(folder: Path, *names: str) -> dict[str, bytes]:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text(f"the user's own {name}")
    return content(folder)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "name", ["train-00000.arrow", "validation-00007.arrow", "dictionary-00003.arrow"]
)
def test_files_of_somebody_else_are_refused_and_kept(
    tmp_path: Path, name: str, overwrite: bool
) -> None:
    before = put(tmp_path / "out", name, "train-00001.arrow", "notes.txt")
    with pytest.raises(DataError, match="which no preparation that is known here has made") as told:
        prepare(config(tmp_path, overwrite=overwrite))
    assert f"holds {min(name, 'train-00001.arrow')} and 1 more" in str(told.value)
    assert content(tmp_path / "out") == before


def test_files_of_other_names_stay(tmp_path: Path) -> None:
    before = put(tmp_path / "out", "train-all.arrow", "validation-1.arrow", "train-00001.arrow.gz")
    first = prepare(config(tmp_path))
    assert prepare(config(tmp_path, overwrite=True)) == first
    assert before.items() <= content(tmp_path / "out").items()
    listed = {file.name for files in first.splits.values() for file in files}
    listed |= {file.name for file in first.dictionaries.values()}
    assert set(content(tmp_path / "out")) == {*before, *listed, MANIFEST_NAME}


def test_overwriting_removes_what_the_manifest_lists_alone(tmp_path: Path) -> None:
    prepare(config(tmp_path))
    before = put(tmp_path / "out", "train-00099.arrow")
    with pytest.raises(DataError, match=r"out holds train-00099\.arrow, which no preparation"):
        prepare(config(tmp_path, overwrite=True))
    assert content(tmp_path / "out") == before
    PreparedSource(tmp_path / "out", "train")
    (tmp_path / "out" / "train-00099.arrow").unlink()
    prepare(config(tmp_path, overwrite=True, split={"validation_share": 0.0}))
    assert "validation-00000.arrow" not in content(tmp_path / "out")


def test_a_manifest_that_lists_what_is_no_prepared_file(tmp_path: Path) -> None:
    manifest = prepare(config(tmp_path))
    entry = manifest.splits["train"][0].model_copy(update={"name": "thesis.doc"})
    splits = {**manifest.splits, "validation": (entry,)}
    manifest.model_copy(update={"splits": splits}).save(tmp_path / "out")
    (tmp_path / "out" / "validation-00000.arrow").unlink()
    put(tmp_path / "out", "thesis.doc")
    prepare(config(tmp_path, overwrite=True))
    assert (tmp_path / "out" / "thesis.doc").read_text() == "the user's own thesis.doc"


@pytest.mark.parametrize("text", ['{"name": "web app"}', "{", ""])
def test_a_manifest_of_something_else_is_not_overwritten(tmp_path: Path, text: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MANIFEST_NAME).write_text(text)
    with pytest.raises(DataError, match="so nothing is overwritten: choose another output"):
        prepare(config(tmp_path, overwrite=True))
    assert content(tmp_path / "out") == {MANIFEST_NAME: text.encode()}


def test_two_preparations_into_one_folder(tmp_path: Path) -> None:
    refused: list[str] = []

    def prepare_too(progress: Progress) -> None:
        for overwrite in (False, True):
            with pytest.raises(DataError) as error:
                prepare(config(tmp_path, overwrite=overwrite, split={"validation_share": 0.5}))
            refused.append(str(error.value))

    manifest = prepare(config(tmp_path), prepare_too)
    told = f"another process prepares into {tmp_path / 'out'}: wait for it, or choose another"
    assert refused
    assert all(told in text for text in refused)
    assert PreparedSource(tmp_path / "out", "train").num_samples == manifest.num_rows("train")
    prepare(config(tmp_path, overwrite=True))


def test_what_a_killed_preparation_left_is_removed(tmp_path: Path) -> None:
    split = {"by": "share", "validation_share": 0.3, "test_share": 0.3}
    settings = config(tmp_path, split=split)
    code = f"""
import os, signal
from bagpipe.config.data import PrepareConfig
from bagpipe.data import criteo, prepare

def kill(progress):
    if progress.stage == prepare.WRITE_STAGE and progress.done > 9_000:
        os.kill(os.getpid(), signal.SIGKILL)

criteo.BLOCK_BYTES = 1_000
prepare.prepare(PrepareConfig.model_validate_json({settings.model_dump_json()!r}), kill)
"""
    killed = subprocess.run([sys.executable, "-c", code], check=False)
    assert killed.returncode == -signal.SIGKILL
    begun = {f"{split}-00000.arrow" for split in ("train", "validation", "test")}
    assert begun <= content(tmp_path / "out").keys()
    before = put(tmp_path / "out", "train-00098.arrow")
    with pytest.raises(DataError, match=r"holds train-00098\.arrow, which no preparation"):
        prepare(settings)
    assert content(tmp_path / "out") == before
    (tmp_path / "out" / "train-00098.arrow").unlink()
    prepare(settings)
    again = settings.model_copy(update={"output": tmp_path / "fresh"})
    prepare(again)
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


@pytest.mark.parametrize("name", ["validation-00000.arrow", MANIFEST_NAME + ".tmp"])
def test_a_file_that_comes_meanwhile_is_kept_and_what_was_made_is_removed(
    tmp_path: Path, name: str
) -> None:
    with pytest.raises(DataError, match=rf"File exists: '.*{name}'; there is no manifest"):
        prepare(config(tmp_path), lambda _: put(tmp_path / "out", name) and None)
    assert content(tmp_path / "out") == {name: f"the user's own {name}".encode()}


def test_an_interrupt_when_all_is_written_leaves_no_manifest_without_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = PreparedManifest.save

    def save_and_stop(self: PreparedManifest, folder: Path) -> None:
        save(self, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(PreparedManifest, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(config(tmp_path))
    assert content(tmp_path / "out") == {}
