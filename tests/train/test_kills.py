"""Whoever is killed, the run goes on and ends with the same parameters, bit for bit."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from tests.train.kills import (
    NUM_SEEDS,
    Fault,
    Run,
    assert_ends_as_undisturbed,
    random_faults,
    train_undisturbed,
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    train_undisturbed(folder)
    return folder


@pytest.mark.soak
def test_a_trainer_and_the_server_are_killed_at_once(tmp_path: Path, undisturbed: Path) -> None:
    fault = Fault(victims=("rank 1", "server"), at_step=40)
    for attempt in range(5):  # on a busy machine the run may be over before they are found
        folder = tmp_path / str(attempt)
        folder.mkdir()
        hits = assert_ends_as_undisturbed(folder, [fault], undisturbed)
        if hits == ["rank 1", "server"]:
            return
    raise AssertionError(hits)


@pytest.mark.soak
def test_an_undisturbed_run_that_is_interrupted_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[subprocess.Popen[bytes]] = []

    def launch(_: Run) -> subprocess.Popen[bytes]:
        launched.append(subprocess.Popen(["sleep", "600"]))
        return launched[0]

    def interrupt(*_: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "_launch", launch)
    monkeypatch.setattr(Run, "_await", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_undisturbed(tmp_path)
    (launcher,) = launched
    is_left = launcher.poll() is None
    launcher.kill()
    launcher.wait()
    assert not is_left


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_random_faults(tmp_path: Path, undisturbed: Path, seed: int) -> None:
    assert_ends_as_undisturbed(tmp_path, random_faults(seed), undisturbed)
