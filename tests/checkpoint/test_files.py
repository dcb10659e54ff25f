"""Checkpoints as files: complete or not there, and damage is refused with the file's name."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bagpipe.checkpoint.epochs import RunFolder, claim_epoch
from bagpipe.checkpoint.files import (
    CheckpointWriter,
    checkpoint_name,
    list_checkpoints,
    prune,
    step_of,
)
from bagpipe.errors import CheckpointError, StoreError
from bagpipe.store.manifest import read_manifest, verify_files
from bagpipe.store.record_files import read_records
from bagpipe.types import Float32Array, Int64Array

WIDTH = 3


def blocks(*sizes: int) -> Iterator[tuple[Int64Array, Float32Array]]:
    first = 0
    for size in sizes:
        rows = np.arange(first, first + size, dtype=np.int64) * 7
        yield rows, np.repeat(rows[:, None], WIDTH, axis=1).astype(np.float32)
        first += size


def write(folder: Path, step: int = 5) -> Path:
    return write_in(claim_epoch(folder), step)


def write_in(run: RunFolder, step: int) -> Path:
    with CheckpointWriter(run, step) as writer:
        writer.write_bytes("dense.pt", b"dense")
        writer.write_records("group-0.arrow", blocks(4, 2), WIDTH)
        writer.write_manifest({"step": step})
    return writer.path


def left_in(folder: Path) -> list[str]:
    """Checkpoints, and what is not yet or no longer one."""
    found = (*folder.glob("checkpoints/*"), *folder.glob("epochs/*/cuts/*"))
    return sorted(path.name for path in found)


def busy(monkeypatch: pytest.MonkeyPatch, busy_name: str) -> None:
    """Folders of this name can be neither renamed nor removed, as where something is
    mounted in them.
    """
    for module, name in ((os, "rename"), (shutil, "rmtree")):
        real = getattr(module, name)

        def refuse(path: Path, *rest: Any, real: Any = real, **options: Any) -> None:
            if Path(path).name == busy_name and Path(path).parent.name != "cuts":
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
            real(path, *rest, **options)

        monkeypatch.setattr(module, name, refuse)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = write(tmp_path)
    manifest = read_manifest(path)
    verify_files(path, manifest["files"])
    assert manifest["step"] == 5
    found = list(read_records(path / "group-0.arrow", WIDTH))
    assert [len(rows) for rows, _ in found] == [4, 2]
    for (rows, records), (expected_rows, expected_records) in zip(found, blocks(4, 2), strict=True):
        np.testing.assert_array_equal(rows, expected_rows)
        np.testing.assert_array_equal(records, expected_records)


def test_no_records_at_all_are_a_file_too(tmp_path: Path) -> None:
    with CheckpointWriter(claim_epoch(tmp_path), 0) as writer:
        file = writer.write_records("group-0.arrow", iter(()), WIDTH)
        assert file.num_records == 0
    assert list(read_records(writer.path / "group-0.arrow", WIDTH)) == []


def test_a_failure_leaves_nothing_but_what_was_there(tmp_path: Path) -> None:
    def failing() -> Iterator[tuple[Int64Array, Float32Array]]:
        yield from blocks(1)
        raise ZeroDivisionError

    write(tmp_path, 1)
    with pytest.raises(ZeroDivisionError), CheckpointWriter(claim_epoch(tmp_path), 2) as writer:
        writer.write_records("group-0.arrow", failing(), WIDTH)
    assert left_in(tmp_path) == [checkpoint_name(1)]


def test_a_store_that_fails_is_not_taken_for_the_disk(tmp_path: Path) -> None:
    def failing() -> Iterator[tuple[Int64Array, Float32Array]]:
        yield from blocks(1)
        raise StoreError("row 3 is gone")

    with (
        pytest.raises(StoreError, match="row 3"),
        CheckpointWriter(claim_epoch(tmp_path), 2) as writer,
    ):
        writer.write_records("group-0.arrow", failing(), WIDTH)
    assert left_in(tmp_path) == []


def test_a_full_disk_is_named_and_earlier_checkpoints_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = write(tmp_path, 1)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run = claim_epoch(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        CheckpointError,
        match=r"step-0000000002: can't be written: No space left.*earlier checkpoints",
    ):
        write_in(run, 2)
    monkeypatch.undo()
    assert left_in(tmp_path) == [old.name]
    verify_files(old, read_manifest(old)["files"])


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    run = claim_epoch(tmp_path)
    run.checkpoints.write_text("")
    with pytest.raises(CheckpointError, match="can't be written: Not a directory"):
        write_in(run, 2)


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    (path / "dense.pt").write_bytes(b"DENSE")
    write(tmp_path, 1)
    verify_files(path, read_manifest(path)["files"])
    assert left_in(tmp_path) == [checkpoint_name(1)]


@pytest.mark.parametrize("name", ["dense.pt", "group-0.arrow", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_damage_is_refused_with_the_name_of_the_file(
    tmp_path: Path, name: str, damage: str
) -> None:
    path = write(tmp_path)
    content = bytearray((path / name).read_bytes())
    if damage == "missing":
        (path / name).unlink()
    elif damage == "truncated":
        (path / name).write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 1
        (path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name}: (is damaged|can't be read)"):
        verify_files(path, read_manifest(path)["files"])


def test_a_manifest_of_another_format_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bagpipe.checkpoint.files.FORMAT", 99)
    path = write(tmp_path)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="has format 99, this version reads formats 1 and 2"):
        read_manifest(path)


def test_a_manifest_is_readable_by_people(tmp_path: Path) -> None:
    manifest = json.loads((write(tmp_path) / "manifest.json").read_text())
    assert [entry["name"] for entry in manifest["files"]] == ["dense.pt", "group-0.arrow"]
    assert manifest["files"][0]["size_bytes"] == 5


def test_records_of_another_width_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"group-0.arrow: holds other columns.*4 floats"):
        list(read_records(write(tmp_path) / "group-0.arrow", 4))


def test_the_last_ones_are_kept_and_later_ones_are_not_touched(tmp_path: Path) -> None:
    for step in (1, 2, 3, 9):
        write(tmp_path, step)
    told: list[str] = []
    prune(claim_epoch(tmp_path), newest=3, keep=2, say=told.append)
    assert told == []
    assert [step_of(path) for path in list_checkpoints(tmp_path / "checkpoints")] == [2, 3, 9]


def test_one_that_cannot_be_removed_is_told_and_the_others_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    busy(monkeypatch, "step-0000000002")
    told: list[str] = []
    prune(claim_epoch(tmp_path), newest=4, keep=1, say=told.append)
    assert told == [
        f"{tmp_path / 'checkpoints' / 'step-0000000002'}: is no longer needed, but can't be "
        "removed: Device or resource busy; the run goes on"
    ]
    assert left_in(tmp_path) == ["step-0000000002", "step-0000000004"]


def test_a_damaged_one_of_the_same_step_that_cannot_be_removed_does_not_keep_out_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, 1)
    (path / "dense.pt").write_bytes(b"DENSE")
    real = shutil.rmtree

    def rmtree(folder: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors and folder.name.startswith("old-"):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        real(folder, ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    assert write(tmp_path, 1) == path
    verify_files(path, read_manifest(path)["files"])
    assert (path / "dense.pt").read_bytes() == b"dense"


@pytest.mark.parametrize("name", ["../dense.pt", "/etc/passwd", "a/b", "..", ".", "", "a\0", 7])
def test_a_manifest_that_names_a_file_elsewhere_is_refused(tmp_path: Path, name: Any) -> None:
    with CheckpointWriter(claim_epoch(tmp_path), 5) as writer:
        writer.write_bytes("dense.pt", b"dense")
        writer.files[0]["name"] = name
        writer.write_manifest({"step": 5})
    shutil.copy(writer.path / "dense.pt", tmp_path)
    with pytest.raises(CheckpointError) as caught:
        read_manifest(writer.path)
    assert f"manifest.json: names {name!r}, must be a file in its own folder" in str(caught.value)


def test_no_folder_holds_no_checkpoint(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path / "none") == []


def test_another_name_is_no_checkpoint() -> None:
    with pytest.raises(
        CheckpointError,
        match=r"runs/last: is not a checkpoint: its name must be like step-0000001000",
    ):
        step_of(Path("runs/last"))
