"""Runs whose tables are with shard servers train the same model as those in memory, to the bit."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.soon import wait_until
from tests.train.ranks import run_ranks
from tests.train.runs import Listener, newest_files, small_config

from bagpipe.checkpoint.checkpoints import open_checkpoint
from bagpipe.checkpoint.files import CheckpointWriter, list_checkpoints
from bagpipe.config.run import RunConfig
from bagpipe.distributed.communicator import Communicator
from bagpipe.errors import BagpipeError, ConfigError
from bagpipe.server.shard import Shard
from bagpipe.server.start import running_shard, served_of
from bagpipe.server.told import ToldServer, told_server
from bagpipe.store.record_files import read_records
from bagpipe.train.report import SilentReporter
from bagpipe.train.settings import check_same_run, describe_start
from bagpipe.train.trainer import train


@contextmanager
def servers_of(config: RunConfig, num_shards: int) -> Iterator[list[str]]:
    """Servers in this process; yields their addresses."""
    wanted = config.model_copy(update={"servers": None})
    settings = wanted.model_dump() | {"servers": {"num_shards": num_shards}}
    with ExitStack() as stack:
        yield [
            stack.enter_context(running_shard(RunConfig.model_validate(settings), number)).address
            for number in range(num_shards)
        ]


def over(addresses: Sequence[str], folder: Path, **sections: dict[str, Any]) -> RunConfig:
    return small_config(folder, servers={"addresses": list(addresses)}, **sections)


def dense_of(folder: Path) -> str:
    return newest_files(folder)["dense.pt"]


def tables_of(folder: Path) -> list[dict[int, bytes]]:
    """By group the records of the newest checkpoint, whichever files they are in."""
    saved = open_checkpoint(list_checkpoints(folder / "checkpoints")[-1])
    tables: list[dict[int, bytes]] = []
    for files, group in zip(saved.record_files, saved.groups, strict=True):
        records: dict[int, bytes] = {}
        for file in files:
            for rows, values in read_records(saved.path / file.name, group["record_width"]):
                records |= {
                    int(row): np.array(value).tobytes()
                    for row, value in zip(rows, values, strict=True)
                }
        tables.append(records)
    return tables


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    train(small_config(folder), reporter=SilentReporter())
    return folder


def assert_same(folder: Path, expected: Path) -> None:
    assert dense_of(folder) == dense_of(expected)
    assert tables_of(folder) == tables_of(expected)


@pytest.mark.parametrize("num_shards", [1, 3])
def test_one_trainer_trains_the_same_model(
    tmp_path: Path, undisturbed: Path, num_shards: int
) -> None:
    config = small_config(tmp_path)
    with servers_of(config, num_shards) as addresses:
        result = train(over(addresses, tmp_path), reporter=SilentReporter())
    assert_same(tmp_path, undisturbed)
    assert result.scores is not None


def test_a_launchers_servers_need_no_files_of_secrets(tmp_path: Path, undisturbed: Path) -> None:
    config = small_config(tmp_path, servers={"num_shards": 2})
    assert config.servers is not None
    with ExitStack() as stack:
        told = [
            stack.enter_context(told_server(served_of(config), number, listen=("0.0.0.0", 0)))
            for number in range(2)
        ]
        assert all(each.token and each.root for each in told)
        assert all(each.token not in repr(each) for each in told)
        servers = [
            ToldServer(**json.loads(json.dumps(asdict(each)))).started(config.servers)
            for each in told
        ]
        train(config, reporter=SilentReporter(), servers=servers)
    assert_same(tmp_path, undisturbed)


def test_checkpoints_are_written_while_training_goes_on_and_a_run_resumes(
    tmp_path: Path, undisturbed: Path
) -> None:
    config, listener = small_config(tmp_path), Listener()
    with servers_of(config, 2) as addresses:
        first = over(addresses, tmp_path, checkpoint={"every_steps": 5}, train={"steps": 12})
        train(first, reporter=listener)
        train(over(addresses, tmp_path), reporter=listener, resume=True)
    assert_same(tmp_path, undisturbed)
    assert any("resumed from step 12" in text for text in listener.said)


def test_a_cut_that_is_not_put_in_place_is_abandoned_and_the_next_has_its_rows(
    tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    abandoned: list[tuple[int, int]] = []
    puts = iter([False])  # whether the next one succeeds; then all do
    abandon, put_in_place = Shard.abandon, CheckpointWriter._put_in_place

    def note(shard: Shard, epoch: int, number: int) -> None:
        abandoned.append((shard.number, number))
        abandon(shard, epoch, number)

    def put(writer: CheckpointWriter) -> None:
        if not next(puts, True):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        put_in_place(writer)

    monkeypatch.setattr(Shard, "abandon", note)
    monkeypatch.setattr(CheckpointWriter, "_put_in_place", put)

    class Waits(Listener):
        def say(self, text: str) -> None:
            super().say(text)
            if "No space left on device" in text:
                wait_until(lambda: sorted(abandoned) == [(0, 1), (1, 1)])

    config, listener = small_config(tmp_path), Waits()
    with servers_of(config, 2) as addresses:
        train(over(addresses, tmp_path, checkpoint={"every_steps": 5}), reporter=listener)
    assert any("No space left on device" in text for text in listener.said)
    assert_same(tmp_path, undisturbed)


def test_a_checkpoint_that_a_user_removes_is_not_missed_by_the_next_ones(
    tmp_path: Path, undisturbed: Path
) -> None:
    class Removes(Listener):
        def advance(self, step: int) -> None:
            if step == 17:
                for path in list_checkpoints(tmp_path / "checkpoints"):
                    shutil.rmtree(path)

    listener = Removes()
    with servers_of(small_config(tmp_path), 2) as addresses:
        train(over(addresses, tmp_path, train={"steps": 12}), reporter=listener)
        train(
            over(addresses, tmp_path, checkpoint={"every_steps": 6}),
            reporter=listener,
            resume=True,
        )
    assert_same(tmp_path, undisturbed)
    assert not any("no checkpoint, the run" in text for text in listener.said)


def test_other_servers_go_on_from_a_checkpoint(tmp_path: Path, undisturbed: Path) -> None:
    config = small_config(tmp_path)
    with servers_of(config, 2) as addresses:
        train(over(addresses, tmp_path, train={"steps": 12}), reporter=SilentReporter())
    with servers_of(config, 3) as addresses:
        train(
            over(addresses, tmp_path, train={"steps": 17}), reporter=SilentReporter(), resume=True
        )
    train(small_config(tmp_path), reporter=SilentReporter(), resume=True)  # without any
    assert_same(tmp_path, undisturbed)


def test_servers_take_over_a_run_that_had_none(tmp_path: Path, undisturbed: Path) -> None:
    train(small_config(tmp_path, train={"steps": 12}), reporter=SilentReporter())
    with servers_of(small_config(tmp_path), 2) as addresses:
        train(over(addresses, tmp_path), reporter=SilentReporter(), resume=True)
    assert_same(tmp_path, undisturbed)


def test_servers_that_hold_another_runs_tables_are_refused(tmp_path: Path) -> None:
    config = small_config(tmp_path / "one")
    with servers_of(config, 1) as addresses:
        train(over(addresses, tmp_path / "one", train={"steps": 3}), reporter=SilentReporter())
        with pytest.raises(BagpipeError, match="run"):
            train(over(addresses, tmp_path / "two"), reporter=SilentReporter())


def test_servers_may_see_the_runs_folder_elsewhere(
    tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere").symlink_to(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    own = Path("run")
    with servers_of(small_config(tmp_path / "elsewhere"), 2) as addresses:
        for steps in (12, 24):
            train(
                over(addresses, own, train={"steps": steps}), reporter=SilentReporter(), resume=True
            )
    assert_same(own, undisturbed)


def test_ranks_must_speak_to_the_same_servers_and_have_own_secrets(tmp_path: Path) -> None:
    def work(communicator: Communicator) -> None:
        def check(**servers: object) -> None:
            check_same_run(communicator, describe_start(small_config(tmp_path, servers=servers)))

        rank = communicator.rank
        check(token_file=f"/host-{rank}/token", timeout_s=9)
        for name, value in (("addresses", [f"a:{rank + 1}"]), ("timeout_s", rank + 1.0)):
            with pytest.raises(
                ConfigError, match=rf"servers\.{name} is .* on rank 0 and .* rank 1"
            ):
                check(**{name: value})

    run_ranks(2, work)
