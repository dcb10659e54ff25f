"""Epochs of a run's folder: numbers are used once, and older epochs can't change checkpoints."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest

from bagpipe.checkpoint.epochs import claim_epoch
from bagpipe.errors import CheckpointError


def test_numbers_grow_and_say_who_claimed_them(tmp_path: Path) -> None:
    assert [claim_epoch(tmp_path).epoch for _ in range(3)] == [1, 2, 3]
    claim = json.loads((tmp_path / "epochs" / "2" / "claim.json").read_text())
    assert set(claim) == {"run", "host", "pid", "time_s", "launcher"}


def test_a_number_is_not_used_again_when_its_cuts_are_gone(tmp_path: Path) -> None:
    claim_epoch(tmp_path)
    shutil.rmtree(claim_epoch(tmp_path).cuts)
    assert claim_epoch(tmp_path).epoch == 3


def test_what_a_start_that_died_has_left_is_in_nobodys_way(tmp_path: Path) -> None:
    died = claim_epoch(tmp_path)
    (died.cuts / "1").mkdir()
    (died.cuts / "1" / "group-0.arrow").write_text("half of it")
    unnamed = tmp_path / "epochs" / ".new-0123"  # of one that died before it had a number
    (unnamed / "cuts").mkdir(parents=True)
    for epoch in (2, 3):  # of which the first dies at once
        run = claim_epoch(tmp_path)
        assert run.epoch == epoch
        assert list(run.cuts.iterdir()) == []
        assert run.identity == died.identity
        assert sorted(path.name for path in died.cuts.parent.iterdir()) == ["claim.json"]


def test_an_older_epoch_can_no_longer_put_a_checkpoint_in_place(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    old = claim_epoch(tmp_path)
    cut = old.cuts / "1"
    cut.mkdir()
    (cut / "records").write_bytes(b"of the old epoch")

    new = claim_epoch(tmp_path)

    with pytest.raises(FileNotFoundError):
        cut.rename(checkpoints / "step-0000000001")  # the commit
    with pytest.raises(FileNotFoundError):
        checkpoints.rename(old.cuts / "old-1")  # removing one
    with pytest.raises(FileNotFoundError):
        (old.cuts / "2").mkdir()  # another cut
    assert list(checkpoints.iterdir()) == []
    assert not (tmp_path / "epochs" / "1" / "ended").exists()
    (new.cuts / "1").mkdir()  # the new one can


def test_a_zombie_that_writes_on_is_told_of_and_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (claim_epoch(tmp_path).cuts / "1").mkdir()
    said: list[str] = []

    def refuse(path: Path) -> None:
        raise OSError(39, "Directory not empty")

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", refuse)
        assert claim_epoch(tmp_path, said.append).epoch == 2
    assert "1/ended" in said[0]
    assert "Directory not empty" in said[0]
    claim_epoch(tmp_path)
    assert not (tmp_path / "epochs" / "1" / "ended").exists()  # the next start has removed it


def test_starts_at_one_time_get_numbers_of_their_own_and_the_newest_is_left(
    tmp_path: Path,
) -> None:
    epochs = []
    together = threading.Barrier(8)

    def start() -> None:
        together.wait()
        epochs.append(claim_epoch(tmp_path))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(each.epoch for each in epochs) == list(range(1, 9))
    newest = max(epochs, key=lambda each: each.epoch)
    assert [each for each in epochs if each.cuts.is_dir()] == [newest]


def test_a_run_keeps_its_name_when_its_oldest_epochs_are_removed(tmp_path: Path) -> None:
    name = claim_epoch(tmp_path).identity
    assert name.startswith(f"{tmp_path.name}-")
    claim_epoch(tmp_path)
    shutil.rmtree(tmp_path / "epochs" / "1")
    third = claim_epoch(tmp_path)
    assert (third.epoch, third.identity) == (3, name)
    (tmp_path / "epochs" / "2" / "claim.json").write_text("[]")
    assert third.identity == name
    assert claim_epoch(tmp_path / "other").identity != name


def test_what_is_no_epoch_is_left_alone(tmp_path: Path) -> None:
    epochs = tmp_path / "epochs"
    strange = [epochs / "notes" / "ended", epochs / "007" / "ended", epochs / "\u0663"]
    for path in strange:
        path.mkdir(parents=True)
    (epochs / "4").write_text("a file")
    (epochs / ("9" * 30)).mkdir()
    assert claim_epoch(tmp_path).epoch == 5
    run = claim_epoch(tmp_path)
    assert run.epoch == 6
    assert run.identity.startswith(f"{tmp_path.name}-")
    assert all(path.is_dir() for path in strange)


def test_a_folder_that_cant_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "epochs").write_text("a file")
    with pytest.raises(CheckpointError, match=r"epochs: a start of the run can't be noted there"):
        claim_epoch(tmp_path)
