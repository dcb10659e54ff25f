"""Servers that are given by address are killed and stopped, a trainer is stopped and replaced: the
run ends in the parameters of one that nothing happened to.

Every role is a process, forked from a server that has imported everything, so that it takes
seconds. `tests/train/kills.py` does the like under torchrun, and tests/model simulates the rest.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from tests.soon import SOON_S, TIMEOUT_S, wait_until
from tests.train.runs import small_config
from tests.train.test_servers import assert_same

from bagpipe.checkpoint.files import list_checkpoints, step_of
from bagpipe.config.run import RunConfig
from bagpipe.train.report import SilentReporter
from bagpipe.train.trainer import train

NUM_SHARDS = 2
NUM_STEPS = 50
SERVERS = ("server 0", "server 1")


def config_of(folder: Path, **servers: Any) -> RunConfig:
    return small_config(
        folder,
        train={"steps": NUM_STEPS},
        checkpoint={"every_steps": 2, "keep": 2},
        servers={"num_shards": NUM_SHARDS, **servers},
    )


def wait_for_progress(folder: Path, moments: random.Random) -> None:
    """Until there are a few more checkpoints, and then some time, so that a kill falls anywhere."""
    checkpoints = folder / "checkpoints"
    wanted = newest_step(checkpoints) + 2 * moments.randint(1, 5)
    wait_until(lambda: newest_step(checkpoints) >= wanted)
    time.sleep(moments.uniform(0.0, 0.05))


def newest_step(checkpoints: Path) -> int:
    return max(map(step_of, list_checkpoints(checkpoints)), default=0)


def serve(folder: str, number: int, parent: Connection) -> None:
    """A shard server, until it is killed."""
    from bagpipe.server.start import running_shard

    with running_shard(config_of(Path(folder)), number) as running:
        parent.send(running.address)
        signal.pause()


def go_on(folder: str, addresses: list[str], timeout_s: float) -> None:
    """A trainer; it ends with an error when a server is gone, or stopped for so long."""
    config = config_of(Path(folder), addresses=addresses, timeout_s=timeout_s)
    train(config, reporter=SilentReporter(), resume=True)


class Cluster:
    """Two servers, and a trainer at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["bagpipe.train.trainer", "tests.train.runs"])
        self.processes: dict[str, BaseProcess] = {}
        self._addresses = [""] * NUM_SHARDS

    def start_servers(self) -> None:
        """Those that are gone."""
        for number, name in enumerate(SERVERS):
            if name not in self.processes:
                mine, its = self._context.Pipe()
                self._start(name, serve, self._folder, number, its)
                assert mine.poll(SOON_S)
                self._addresses[number] = mine.recv()

    def start_trainer(self, *, timeout_s: float = TIMEOUT_S) -> None:
        self._start("trainer", go_on, self._folder, self._addresses, timeout_s)

    def end(self, name: str, *, kills: bool = True) -> int | None:
        """Waits until a process has ended, at once if it is killed first."""
        process = self.processes.pop(name)
        if kills:
            process.kill()
        process.join(TIMEOUT_S)
        assert process.exitcode is not None, f"{name} does not end"
        return process.exitcode

    def signal(self, name: str, number: int) -> None:
        pid = self.processes[name].pid
        assert pid is not None
        os.kill(pid, number)

    def _start(self, name: str, work: Any, *arguments: Any) -> None:
        process = self.processes[name] = self._context.Process(target=work, args=arguments)
        process.start()


@contextmanager
def running_cluster(folder: Path) -> Iterator[Cluster]:
    cluster = Cluster(folder)
    try:
        cluster.start_servers()
        yield cluster
    finally:
        for name in list(cluster.processes):
            cluster.end(name)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    train(small_config(folder, train={"steps": NUM_STEPS}), reporter=SilentReporter())
    return folder


def test_all_servers_are_killed_at_once(tmp_path: Path, undisturbed: Path) -> None:
    with running_cluster(tmp_path) as cluster:
        cluster.start_trainer()
        wait_for_progress(tmp_path, random.Random(0))
        for server in SERVERS:
            assert cluster.end(server) == -signal.SIGKILL  # it had not ended before
        assert cluster.end("trainer", kills=False) == 1
        cluster.start_servers()
        cluster.start_trainer()
        assert cluster.end("trainer", kills=False) == 0
    assert_same(tmp_path, undisturbed)


@pytest.mark.soak
def test_a_server_that_was_stopped_and_goes_on_serves_the_next_start(
    tmp_path: Path, undisturbed: Path
) -> None:
    with running_cluster(tmp_path) as cluster:
        cluster.start_trainer(timeout_s=2.0)
        wait_for_progress(tmp_path, random.Random(1))
        cluster.signal("server 0", signal.SIGSTOP)
        assert cluster.end("trainer", kills=False) == 1
        cluster.signal("server 0", signal.SIGCONT)
        cluster.start_trainer()
        assert cluster.end("trainer", kills=False) == 0
    assert_same(tmp_path, undisturbed)


def test_a_trainer_that_was_stopped_and_replaced_changes_nothing(
    tmp_path: Path, undisturbed: Path
) -> None:
    with running_cluster(tmp_path) as cluster:
        cluster.start_trainer()
        wait_for_progress(tmp_path, random.Random(2))
        cluster.signal("trainer", signal.SIGSTOP)
        cluster.processes["zombie"] = cluster.processes.pop("trainer")
        cluster.start_trainer()
        wait_for_progress(tmp_path, random.Random(3))
        cluster.signal("zombie", signal.SIGCONT)
        assert cluster.end("zombie", kills=False) == 1
        assert cluster.end("trainer", kills=False) == 0
    assert_same(tmp_path, undisturbed)
