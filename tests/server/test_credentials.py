"""Secrets are read only where nobody else can, and shown nowhere."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.server.certificates import TOKEN, Files

from bagpipe.config.servers import ServersConfig, TlsConfig
from bagpipe.errors import ConfigError
from bagpipe.server import credentials
from bagpipe.server.credentials import client_credentials, is_loopback, server_credentials
from bagpipe.server.security import GuardedServer


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    made = Files(tmp_path_factory.mktemp("certificates"))
    made.tls()
    return made


def refused(read: Callable[[], object]) -> str:
    with pytest.raises(ConfigError) as caught:
        read()
    return str(caught.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_a_server_that_others_reach_needs_tls_and_a_token(files: Files, host: str) -> None:
    told = refused(lambda: server_credentials(ServersConfig(), host))
    for fact in (host, "servers.tls.certificate", "servers.token_file", "listen on 127.0.0.1"):
        assert fact in told
    only_token = ServersConfig(token_file=files.token)
    told = refused(lambda: server_credentials(only_token, host))
    assert "servers.tls.key" in told
    assert "token_file" not in told
    only_root = ServersConfig(token_file=files.token, tls=files.tls(None))
    assert "servers.tls.key" in refused(lambda: server_credentials(only_root, host))
    only_tls = ServersConfig(tls=files.tls())
    told = refused(lambda: server_credentials(only_tls, host))
    assert "servers.token_file" in told
    assert "certificate" not in told
    found = server_credentials(files.config(), host)
    assert found.token is not None
    assert found.certificate is not None


def test_on_loopback_nothing_is_needed_and_what_is_given_is_used(files: Files) -> None:
    bare = server_credentials(ServersConfig(), "127.0.0.1")
    assert (bare.token, bare.root, bare.certificate) == (None, None, None)
    assert server_credentials(ServersConfig(token_file=files.token), "localhost").token is not None
    told = refused(lambda: server_credentials(ServersConfig(tls=files.tls(None)), "127.0.0.1"))
    assert "servers.tls.certificate" in told


def test_no_token_travels_to_another_host_without_tls(files: Files) -> None:
    far = ServersConfig(addresses=("127.0.0.1:7", "192.0.2.1:7"), token_file=files.token)
    told = refused(lambda: client_credentials(far))
    assert "192.0.2.1:7" in told
    assert "servers.tls.root" in told
    unknown = far.model_copy(update={"tls": files.tls(None), "token_file": None})
    assert "servers.token_file" in refused(lambda: client_credentials(unknown))
    near = ServersConfig(addresses=("127.0.0.1:7",), token_file=files.token)
    assert client_credentials(near).token is not None


def test_a_trainer_needs_a_certificate_only_where_servers_want_it(files: Files) -> None:
    assert client_credentials(files.config()).certificate is None
    assert client_credentials(files.config(mutual=True)).certificate is not None


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o660, 0o602, 0o604, 0o610, 0o777])
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_secret_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    files = Files(tmp_path)
    files.tls()
    key = files.folder / "both.key"
    for path in (files.token, key):
        path.chmod(mode)
        os.chown(path, 0, 0)
        if mode == 0o640:  # as a container's secrets are: root's, and its group's to read
            server_credentials(files.config(), "127.0.0.1")
            os.chown(path, 4321, 4321)
        told = refused(lambda: server_credentials(files.config(), "127.0.0.1"))
        assert str(path) in told
        assert "chmod 600" in told
        assert f"mode {mode:o}" in told
        os.chown(path, 0, 0)
        path.chmod(0o600)


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("", "has 0 characters"),
        ("short", "has 5 characters"),
        ("a" * 5000, "has 5,000 characters"),
        ("two words that are long", "has 23 characters"),
        ("naïve" * 10, "without spaces"),
        (b"\xff" * 40, "without spaces"),
        (b"x" * (2 << 20), "more than 1,048,576 bytes"),
    ],
)
def test_a_token_is_long_and_visible(tmp_path: Path, text: str | bytes, fact: str) -> None:
    path = Files(tmp_path).secret("bad", text)
    told = refused(lambda: client_credentials(ServersConfig(token_file=path)))
    assert fact in told
    assert f"servers.token_file = {str(path)!r}" in told
    assert not text or str(text)[:5] not in told.replace("servers", "")


def test_a_token_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ServersConfig(token_variable="BAGPIPE_TEST_TOKEN")
    assert "no such variable" in refused(lambda: client_credentials(config))
    monkeypatch.setenv("BAGPIPE_TEST_TOKEN", TOKEN + "\n")
    found = client_credentials(config)
    assert found.token is not None
    assert found.token.get_secret_value() == TOKEN
    monkeypatch.setenv("BAGPIPE_TEST_TOKEN", "hunter2")
    assert "hunter2" not in refused(lambda: client_credentials(config))


@pytest.mark.parametrize(
    ("make", "fact"),
    [
        (lambda path: None, "No such file"),
        (Path.mkdir, "Is a directory"),
        (os.mkfifo, "is no regular file"),
        (lambda path: path.write_text("no certificate"), "has no PEM certificate"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "has no PEM certificate"),
    ],
)
def test_a_root_that_is_none(tmp_path: Path, make: Callable[[Path], Any], fact: str) -> None:
    path = tmp_path / "other.pem"
    make(path)
    told = refused(lambda: client_credentials(ServersConfig(tls=TlsConfig(root=path))))
    assert fact in told
    assert f"servers.tls.root = {str(path)!r}" in told


@pytest.mark.parametrize("wrong", ["of another certificate", "with a password", "garbage"])
def test_a_key_that_does_not_fit(files: Files, tmp_path: Path, wrong: str) -> None:
    if wrong == "of another certificate":
        _, key = Files(tmp_path).issue("other", "localhost")
    else:
        begin, end = (f"-----{word} ENCRYPTED PRIVATE KEY-----" for word in ("BEGIN", "END"))
        text = "garbage" if wrong == "garbage" else f"{begin}\nMIIB\n{end}\n"
        key = Files(tmp_path).secret("other.key", text)
    tls = files.tls().model_copy(update={"key": key})
    config = ServersConfig(token_file=files.token, tls=tls)
    told = refused(lambda: server_credentials(config, "127.0.0.1"))
    assert str(key) in told
    assert "without a password" in told


def test_secrets_are_shown_nowhere(files: Files) -> None:
    found = server_credentials(files.config(), "127.0.0.1")
    assert found.certificate is not None
    key = found.certificate.key.get_secret_value().decode()
    with GuardedServer("127.0.0.1", 0, found) as server:
        for shown in (repr(found), str(found), f"{vars(server)}", repr(server)):
            assert TOKEN not in shown
            assert key.splitlines()[1] not in shown
    assert TOKEN not in Path("/proc/self/cmdline").read_text()
    with pytest.raises(TypeError):
        pickle.dumps(server)


def test_a_port_that_is_taken_is_told(files: Files) -> None:
    bare = credentials.Credentials()
    with GuardedServer("127.0.0.1", 0, bare) as server:
        told = refused(lambda: GuardedServer("127.0.0.1", server.port, bare))
        assert f"127.0.0.1, port {server.port}" in told
        assert "another server" in told
    assert "192.0.2.1" in refused(lambda: GuardedServer("192.0.2.1", 0, bare))


@pytest.mark.parametrize(
    ("host", "near"),
    [
        *(("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True)),
        *(("0.0.0.0", False), ("::", False), ("192.0.2.1", False), ("::ffff:192.0.2.1", False)),
    ],
)
def test_what_loopback_is(host: str, near: bool) -> None:
    assert is_loopback(host) == near


def test_a_host_that_nobody_knows() -> None:
    assert "'nowhere.invalid'" in refused(lambda: is_loopback("nowhere.invalid"))
