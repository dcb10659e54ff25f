"""A run's folder belongs to one process and one run."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.checkpoint.test_files import busy

from bagpipe.checkpoint.epochs import claim_epoch
from bagpipe.checkpoint.run_folder import claim_run_folder, start_afresh
from bagpipe.errors import ConfigError


def test_a_folder_in_use_is_refused_and_free_again_afterwards(tmp_path: Path) -> None:
    with (
        claim_run_folder(tmp_path / "run"),
        pytest.raises(ConfigError, match="another process trains in it"),
        claim_run_folder(tmp_path / "run"),
    ):
        pass
    with claim_run_folder(tmp_path / "run") as run:
        assert run.checkpoints.is_dir()


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    with claim_run_folder(tmp_path) as run:
        (run.cuts / "step-0000000001").mkdir()
    with claim_run_folder(tmp_path) as run:
        assert list(run.cuts.iterdir()) == []
        assert list(tmp_path.glob("epochs/1/*")) == [tmp_path / "epochs" / "1" / "claim.json"]


def test_an_earlier_run_that_cannot_be_removed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "checkpoints" / "step-0000000012"
    checkpoint.mkdir(parents=True)
    busy(monkeypatch, checkpoint.name)
    with pytest.raises(
        ConfigError, match=r"step-0000000012: of an earlier run, can't be removed: Device.*log.fold"
    ):
        start_afresh(claim_epoch(tmp_path), overwrite=True)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match=r"log.folder = .*file/run': can't be written"),
        claim_run_folder(tmp_path / "file" / "run"),
    ):
        pass


def test_an_earlier_run_is_removed_only_when_asked(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "step-0000000012"
    checkpoint.mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"up to step 12: .*--resume.*--overwrite"):
        start_afresh(claim_epoch(tmp_path), overwrite=False)
    start_afresh(claim_epoch(tmp_path), overwrite=True)
    assert not checkpoint.exists()
