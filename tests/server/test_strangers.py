"""Strangers at a shard server are refused soon and learn nothing, at every endpoint."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.flight as flight
import pytest
from pydantic import SecretBytes, SecretStr
from tests.server.certificates import TOKEN, Files, has_ipv6
from tests.soon import SOON_S

from bagpipe.server.credentials import (
    Certificate,
    Credentials,
    client_credentials,
    server_credentials,
)
from bagpipe.server.logins import SCHEME, Logins, address_of
from bagpipe.server.security import GuardedServer, connect, reason

WITHIN_S = SOON_S
"""Seen: 0.1 s. A busy machine takes longer, and a server that waits for a stranger for ever."""
RECORDS = pa.record_batch({"row": [7, 8]})
SECRET = "rows 7 and 8 of table item"


class Probe(GuardedServer):
    """Serves one thing, and remembers whether it was asked for it."""

    asked = 0

    def action(self, context: Any, action: Any) -> Any:
        self.asked += 1
        yield flight.Result(SECRET.encode())

    def put(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        self.asked += 1
        for _ in reader:
            writer.write(SECRET.encode())

    def exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        self.asked += 1
        writer.begin(RECORDS.schema)
        for chunk in reader:
            writer.write_batch(chunk.data)


@contextmanager
def serving(credentials: Credentials, **options: Any) -> Iterator[Probe]:
    with Probe("127.0.0.1", 0, credentials, **options) as server:
        yield server


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def secured(files: Files) -> Iterator[Probe]:
    # these strangers come from one address, and each shall be refused for its own reason
    logins = Logins(SecretStr(TOKEN), max_failures=10**6)
    with serving(server_credentials(files.config(), "127.0.0.1"), logins=logins) as probe:
        yield probe


def asks(client: flight.FlightClient) -> str:
    options = flight.FlightCallOptions(timeout=WITHIN_S)
    return b"".join(found.body.to_pybytes() for found in client.do_action("x", options)).decode()


def exchanges(client: flight.FlightClient) -> Any:
    options = flight.FlightCallOptions(timeout=WITHIN_S)
    writer, reader = client.do_exchange(flight.FlightDescriptor.for_command(b"x"), options)
    with writer:
        writer.begin(RECORDS.schema)
        writer.write_batch(RECORDS)
        writer.done_writing()
        return reader.read_all()


def puts(client: flight.FlightClient) -> Any:
    options = flight.FlightCallOptions(timeout=WITHIN_S)
    descriptor = flight.FlightDescriptor.for_command(b"x")
    writer, reader = client.do_put(descriptor, RECORDS.schema, options)
    with writer:
        writer.write_batch(RECORDS)
        writer.done_writing()
        return reader.read()


def listed(name: str, *arguments: Any) -> Callable[[flight.FlightClient], Any]:
    def call(client: flight.FlightClient) -> Any:
        options = flight.FlightCallOptions(timeout=WITHIN_S)
        found = getattr(client, name)(*arguments, options=options)
        return list(found) if hasattr(found, "__iter__") else found

    call.__name__ = name
    return call


ENDPOINTS: list[Callable[[flight.FlightClient], Any]] = [
    *(asks, exchanges, puts),
]
CLOSED = [
    listed("list_flights"),
    listed("list_actions"),
    listed("get_flight_info", flight.FlightDescriptor.for_path("x")),
    listed("get_schema", flight.FlightDescriptor.for_path("x")),
    listed("do_get", flight.Ticket(b"x")),
]


def refused(call: Callable[[], object]) -> str:
    """The message that a stranger gets, within the stated time and without any data."""
    start = time.monotonic()
    with pytest.raises((flight.FlightError, pa.ArrowException, OSError)) as caught:
        call()
    assert time.monotonic() - start < WITHIN_S
    message = reason(caught.value)
    for leak in (SECRET, "Traceback", ".py", TOKEN, "Deadline"):
        assert leak not in str(caught.value)
    return message


def test_who_has_token_and_root_is_served(files: Files, secured: Probe) -> None:
    with connect("localhost", secured.port, client_credentials(files.config())) as client:
        assert asks(client) == SECRET
        assert exchanges(client).to_pydict() == {"row": [7, 8]}
        assert puts(client).to_pybytes() == SECRET.encode()


@pytest.mark.parametrize("call", ENDPOINTS)
@pytest.mark.parametrize("token", [None, "wrong" * 4, TOKEN[:-1], TOKEN + "0"])
def test_without_the_token_no_endpoint_answers(
    files: Files, secured: Probe, token: str | None, call: Callable[[flight.FlightClient], Any]
) -> None:
    credentials = Credentials(
        token=None if token is None else SecretStr(token), root=files.root.read_bytes()
    )
    asked = secured.asked
    with connect("localhost", secured.port, credentials) as client:
        message = refused(lambda: call(client))
    assert ("token is wanted" if token is None else "token is wrong") in message
    assert secured.asked == asked


@pytest.mark.parametrize("call", CLOSED)
def test_endpoints_that_are_none_answer_nobody(
    files: Files, secured: Probe, call: Callable[[flight.FlightClient], Any]
) -> None:
    with connect("localhost", secured.port, client_credentials(files.config())) as client:
        assert "not served" in refused(lambda: call(client))
    with connect("localhost", secured.port, Credentials(root=files.root.read_bytes())) as client:
        assert "not served" in refused(lambda: call(client))


@pytest.mark.parametrize(
    "headers",
    [
        [(b"authorization", TOKEN.encode())],
        [(b"authorization", b"Basic " + TOKEN.encode())],
        [(b"authorization", b"Bearer  " + TOKEN.encode())],
        [(b"authorization", b"Bearer " + TOKEN.encode()), (b"authorization", b"Bearer x")],
        [(b"authorization", b"")],
        [(b"authorization", b"Bearer ")],
        [(b"authorization", b"Bearer " + b"x" * 5000)],
        [(b"authorization-bin", b"\xff\xfe")],
    ],
)
def test_other_ways_to_show_a_token_are_none(
    files: Files, secured: Probe, headers: list[tuple[bytes, bytes]]
) -> None:
    options = flight.FlightCallOptions(timeout=WITHIN_S, headers=headers)
    credentials = Credentials(root=files.root.read_bytes())
    with connect("localhost", secured.port, credentials) as client:
        assert "token" in refused(lambda: list(client.do_action("x", options)))


def test_a_plain_client_at_a_port_of_tls(secured: Probe) -> None:
    with connect("127.0.0.1", secured.port, Credentials(token=SecretStr(TOKEN))) as client:
        assert "it may want TLS" in refused(lambda: asks(client))


def test_a_client_of_tls_at_a_plain_port(files: Files) -> None:
    with (
        serving(Credentials(token=SecretStr(TOKEN))) as server,
        connect("127.0.0.1", server.port, client_credentials(files.config())) as client,
    ):
        assert "it does not speak TLS" in refused(lambda: asks(client))
        assert server.asked == 0


def test_a_root_that_did_not_sign(files: Files, secured: Probe, tmp_path: Path) -> None:
    other = Credentials(token=SecretStr(TOKEN), root=Files(tmp_path).root.read_bytes())
    with connect("localhost", secured.port, other) as client:
        assert "was not signed by servers.tls.root" in refused(lambda: asks(client))


@pytest.mark.parametrize(
    ("host", "of", "fact"),
    [
        ("elsewhere.example", {}, "is for other names"),
        ("localhost", {"expired": True}, "has expired"),
        ("localhost", {"early": True}, "is not valid yet: set the clocks"),
    ],
)
def test_a_server_of_another_name_or_time(
    files: Files, host: str, of: dict[str, bool], fact: str
) -> None:
    files.issue("wrong", host, **of)
    config = files.config().model_copy(update={"tls": files.tls("wrong")})
    with (
        serving(server_credentials(config, "127.0.0.1")) as server,
        connect("localhost", server.port, client_credentials(files.config())) as client,
    ):
        assert fact in refused(lambda: asks(client))
        assert server.asked == 0


@pytest.mark.parametrize("shown", ["none", "of another root", "expired", "right"])
def test_mutual_tls_wants_a_certificate_of_the_client(
    files: Files, tmp_path: Path, shown: str
) -> None:
    config = files.config(mutual=True)
    own = client_credentials(config)
    if shown == "none":
        certificate = None
    elif shown == "right":
        certificate = own.certificate
    else:
        signer = Files(tmp_path) if shown == "of another root" else files
        chain, key = signer.issue("trainer", "localhost", expired=shown == "expired")
        certificate = Certificate(chain=chain.read_bytes(), key=SecretBytes(key.read_bytes()))
    credentials = Credentials(token=own.token, root=own.root, certificate=certificate)
    with (
        serving(server_credentials(config, "127.0.0.1")) as server,
        connect("localhost", server.port, credentials) as client,
    ):
        if shown == "right":
            assert asks(client) == SECRET
        else:
            assert "servers.tls.mutual" in refused(lambda: asks(client))
            assert server.asked == 0


def test_nobody_and_nowhere() -> None:
    with connect("127.0.0.1", 1, Credentials()) as client:
        assert refused(lambda: asks(client)) == "nobody listens there"
    with connect("nowhere.invalid", 1, Credentials()) as client:
        assert refused(lambda: asks(client)) == "this host knows no host of that name"


def test_noise_and_silence_do_not_stop_the_server(files: Files, secured: Probe) -> None:
    with (
        socket.create_connection(("127.0.0.1", secured.port)),
        socket.create_connection(("127.0.0.1", secured.port)) as noisy,
        connect("localhost", secured.port, client_credentials(files.config())) as client,
    ):
        noisy.sendall(b"\x16\x03\x01\xff\xff" + bytes(range(256)) * 100)
        assert asks(client) == SECRET


def test_an_address_that_guesses_is_refused_for_a_while(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    right, wrong = (Credentials(token=SecretStr(token)) for token in (TOKEN, "guess" * 4))
    logins = Logins(right.token, max_failures=3, window_s=60.0, clock=lambda: now[0])
    with (
        caplog.at_level(logging.WARNING),
        serving(right, logins=logins) as server,
        connect("127.0.0.1", server.port, right) as known,
        connect("127.0.0.1", server.port, wrong) as guessing,
        connect("127.0.0.1", server.port, Credentials()) as silent,
    ):
        for _ in range(5):  # no guess, so it is no reason to shut anybody out
            assert "token is wanted" in refused(lambda: asks(silent))
        for _ in range(3):
            assert "token is wrong" in refused(lambda: asks(guessing))
        now[0] = 20.0
        for client in (guessing, known):
            told = refused(lambda client=client: asks(client))  # type: ignore[misc]
            assert "too many wrong tokens from 127.0.0.1: try again in 40 s" in told
        now[0] = 60.0
        assert asks(known) == SECRET
        assert logins.num_refused == 5 + 3 + 2
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        "a login from 127.0.0.1 was refused: its token is wrong",
        "3 wrong tokens from 127.0.0.1: its logins are refused for 60 s",
    ]
    assert "guess" not in caplog.text


def test_a_stream_that_is_open_goes_on_when_its_address_is_refused() -> None:
    right, wrong = (Credentials(token=SecretStr(token)) for token in (TOKEN, "guess" * 4))
    logins = Logins(right.token, max_failures=1)
    with (
        serving(right, logins=logins) as server,
        connect("127.0.0.1", server.port, right) as known,
        connect("127.0.0.1", server.port, wrong) as guessing,
    ):
        options = flight.FlightCallOptions(timeout=WITHIN_S)
        writer, reader = known.do_exchange(flight.FlightDescriptor.for_command(b"x"), options)
        writer.begin(RECORDS.schema)
        writer.write_batch(RECORDS)
        assert reader.read_chunk().data.equals(RECORDS)
        refused(lambda: asks(guessing))
        refused(lambda: asks(known))
        writer.write_batch(RECORDS)
        assert reader.read_chunk().data.equals(RECORDS)
        writer.close()


def test_the_limit_remembers_few_addresses() -> None:
    logins = Logins(SecretStr(TOKEN), max_failures=2)
    wrong, right = (SCHEME + "guess",), (SCHEME + TOKEN,)
    for address in ("a", "a", "b"):
        assert logins.refusal(address, wrong) == "the token is wrong"
    assert "too many" in str(logins.refusal("a", right))
    assert logins.refusal("b", right) is None
    for number in range(5000):
        logins.refusal(str(number), wrong)
    assert logins.refusal("a", right) is None  # forgotten, as the oldest
    assert len(logins._failures) <= 4096


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("10.0.0.7", "10.0.0.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::ffff:10.0.0.7", "10.0.0.7"),
        ("unix:/tmp/x", "unix:/tmp/x"),
        ("x" * 1000, "x" * 100),
    ],
)
def test_addresses_are_told_apart_by_host(host: str, address: str) -> None:
    assert address_of(host) == address


HOSTS = ["127.0.0.1", *(["::1"] if has_ipv6() else [])]


@pytest.mark.parametrize("host", HOSTS)
def test_the_address_is_that_of_the_caller(host: str, caplog: pytest.LogCaptureFixture) -> None:
    right, wrong = (Credentials(token=SecretStr(token)) for token in (TOKEN, "guess" * 4))
    with Probe(host, 0, right) as server, connect(host, server.port, wrong) as client:
        refused(lambda: asks(client))
    assert f"a login from {address_of(host)} was refused" in caplog.text


def test_what_would_go_round_the_login_can_not_be_written() -> None:
    with pytest.raises(TypeError, match=r"Open\.do_put would serve calls without a login"):

        class Open(GuardedServer):
            def do_put(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
                """Serves anybody."""
