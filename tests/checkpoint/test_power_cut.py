"""Power fails at any moment: what was saved before is found, whole, whatever of the rest has been
written.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.checkpoint.test_checkpoints import save_in, trained_state
from tests.disks import ForgetfulDisk
from tests.train.runs import newest_files, small_config

from bagpipe.checkpoint.checkpoints import find_checkpoint
from bagpipe.checkpoint.run_folder import claim_run_folder
from bagpipe.errors import CheckpointError
from bagpipe.store.manifest import read_manifest
from bagpipe.train.report import SilentReporter
from bagpipe.train.trainer import train

CHECKPOINTS = Path("runs") / "first" / "checkpoints"
Choices = Callable[[], bool]


def kinds_of_power_cut(number: int) -> list[Choices]:
    """Nothing that was not synced has been written; all of it; some of it."""
    generator = random.Random(number)
    return [lambda: False, lambda: True, *[lambda: generator.random() < 0.5] * 3]


def newest_step(folder: Path) -> tuple[int, list[dict[str, object]]]:
    """The step of the newest valid checkpoint, 0 where there is none, and its files."""
    try:
        found = find_checkpoint(folder, on_damaged=lambda error: None)
    except CheckpointError:
        found = None
    return (0, []) if found is None else (found.step, [dict(file) for file in found.files])


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """One to work in, and one for what a power cut leaves of it."""
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk", tmp_path / "left"


def save_and_cut(
    disk: ForgetfulDisk, root: Path, left: Path, *, num_saves: int = 4
) -> tuple[int, set[int]]:
    """Saves several checkpoints, of which two are kept, and cuts the power all the time. Returns
    how often, and the newest steps found.
    """
    num_cuts, saved_step, found_steps = 0, 0, set()
    files: dict[int, list[dict[str, object]]] = {}

    def check() -> None:
        nonlocal num_cuts
        for is_written in kinds_of_power_cut(num_cuts):
            num_cuts += 1
            step, found = newest_step(disk.after_a_power_cut(left, is_written) / CHECKPOINTS)
            assert step >= saved_step, f"step {saved_step} was saved, {step or 'nothing'} is left"
            assert found == files.get(step, found)
            found_steps.add(step)

    disk.at_every_event(check)
    with claim_run_folder(root / CHECKPOINTS.parent) as run:
        for step in range(1, num_saves + 1):
            path = save_in(run, trained_state(step))
            files[step], saved_step = read_manifest(path)["files"], step
            check()
    disk.at_every_event(lambda: None)
    return num_cuts, found_steps


def test_what_was_saved_is_found(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, left = folders
    disk = ForgetfulDisk(root, monkeypatch)
    num_cuts, found_steps = save_and_cut(disk, root, left)
    disk.close()
    assert num_cuts > 200
    assert found_steps == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    "forgotten",
    [
        "dense.pt",
        "group-0.arrow",
        "group-1.arrow",
        "manifest.json",
        "cuts/step-*",
        "checkpoints",
        "runs/first",
        "runs",
        "disk",
    ],
)
def test_a_forgotten_sync_is_found(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, forgotten: str
) -> None:
    root, left = folders
    disk = ForgetfulDisk(root, monkeypatch, ignores=lambda path: path.match(forgotten))
    with pytest.raises(AssertionError, match=r"step \d was saved, .* is left"):
        save_and_cut(disk, root, left)
    disk.close()


def test_a_run_goes_on_after_power_cuts(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(small_config(tmp_path / "undisturbed"), reporter=SilentReporter())
    root, left = folders
    num_events = 0

    def keep_some() -> None:
        nonlocal num_events
        num_events += 1
        if num_events % 23 == 0:
            kinds = kinds_of_power_cut(num_events)
            cut = disk.after_a_power_cut(left, kinds[num_events // 23 % len(kinds)])
            shutil.copytree(cut, tmp_path / f"cut-{num_events}")

    disk = ForgetfulDisk(root, monkeypatch)
    disk.at_every_event(keep_some)
    config = small_config(root / "runs" / "first", checkpoint={"every_steps": 5})
    train(config, reporter=SilentReporter())
    disk.at_every_event(lambda: None)
    disk.close()
    monkeypatch.undo()
    cuts = sorted(tmp_path.glob("cut-*"))
    assert len(cuts) >= 3
    for cut in cuts:
        folder = cut / "runs" / "first"
        train(small_config(folder), reporter=SilentReporter(), resume=True)
        assert newest_files(folder) == newest_files(tmp_path / "undisturbed")
