"""A run on Ray goes on when its actors are killed or stopped, and ends with the same bits."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.launch.fake_ray import keep_environment
from tests.processes import of_process
from tests.train.runs import Listener, small_config
from tests.train.test_servers import assert_same

from bagpipe.checkpoint.files import list_checkpoints
from bagpipe.config.run import RunConfig
from bagpipe.errors import ConfigError
from bagpipe.launch.ray import Roles, train_on_ray

NUM_STEPS = 300


def config_of(folder: Path) -> RunConfig:
    return small_config(
        folder,
        train={"steps": NUM_STEPS},
        checkpoint={"every_steps": 30},
        cache={"size": 120, "lookahead": 5, "oracle": "thread"},
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("ray")
    folder = tmp_path_factory.mktemp("undisturbed")
    roles = Roles(num_trainers=2, num_servers=2)
    train_on_ray(config_of(folder), roles, reporter=Listener(), address="local")
    return folder


def actors(name: str) -> list[int]:
    """The processes of this machine's actors of that name."""
    found = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    return sorted(pid for pid in found if of_process(pid, "cmdline").startswith(f"ray::{name}"))


def once_saved(folder: Path, do: Callable[[], object]) -> None:
    """Does it in the middle of the run."""
    deadline = time.monotonic() + 100
    while len(list_checkpoints(folder / "checkpoints")) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    do()


@pytest.mark.parametrize(
    ("actor", "number", "told"),
    [
        ("TrainerActor", signal.SIGKILL, "rank . (is gone|has ended)"),
        ("ServerActor", signal.SIGKILL, "server . is gone|has ended"),
        ("TrainerActor", signal.SIGSTOP, "rank . has given no sign of life for 5 s"),
    ],
)
def test_whoever_is_gone_the_run_ends_as_undisturbed(
    tmp_path: Path, undisturbed: Path, actor: str, number: signal.Signals, told: str
) -> None:
    listener = Listener()
    killing = threading.Thread(
        target=once_saved, args=(tmp_path, lambda: os.kill(actors(actor)[-1], number))
    )
    killing.start()
    roles = Roles(num_trainers=2, num_servers=2, life_timeout_s=5.0)
    result = train_on_ray(config_of(tmp_path), roles, reporter=listener, address="local")
    killing.join()
    assert result.step == NUM_STEPS
    assert_same(tmp_path, undisturbed)
    said = " ".join(listener.said)
    assert re.search(told, said), said
    assert "all trainers start again" in said
    assert "resumed from step" in said
    deadline = time.monotonic() + 20
    while (left := actors("TrainerActor") + actors("ServerActor")) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []


def test_without_ray_one_sentence_says_how_to_install_it(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "from tests.launch.test_ray import *\n"
        "try:\n"
        f"    train_on_ray(config_of(Path({str(tmp_path)!r})),\n"
        "        Roles(num_trainers=1, num_servers=1), reporter=Listener())\n"
        "except ConfigError as error:\n"
        "    sys.stdout.write(str(error))\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100
    )
    assert "pip install 'bagpipe-recsys[ray]'" in ended.stdout
    assert ConfigError.__name__ not in ended.stderr


@pytest.mark.parametrize(
    ("mode", "told"),
    [("", "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"), ("token", "may have another token")],
)
def test_a_cluster_that_lets_nobody_in_may_want_a_token(
    mode: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: object) -> None:
        raise ConnectionError("Failed to connect")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init))
    keep_environment(monkeypatch)
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"Ray at {address}: Failed to connect.*{told}"):
            train_on_ray(
                config_of(tmp_path),
                Roles(num_trainers=2, num_servers=1),
                reporter=Listener(),
                address=address,
            )
