"""The supervisor of a run on Ray, without Ray: what it asks for, and what it says at the end."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest
from tests.cli.test_cli import RUN, invoke
from tests.launch.fake_ray import TOLD, GetTimeoutError, RayError, use_fake_ray
from typer.testing import Result

from bagpipe.server.told import ToldServer


def trained(folder: Path, *arguments: object) -> Result:
    file = folder / "run.toml"
    file.write_text(RUN.format(folder=folder))
    return invoke("train", file, "--engine", "ray", "--trainers", 2, *arguments)


def die() -> None:
    raise RayError("it was killed")


def told_while_a_signal_comes() -> ToldServer:
    signal.raise_signal(signal.SIGTERM)
    return TOLD


def test_a_run_whose_every_start_fails_is_given_up_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = use_fake_ray(monkeypatch, run=die)
    result = trained(tmp_path)
    assert result.exit_code == 2
    assert [kind for kind, _ in ray.started].count("TrainerActor") == 2 * 5
    assert result.stderr.startswith(
        "error: given up after 5 starts without a step: rank 0 has ended (it was killed): mend "
        "the cause"
    )
    assert result.stderr.endswith("go on from the newest checkpoint with --resume\n")


def test_an_actor_that_dies_after_a_signal_is_told_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_fake_ray(monkeypatch, run=die, told=told_while_a_signal_comes)
    result = trained(tmp_path)
    assert result.exit_code == 2
    assert result.stderr == (
        "error: SIGTERM came, and then rank 0 has ended (it was killed): the last steps may be in "
        "no checkpoint: go on from the newest checkpoint with --resume\n"
    )


def never() -> None:
    raise GetTimeoutError


@pytest.mark.parametrize(
    ("arguments", "limit"), [((), "30 s"), (("--life-timeout", "7.5"), "7.5 s")]
)
def test_how_long_a_sign_of_life_may_be_owed_is_an_option(
    arguments: tuple[str, ...], limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = use_fake_ray(monkeypatch, look=never, are_done=False)
    result = trained(tmp_path, *arguments)
    assert result.exit_code == 2
    assert f"rank 0 has given no sign of life for {limit}: " in result.stderr
    assert float(limit.split()[0]) in ray.timeouts


@pytest.mark.parametrize("limit", ["0.5", "nan", "1e9"])
def test_a_limit_for_signs_of_life_must_make_sense(limit: str, tmp_path: Path) -> None:
    result = trained(tmp_path, "--life-timeout", limit)
    assert result.exit_code == 2
    assert f"--life-timeout {float(limit):g}: must be from 1 to 86,400 s" in result.stderr


@pytest.mark.parametrize(("is_own", "host"), [(True, "127.0.0.1"), (False, None)])
def test_servers_keep_to_loopback_only_on_a_cluster_that_no_node_can_join(
    is_own: bool, host: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = use_fake_ray(monkeypatch, run=die, is_own=is_own)  # of one node
    trained(tmp_path)
    listened = [arguments[2] for kind, arguments in ray.started if kind == "ServerActor"]
    assert listened == [host]  # None: its node's own address


@pytest.mark.parametrize("own", [None, "INFO"])
def test_torch_tells_of_no_death_with_its_stack_unless_a_user_wants_it(
    own: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_fake_ray(monkeypatch, run=die)
    monkeypatch.delenv("TORCH_CPP_LOG_LEVEL")
    if own is not None:
        monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", own)
    trained(tmp_path)
    assert os.environ["TORCH_CPP_LOG_LEVEL"] == (own or "ERROR")  # which actors inherit


@pytest.mark.parametrize("way", ["left", "variable", "option"])
def test_a_cluster_that_is_gone_is_told_at_once(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray itself would try for minutes."""
    ray, gone = use_fake_ray(monkeypatch, run=die), "127.0.0.1:1"
    if way == "left":
        ray.left_address = gone
    if way == "variable":
        monkeypatch.setenv("RAY_ADDRESS", gone)
    result = trained(tmp_path, *(("--address", gone) if way == "option" else ()))
    assert result.exit_code == 2
    remedy = {
        "left": "It was left behind by a cluster that has been killed: forget it with `ray stop`, "
        "or start a cluster on this machine with --address local",
    }.get(way, "See that its head runs, and that --address or RAY_ADDRESS names it")
    assert result.stderr == (
        f"error: Ray at {gone}: no cluster answers there (Connection refused). {remedy}\n"
    )
    assert ray.started == []
    trained(tmp_path, "--address", "local")  # what is left does not matter there
    assert ray.started


def test_a_cluster_that_runs_is_joined_whatever_another_one_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only with "auto": Ray itself looks for no such cluster without an address."""
    ray = use_fake_ray(monkeypatch, run=die)
    ray.left_address = "127.0.0.1:1"
    with socket.create_server(("127.0.0.1", 0)) as head:
        ray.running_address = f"127.0.0.1:{head.getsockname()[1]}"
        trained(tmp_path, "--address", "auto")
        assert ray.started
        assert "no cluster answers there" in trained(tmp_path).stderr


def test_that_no_cluster_is_found_is_told_by_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = use_fake_ray(monkeypatch, run=die)
    trained(tmp_path, "--address", "auto")
    assert ray.started  # this one does not mind
