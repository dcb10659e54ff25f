"""Cuts that fail, that are late, or that are in hand when a run ends."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tests.server.serving import Servers
from tests.soon import SOON_S, TIMEOUT_S, ends_soon
from tests.store_contract import SEED, make_group
from tests.train.runs import Listener, small_config
from tests.train.test_servers import assert_same, over, servers_of, undisturbed

from bagpipe.checkpoint.epochs import RunFolder
from bagpipe.distributed.trainers import Trainers
from bagpipe.errors import ConfigError, StoreError
from bagpipe.server.shard import Shard
from bagpipe.store.cuts import CutStore
from bagpipe.store.record_files import RecordFile
from bagpipe.train.cuts import Cuts, CutServers, EndedCut
from bagpipe.train.report import SilentReporter
from bagpipe.train.trainer import train

__all__ = ["undisturbed"]


def logged(folder: Path, kind: str) -> list[int]:
    """The steps of the log's records of a kind."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [record["step"] for record in records if record["kind"] == kind]


@pytest.fixture
def slow_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts that are still being written when the few steps after them have been trained."""
    write_cut = CutStore._write_cut

    def write(store: CutStore, *arguments: Any) -> RecordFile:
        time.sleep(1.5)
        return write_cut(store, *arguments)

    monkeypatch.setattr(CutStore, "_write_cut", write)


def test_a_server_that_refuses_a_cut_does_not_end_the_run(
    tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = Shard.cut

    def refuse(
        shard: Shard, epoch: int, number: int, *, is_whole: bool
    ) -> Callable[[Path], tuple[RecordFile, ...]]:
        if (shard.number, number) == (1, 1):
            raise StoreError("refused by a test")
        return cut(shard, epoch, number)

    monkeypatch.setattr(Shard, "cut", refuse)
    listener = Listener()
    with servers_of(small_config(tmp_path), 2) as addresses:
        train(over(addresses, tmp_path, checkpoint={"every_steps": 10}), reporter=listener)
    assert any("step 10: no checkpoint" in text and "refused" in text for text in listener.said)
    assert logged(tmp_path, "checkpoint_failed") == [10]
    assert logged(tmp_path, "checkpoint") == [20, 24]
    assert_same(tmp_path, undisturbed)


@pytest.mark.usefixtures("slow_cuts")
def test_a_run_that_saves_no_last_checkpoint_waits_for_the_cut_in_hand(tmp_path: Path) -> None:
    with servers_of(small_config(tmp_path), 2) as addresses:
        config = over(addresses, tmp_path, checkpoint={"every_steps": 20, "at_end": False})
        result = train(config, reporter=SilentReporter())
    assert logged(tmp_path, "checkpoint") == [20]
    assert result.checkpoint == tmp_path / "checkpoints" / "step-0000000020"


@pytest.mark.usefixtures("slow_cuts")
def test_a_cut_in_hand_when_a_step_fails_is_finished_and_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = iter(range(24))

    def weight(*_: object) -> float:
        if next(steps) == 21:
            raise LookupError("of a test")
        return 1.0

    monkeypatch.setattr(Trainers, "weight", weight)
    with servers_of(small_config(tmp_path), 2) as addresses:
        config = over(addresses, tmp_path, checkpoint={"every_steps": 20})
        with pytest.raises(LookupError, match="of a test"):
            train(config, reporter=SilentReporter())
        assert not [each for each in threading.enumerate() if each.name == "bagpipe-checkpoint"]
    assert logged(tmp_path, "checkpoint") == [20]


def test_a_server_that_stands_still_holds_a_cut_up_no_longer_than_a_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on = threading.Event()

    def stand_still(*_: object, is_whole: bool) -> None:
        goes_on.wait(TIMEOUT_S)
        raise StoreError("of a test")

    monkeypatch.setattr(Shard, "cut", stand_still)
    with closing(Servers([make_group()], SEED, 2, timeout_s=0.5)) as servers:
        servers.start()
        started = time.monotonic()
        with pytest.raises(StoreError, match=r"shard server 0 of 2 .* not answered for 0\.5 s"):
            servers.control.cut(1, tmp_path)
        servers.control.close()
        elapsed_s = time.monotonic() - started
        goes_on.set()
    assert elapsed_s < SOON_S


def test_a_server_that_stands_still_is_not_waited_for_when_a_cut_is_abandoned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    goes_on, is_reached = threading.Event(), threading.Event()

    def stand_still(*_: object) -> None:
        is_reached.set()
        goes_on.wait(TIMEOUT_S)

    monkeypatch.setattr(Shard, "abandon", stand_still)
    with closing(Servers([make_group()], SEED, 2)) as servers:
        servers.start()
        with ends_soon():
            servers.control.abandon(1)
        assert is_reached.wait(SOON_S)
        goes_on.set()


def test_a_server_that_loads_for_too_long_names_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on = threading.Event()

    def stand_still(*_: object, **__: object) -> None:
        goes_on.wait(TIMEOUT_S)
        raise StoreError("of a test")

    with servers_of(small_config(tmp_path), 1) as (address,):
        monkeypatch.setattr(Shard, "begin", stand_still)
        config = small_config(tmp_path, servers={"addresses": [address], "begin_timeout_s": 0.2})
        with pytest.raises(StoreError) as caught:
            train(config, reporter=SilentReporter())
        goes_on.set()
    assert (
        f"shard server 0 of 1 at {address} failed in call begin of epoch 1: it has not answered "
        "for 0.2 s, which servers.begin_timeout_s allows; set that higher if it is still at work"
    ) in str(caught.value)


def test_a_cut_that_ends_while_it_is_asked_which_have_is_not_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = RunFolder(path=Path("run"), epoch=1)
    cuts = Cuts(run, cast(CutServers, None), None, keep=1, trainers=Trainers())

    def written(**values: Any) -> EndedCut:
        assert cuts.ended() == []
        return EndedCut(**values)

    monkeypatch.setattr("bagpipe.train.cuts.EndedCut", written)
    taken = SimpleNamespace(
        started=0.0, moment=SimpleNamespace(step=3), writer=SimpleNamespace(path=run.path)
    )
    cuts._note(cast(Any, taken))
    assert [ended.step for ended in cuts.ended()] == [3]


def test_a_start_that_is_refused_for_an_earlier_runs_checkpoints_ends_no_run(
    tmp_path: Path,
) -> None:
    with servers_of(small_config(tmp_path), 1) as addresses:
        config = over(addresses, tmp_path, train={"steps": 3})
        train(config, reporter=SilentReporter())
        with pytest.raises(ConfigError, match="holds checkpoints of an earlier run"):
            train(config, reporter=SilentReporter())
    assert RunFolder(path=tmp_path, epoch=1).cuts.is_dir()
