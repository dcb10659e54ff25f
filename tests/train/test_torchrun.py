"""Whole runs of several processes, started by torchrun as a user would."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.processes import children_of, is_alive, of_process
from tests.soon import SOON_S, TIMEOUT_S, ends_soon, wait_until
from typer.testing import CliRunner

from bagpipe.checkpoint.files import list_checkpoints
from bagpipe.cli.app import app
from bagpipe.store.manifest import read_manifest, record_files
from bagpipe.store.record_files import read_records

RUN = """
[data]
kind = "synthetic"
num_samples = {num_samples}
num_validation_samples = 1000
num_embeddings = [3000, 500, 40]
num_dense = 3

[embeddings]
embedding_dim = 4
optimizer = {{ kind = "adagrad", lr = 0.05 }}

[model]
kind = "dlrm"
bottom = [8, 4]
top = [8, 1]

[cache]
size = "20%"
lookahead = 5

[train]
batch_size = 100
steps = {steps}

[checkpoint]
keep = 1

[log]
folder = "{folder}"
every_steps = 5
tensorboard = false
"""


_started: list[subprocess.Popen[str]] = []


def command(num_trainers: int, file: Path, *options: str) -> list[str]:
    train = ["-m", "bagpipe", "train", str(file), *options]
    if num_trainers == 1:
        return [sys.executable, *train]
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={num_trainers}",
        *train,
    ]


def start(num_trainers: int, file: Path, *options: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command(num_trainers, file, *options),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    _started.append(process)
    return process


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """A test that fails leaves no run behind, which would train on beside other tests."""
    yield
    while _started:
        process = _started.pop()
        if process.poll() is None:
            process.terminate()  # or its trainers would go on without it
            process.communicate(timeout=SOON_S)


def train(num_trainers: int, file: Path, *options: str) -> str:
    process = start(num_trainers, file, *options)
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, output
    return output


def write_run(folder: Path, *, steps: int = 30, num_samples: int = 2903) -> Path:
    """2,903 samples are 29 batches of 100 and one of 3: of two shares of it one is twice the
    other, and of four one is empty.
    """
    file = folder / "run.toml"
    file.write_text(RUN.format(folder=folder / "run", steps=steps, num_samples=num_samples))
    return file


def records_of(folder: Path, number: int = -1) -> tuple[int, np.ndarray, np.ndarray]:
    """Step, rows and records of a checkpoint's first group, whatever files they are in; of the
    newest checkpoint by default.
    """
    checkpoint = list_checkpoints(folder / "run" / "checkpoints")[number]
    manifest = read_manifest(checkpoint)
    records: dict[int, np.ndarray] = {}
    for file in record_files(manifest)[0]:
        for rows, of_rows in read_records(
            checkpoint / file.name, manifest["groups"][0]["record_width"]
        ):
            records |= zip(rows.tolist(), of_rows, strict=True)
    ordered = sorted(records)
    return manifest["step"], np.array(ordered), np.array([records[row] for row in ordered])


def log_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "run" / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def train_here(file: Path, *options: str) -> None:
    """One trainer, in this process."""
    result = CliRunner().invoke(app, ["train", str(file), *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output


@pytest.mark.soak
def test_a_cache_too_small_for_a_later_batch_loses_nothing(tmp_path: Path) -> None:
    file = write_run(tmp_path)
    process = start(2, file, "--set", "cache.size=69")
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode != 0
    told = " ".join(output.split())
    saved = re.search(r"(\d+) steps are saved in", told)
    enough = re.search(r"give the cache of each of the 2 trainers at least (\d+) rows", told)
    assert saved is not None, output
    assert enough is not None, output
    assert 0 < records_of(tmp_path)[0] == int(saved[1]) < 30
    train(2, file, "--resume", "--set", f"cache.size={enough[1]}")
    assert records_of(tmp_path)[0] == 30


def wait_until_it_trains(log: Path, processes: Sequence[subprocess.Popen[str]]) -> None:
    def has_begun() -> bool:
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        return log.exists() and '"kind": "train"' in log.read_text()

    wait_until(has_begun)


def running(folder: Path, *options: str) -> tuple[subprocess.Popen[str], list[int], int]:
    """A run of two ranks that has trained some steps, its ranks in their order, and the oracle
    process.
    """
    process = start(2, write_run(folder, steps=100_000), *options)
    log = folder / "run" / "log.jsonl"
    wait_until_it_trains(log, [process])
    ranks = children_of(process.pid)
    assert len(ranks) == 2
    by_rank = sorted(ranks, key=rank_of)
    oracles = [
        child
        for rank in by_rank
        for child in children_of(rank)
        if "spawn_main" in of_process(child, "cmdline")
    ]
    assert len(oracles) == ("cache.oracle=thread" not in options)
    return process, by_rank, oracles[0] if oracles else 0


@pytest.mark.parametrize(
    "victim",
    [
        "rank 1",
        pytest.param("rank 0", marks=pytest.mark.soak),
        pytest.param("oracle", marks=pytest.mark.soak),
    ],
)
def test_whoever_is_killed_the_run_ends_within_seconds_says_why_and_leaves_no_orphan(
    victim: str, tmp_path: Path
) -> None:
    process, ranks, oracle = running(tmp_path)
    killed = {"rank 0": ranks[0], "rank 1": ranks[1], "oracle": oracle}[victim]
    os.kill(killed, signal.SIGKILL)
    with ends_soon():  # the ranks wait 5 minutes for each other
        output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode != 0
    if victim == "oracle":
        assert (
            "ended by itself (exit code -9" in output
            or "first rank started, ended by itself" in output
        ), output
    else:
        assert named_by_torchrun(killed, output), output
    # the oracle process takes 5 s, where its reader does not return
    wait_until(lambda: not any(map(is_alive, (*ranks, oracle))))


@pytest.mark.parametrize("receiver", ["rank 1", pytest.param("torchrun", marks=pytest.mark.soak)])
def test_two_processes_train_as_one_until_a_signal_ends_both_and_one_goes_on_alone(
    receiver: str, tmp_path: Path
) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    for folder in (alone, together):
        folder.mkdir()
    train_here(write_run(alone))
    process, ranks, _ = running(
        together,
        *("--set", "train.eval_every_steps=30"),
        *("--set", "checkpoint.every_steps=30", "--set", "checkpoint.keep=1_000_000"),
    )
    checkpoints = together / "run" / "checkpoints"
    wait_until(lambda: process.poll() is not None or list_checkpoints(checkpoints))
    os.kill(ranks[1] if receiver == "rank 1" else process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode != 0
    # all ended after the same step
    (end,) = log_of(together, "end")
    assert records_of(together)[0] == end["step"] < 100_000
    if receiver == "torchrun":  # which else ends rank 0 as soon as rank 1 has ended
        assert f"stopped by SIGTERM after step {end['step']}; checkpoint: " in " ".join(
            output.split()
        ), output
    losses = [record["loss"] for record in log_of(alone, "train")]
    assert [record["loss"] for record in log_of(together, "train")][: len(losses)] == pytest.approx(
        losses, rel=1e-4
    )
    step, rows, records = records_of(alone)
    first_step, first_rows, first_records = records_of(together, 0)
    assert first_step == step == 30
    np.testing.assert_array_equal(first_rows, rows)
    np.testing.assert_allclose(first_records, records, rtol=1e-3, atol=1e-5)
    assert log_of(together, "evaluation")[0]["auc"] == pytest.approx(
        log_of(alone, "evaluation")[-1]["auc"], abs=1e-3
    )
    train_here(write_run(together, steps=end["step"] + 5), "--resume")
    assert records_of(together)[0] == end["step"] + 5


@pytest.mark.soak
def test_a_killed_rank_ends_the_other_where_each_plans_for_itself(tmp_path: Path) -> None:
    process, ranks, _ = running(tmp_path, "--set", "cache.oracle=thread")
    os.kill(ranks[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode != 0
    assert named_by_torchrun(ranks[1], output), output
    assert not any(map(is_alive, ranks))


def named_by_torchrun(pid: int, output: str) -> bool:
    """Whether torchrun names a killed rank: it may end the others before one of them has written
    its own sentence.
    """
    return re.search(rf"exitcode\s*: -9 \(pid: {pid}\)", output) is not None


def rank_of(pid: int) -> int:
    """From a trainer's environment."""
    variables = dict(each.split("=", 1) for each in of_process(pid, "environ").split("\0") if each)
    return int(variables["RANK"])


