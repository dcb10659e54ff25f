"""`bagpipe serve`: what it prints, when it ends, whom and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.flight as flight
import pytest
from pydantic import SecretStr
from tests.server.certificates import TOKEN, Files
from tests.soon import SOON_S

from bagpipe.config.servers import split_address
from bagpipe.server.credentials import Credentials
from bagpipe.server.security import connect

WITHIN_S = SOON_S
RUN = """
[data]
kind = "synthetic"
num_embeddings = [40, 300, 90]
[embeddings]
embedding_dim = 4
[model]
bottom = [4]
top = [1]
[log]
folder = "{folder}/run"
[servers]
num_shards = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(RUN.format(folder=tmp_path))
    return path


def command(file: Path, *options: object, shard: int = 1) -> list[str]:
    words = [sys.executable, "-m", "bagpipe", "serve", file, "--shard", shard, *options]
    return [str(word) for word in words]


@contextmanager
def serving(
    file: Path, *options: object, shard: int = 1
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server that listens, and its address; it is ended if the test has not ended it."""
    environment = {**os.environ, "BAGPIPE_TEST_TOKEN": TOKEN}
    with subprocess.Popen(
        command(file, *options, shard=shard),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            yield process, line.removesuffix("\n")
        finally:
            process.kill()


def is_there(address: str, credentials: Credentials | None = None) -> bool:
    """Whether a server answers, which serves no such list."""
    options = flight.FlightCallOptions(timeout=WITHIN_S)
    with (
        connect(*split_address(address), credentials or Credentials()) as client,
        pytest.raises(flight.FlightUnauthorizedError, match="not served"),
    ):
        list(client.list_flights(options=options))
    return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_prints_its_address_and_ends_on_a_signal(
    file: Path, tmp_path: Path, number: signal.Signals
) -> None:
    address_file = tmp_path / "address"
    options = ("--address-file", address_file, "--metrics", "127.0.0.1:0")
    with serving(file, *options) as (process, address):
        assert address_file.read_text() == f"{address}\n"
        assert address.startswith("127.0.0.1:")
        assert is_there(address)
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        assert "pyarrow" in maps
        assert "torch" not in maps
        assert process.stderr is not None
        told = process.stderr.readline()
        with urllib.request.urlopen(
            f"http://{told.split()[-1]}/health", timeout=WITHIN_S
        ) as answer:
            health = json.load(answer)
        assert (health["shard"], health["num_shards"], health["epoch"]) == (1, 3, None)
        process.send_signal(number)
        out, err = process.communicate(timeout=WITHIN_S)
    assert (process.returncode, out) == (0, "")
    assert f"ends: {number.name}" in err


def test_a_client_that_stays_does_not_keep_it(file: Path) -> None:
    with serving(file) as (process, address), connect(*split_address(address), Credentials()) as c:
        stream = c.do_exchange(flight.FlightDescriptor.for_command(b"fetch"))
        process.terminate()
        assert process.wait(WITHIN_S) == 0
        del stream


def test_it_ends_with_the_process_that_it_lives_with(file: Path) -> None:
    with (
        subprocess.Popen(["sleep", "900"]) as other,
        serving(file, "--lives-with", other.pid) as (process, _),
    ):
        assert process.poll() is None
        other.kill()
        other.wait()
        _, err = process.communicate(timeout=WITHIN_S)
        assert process.returncode == 0
        assert f"ends: process {other.pid}, with which this one lives, is gone" in err


def test_with_tls_and_a_token_others_may_reach_it(file: Path, tmp_path: Path) -> None:
    files = Files(tmp_path / "certificates")
    chain, key = files.issue("host", "localhost")
    with file.open("a") as text:
        text.write(f'token_variable = "BAGPIPE_TEST_TOKEN"\n[servers.tls]\nroot = "{files.root}"\n')
        text.write(f'certificate = "{chain}"\nkey = "{key}"\n')
    with serving(file, "--listen", "0.0.0.0:0", "--metrics", "0.0.0.0:0") as (process, address):
        port = split_address(address)[1]
        known = Credentials(token=SecretStr(TOKEN), root=files.root.read_bytes())
        assert is_there(f"localhost:{port}", known)
        stranger = Credentials(root=known.root)
        with connect("localhost", port, stranger) as client:
            options = flight.FlightCallOptions(timeout=WITHIN_S)
            with pytest.raises(flight.FlightUnauthenticatedError):
                list(client.do_action("health", options))
        assert TOKEN not in Path(f"/proc/{process.pid}/cmdline").read_text()
        process.terminate()
        _, err = process.communicate(timeout=WITHIN_S)
    assert TOKEN not in err


@pytest.mark.parametrize(
    ("options", "shard", "fact"),
    [
        ((), 3, "--shard 3: servers.num_shards or the addresses make 3 shards"),
        (("--listen", "localhost"), 1, "--listen: 'localhost' is no address"),
        (("--address-file", "/nowhere/address"), 1, "/nowhere/address"),
    ],
)
def test_a_mistake_is_told(file: Path, options: tuple[object, ...], shard: int, fact: str) -> None:
    ended = subprocess.run(
        command(file, *options, shard=shard),
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert fact in " ".join(ended.stderr.split())
    assert "Traceback" not in ended.stderr
