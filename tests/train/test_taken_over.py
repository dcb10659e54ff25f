"""A start that is refused ends no run under way, and a run that another takes over ends soon."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tests.train.runs import small_config
from tests.train.test_servers import assert_same, over, servers_of, undisturbed

from bagpipe.checkpoint.epochs import RunFolder, claim_epoch
from bagpipe.distributed.trainers import Launcher
from bagpipe.errors import CheckpointError, StoreError, TakenOverError
from bagpipe.launch.torchrun import torchrun_launcher
from bagpipe.train.report import SilentReporter
from bagpipe.train.trainer import train

__all__ = ["undisturbed"]


class AtStep5(SilentReporter):
    """Does something after step 5."""

    def __init__(self, do: Callable[[], object]) -> None:
        self._do, self.last_step = do, -1

    def advance(self, step: int) -> None:
        self.last_step = step
        if step == 5:
            self._do()


def assert_under_way(folder: Path) -> None:
    assert RunFolder(path=folder, epoch=1).cuts.is_dir()
    assert not (folder / "epochs" / "2").exists()


def test_a_start_of_another_configuration_claims_nothing(tmp_path: Path) -> None:
    with servers_of(small_config(tmp_path), 1) as addresses:
        train(over(addresses, tmp_path, train={"steps": 3}), reporter=SilentReporter())
        other = over(addresses, tmp_path, train={"batch_size": 16})
        with pytest.raises(CheckpointError, match=r"train\.batch_size: 32 -> 16"):
            train(other, reporter=SilentReporter(), resume=True)
    assert_under_way(tmp_path)


def test_a_start_over_servers_of_another_run_or_of_other_tables_claims_nothing(
    tmp_path: Path,
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    other = small_config(tmp_path, train={"seed": 5})
    with (
        servers_of(small_config(here), 1) as own,
        servers_of(small_config(there), 1) as foreign,
        servers_of(other, 1) as of_other_tables,
    ):
        train(over(own, here, train={"steps": 3}), reporter=SilentReporter())
        train(over(foreign, there, train={"steps": 3}), reporter=SilentReporter())
        for addresses, fact in (
            (foreign, rf"at {foreign[0]} .* it holds the tables of run 'there-.*, not of 'here-"),
            (of_other_tables, rf"at {of_other_tables[0]} .* it has other tables"),
        ):
            with pytest.raises(StoreError, match=fact):
                train(over(addresses, here), reporter=SilentReporter(), resume=True)
    assert_under_way(here)


def test_a_run_whose_folder_a_newer_start_has_claimed_ends_without_a_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bagpipe.train.loop.LOOK_EVERY_S", 0.0)
    reporter = AtStep5(lambda: claim_epoch(tmp_path))
    with servers_of(small_config(tmp_path), 1) as addresses:
        with pytest.raises(TakenOverError) as caught:
            train(over(addresses, tmp_path), reporter=reporter)
    assert re.match(
        rf"epoch 1 of the run in {tmp_path} has ended: epoch 2 of process \d+ on host \S+ has "
        "taken the run over and goes on from its newest checkpoint",
        str(caught.value),
    )
    assert reporter.last_step == 5


def test_a_run_whose_servers_serve_a_newer_start_says_which(
    tmp_path: Path, undisturbed: Path
) -> None:
    with servers_of(small_config(tmp_path), 2) as addresses:
        config = over(addresses, tmp_path)
        newer = AtStep5(lambda: train(config, reporter=SilentReporter(), resume=True))
        with pytest.raises(TakenOverError, match=r"epoch 1 of the run in .* has ended: epoch 2"):
            train(config, reporter=newer)
    assert_same(tmp_path, undisturbed)


@pytest.mark.soak
def test_a_launcher_takes_no_run_back_by_itself(tmp_path: Path) -> None:
    def start(name: str, *, is_restart: bool) -> None:
        launcher = Launcher(name=name, is_restart=is_restart)
        train(config, reporter=SilentReporter(), resume=True, launcher=launcher)

    with servers_of(small_config(tmp_path), 1) as addresses:
        config = over(addresses, tmp_path, train={"steps": 1})
        start("one", is_restart=False)
        start("one", is_restart=True)
        start("other", is_restart=False)
        with pytest.raises(TakenOverError, match=r"epoch 3 .* over from epoch 2 of this launcher"):
            start("one", is_restart=True)
        assert not (tmp_path / "epochs" / "4").exists()
        start("other", is_restart=True)
        start("one", is_restart=False)  # somebody has started it again


def test_torchrun_is_known_by_what_stays_over_its_restarts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert torchrun_launcher() is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "of this test")
    first = torchrun_launcher()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    second = torchrun_launcher()
    assert first is not None
    assert second == replace(first, is_restart=True)
    assert "of this test" in first.name