def free_port() -> int:
    """Below those that the system gives out, so that nobody gets it before torchrun listens."""
    for port in range(20_000 + os.getpid() % 10_000, 32_000):
        with socket.socket() as tried, suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def start_hosts(nums_on_host: Sequence[int], file: Path) -> list[subprocess.Popen[str]]:
    """torchrun as on so many hosts, all of them this one, with so many trainers each."""
    port = free_port()
    place = [
        f"--nnodes={len(nums_on_host)}",
        "--master-addr=127.0.0.1",
        f"--master-port={port}",
    ]
    hosts = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                *place,
                f"--nproc-per-node={num_on_host}",
                f"--node-rank={host}",
                "-m",
                "bagpipe",
                "train",
                str(file),
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for host, num_on_host in enumerate(nums_on_host)
    ]
    _started.extend(hosts)
    return hosts


def outputs_of(processes: list[subprocess.Popen[str]]) -> list[str]:
    """What they have written once all have ended; read side by side, for a full pipe would stop its
    writer.
    """
    with ThreadPoolExecutor() as pool:
        return [
            output
            for output, _ in pool.map(
                lambda process: process.communicate(timeout=TIMEOUT_S), processes
            )
        ]


@pytest.mark.soak
def test_two_uneven_hosts_train_as_one_trainer_does_and_any_number_goes_on(tmp_path: Path) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    for folder in (alone, together):
        folder.mkdir()
    train(1, write_run(alone))
    hosts = start_hosts([1, 2], write_run(together))
    outputs = outputs_of(hosts)
    assert [host.returncode for host in hosts] == [0, 0], outputs
    losses = [record["loss"] for record in log_of(alone, "train")]
    assert [record["loss"] for record in log_of(together, "train")] == pytest.approx(
        losses, rel=1e-4
    )
    _, rows, records = records_of(alone)
    _, found_rows, found = records_of(together)
    np.testing.assert_array_equal(found_rows, rows)
    np.testing.assert_allclose(found, records, rtol=1e-3, atol=1e-5)
    assert log_of(together, "evaluation")[-1]["auc"] == pytest.approx(
        log_of(alone, "evaluation")[-1]["auc"], abs=1e-3
    )
    train(1, write_run(alone, steps=35), "--resume")
    train(2, write_run(together, steps=35), "--resume")
    np.testing.assert_allclose(records_of(together)[2], records_of(alone)[2], rtol=1e-3, atol=1e-5)


@pytest.mark.soak
def test_a_rank_that_is_killed_ends_the_other_host_too(tmp_path: Path) -> None:
    hosts = start_hosts([1, 1], write_run(tmp_path, steps=100_000))
    log = tmp_path / "run" / "log.jsonl"
    wait_until_it_trains(log, hosts)
    ranks = [child for host in hosts for child in children_of(host.pid)]
    oracles = [
        child
        for rank in ranks
        for child in children_of(rank)
        if "spawn_main" in of_process(child, "cmdline")
    ]
    assert (len(ranks), len(oracles)) == (2, 2)
    os.kill(ranks[1], signal.SIGKILL)
    with ends_soon():
        outputs = outputs_of(hosts)
    assert all(host.returncode != 0 for host in hosts)
    assert named_by_torchrun(ranks[1], outputs[1]), outputs[1]
    assert "another of the 2 trainers may be gone" in " ".join(outputs[0].split()), outputs[0]
    wait_until(lambda: not any(map(is_alive, (*ranks, *oracles))))
