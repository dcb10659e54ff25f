"""What a shard server tells of itself, in which format, and to whom."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr
from tests.server.certificates import TOKEN, Files, has_ipv6
from tests.server.shards import fetched, header_of, make_shard, own_rows
from tests.soon import SOON_S
from tests.store_contract import records_of

from bagpipe.errors import ConfigError, StoreError
from bagpipe.server.credentials import Credentials, server_credentials
from bagpipe.server.logins import Logins
from bagpipe.server.metrics import MetricsServer, ServerMetrics
from bagpipe.server.shard import Shard
from bagpipe.server.wire import What
from bagpipe.store import Steps

WITHIN_S = SOON_S
NOBODY = Credentials()


@contextmanager
def telling(
    credentials: Credentials = NOBODY, shard: Shard | None = None, host: str = "127.0.0.1"
) -> Iterator[MetricsServer]:
    logins = Logins(credentials.token)
    metrics = ServerMetrics(shard or make_shard(), logins)
    with closing(MetricsServer(host, 0, metrics, credentials, logins)) as server:
        yield server


def asked(
    server: MetricsServer, path: str, token: str | None = None, tls: ssl.SSLContext | None = None
) -> tuple[int, str]:
    address = ("localhost", server.port)
    connection = (
        http.client.HTTPConnection(*address, timeout=WITHIN_S)
        if tls is None
        else http.client.HTTPSConnection(*address, timeout=WITHIN_S, context=tls)
    )
    with closing(connection):
        connection.request(
            "GET", path, headers={"Authorization": f"Bearer {token}"} if token else {}
        )
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def samples(text: str) -> dict[tuple[str, ...], float]:
    """(name, value of each label ...) -> number."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_requests_and_the_shard_are_told() -> None:
    shard = make_shard(2, 3)
    rows = own_rows(shard, of=100)
    shard.begin(4, 1)
    write, fetch = header_of(shard, 4), header_of(shard, 4, what=What.FETCH)
    shard.write(write, rows, records_of(rows))
    for _ in range(3):
        fetched(shard, fetch, rows[:7])
    with pytest.raises(StoreError, match="group 1"):
        shard.fetch(header_of(shard, 4, group=1), rows[:7], records_of(rows[:7]))
    with telling(shard=shard) as server:
        status, text = asked(server, "/metrics")
    found, record_bytes = samples(text), shard.groups[0].record_bytes
    assert status == 200
    assert found["bagpipe_rows_total", "fetch"] == 21
    assert found["bagpipe_record_bytes_total", "write"] == len(rows) * record_bytes
    assert found["bagpipe_request_seconds_count", "fetch"] == 3
    assert found["bagpipe_request_seconds_bucket", "fetch", "60.0"] == 3
    assert found["bagpipe_failures_total", "fetch"] == 1
    assert found["bagpipe_requests_under_way", "fetch"] == 0
    assert found["bagpipe_epoch",] == 4
    assert (found["bagpipe_shard",], found["bagpipe_shards",]) == (2, 3)
    name = shard.groups[0].name
    assert found["bagpipe_written_rows", name, "ever"] == len(rows)
    assert found["bagpipe_written_rows", name, "base"] == len(rows)
    assert found["bagpipe_refused_logins_total",] == 0
    assert found["process_resident_memory_bytes",] > 0
    for table in shard.groups[0].tables:
        assert f'"{table.name}"' not in text


def test_fetches_that_wait_for_other_ranks_are_told() -> None:
    shard = make_shard()
    rows = own_rows(shard, of=9)
    shard.begin(1, 1)
    behind = header_of(shard, what=What.FETCH, steps=Steps(urgent=0))
    with telling(shard=shard) as server, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(fetched, shard, behind, rows)
        deadline = time.monotonic() + WITHIN_S
        while (
            samples(asked(server, "/metrics")[1]).get(("bagpipe_requests_under_way", "wait")) != 1
        ):
            assert time.monotonic() < deadline
        shard.mark(header_of(shard, steps=Steps(urgent=0)))
        waiting.result(WITHIN_S)
        assert samples(asked(server, "/metrics")[1])["bagpipe_requests_under_way", "wait"] == 0


def test_health_says_what_is_served() -> None:
    shard = make_shard()
    with telling(shard=shard) as server:
        assert json.loads(asked(server, "/health")[1])["state"] == "waits for an epoch"
        assert samples(asked(server, "/metrics")[1])["bagpipe_epoch",] == -1
        shard.begin(7, 1)
        status, text = asked(server, "/health")
    assert (status, json.loads(text)["state"], json.loads(text)["epoch"]) == (200, "serves", 7)


def test_other_paths_and_methods_are_none() -> None:
    with telling() as server:
        assert asked(server, "/etc/passwd")[0] == 404
        with socket.create_connection(("127.0.0.1", server.port), WITHIN_S) as caller:
            caller.sendall(b"POST /metrics HTTP/1.1\r\n\r\n")
            assert b" 501 " in caller.recv(1000)


def test_the_token_is_wanted_for_all_of_it(caplog: pytest.LogCaptureFixture) -> None:
    with telling(Credentials(token=SecretStr(TOKEN))) as server:
        for path in ("/metrics", "/health", "/nothing"):
            for token in (None, "wrong" * 4):
                status, text = asked(server, path, token)
                assert status == 401
                assert "token" in text
                assert "epoch" not in text
        assert samples(asked(server, "/metrics", TOKEN)[1])["bagpipe_refused_logins_total",] == 6
        for _ in range(20):
            assert asked(server, "/health", "wrong" * 4)[0] == 401
        status, text = asked(server, "/health", TOKEN)
        assert status == 401
        assert "too many wrong tokens from 127.0.0.1" in text
    assert len(caplog.records) == 2
    assert "wrongwrong" not in caplog.text


@pytest.mark.parametrize("mutual", [False, True])
def test_with_tls_only_who_knows_the_root_is_answered(
    tmp_path_factory: pytest.TempPathFactory, mutual: bool
) -> None:
    files = Files(tmp_path_factory.mktemp("certificates"))
    with telling(server_credentials(files.config(mutual=mutual), "127.0.0.1")) as server:
        trusting = ssl.create_default_context(cafile=str(files.root))
        if mutual:
            with pytest.raises((ssl.SSLError, OSError)):
                asked(server, "/health", TOKEN, trusting)
            trusting.load_cert_chain(files.folder / "both.pem", files.folder / "both.key")
        assert asked(server, "/health", TOKEN, trusting)[0] == 200
        assert asked(server, "/health", None, trusting)[0] == 401
        with pytest.raises(ssl.SSLError, match="CERTIFICATE_VERIFY_FAILED"):
            asked(server, "/health", TOKEN, ssl.create_default_context())
        with pytest.raises((http.client.HTTPException, OSError)):
            asked(server, "/health", TOKEN)
        # who says nothing holds up nobody
        with socket.create_connection(("127.0.0.1", server.port)):
            start = time.monotonic()
            assert asked(server, "/health", TOKEN, trusting)[0] == 200
            assert time.monotonic() - start < WITHIN_S


def test_callers_who_stay_are_few() -> None:
    with telling() as server:
        address = ("127.0.0.1", server.port)
        silent = [socket.create_connection(address, WITHIN_S) for _ in range(40)]
        # those above the limit are sent away at once
        assert [s.recv(1) for s in silent[-10:]] == [b""] * 10
        for caller in silent:
            caller.close()
        deadline = time.monotonic() + WITHIN_S
        while True:  # the others are noticed as they close
            try:
                assert asked(server, "/health")[0] == 200
                break
            except (http.client.HTTPException, OSError):
                assert time.monotonic() < deadline


def test_a_port_that_is_taken_is_told() -> None:
    with telling() as server:
        metrics = server.metrics
        with pytest.raises(ConfigError, match=rf"metrics on 127.0.0.1, port {server.port}"):
            MetricsServer("127.0.0.1", server.port, metrics, NOBODY, server.logins)


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")
def test_it_listens_by_ipv6_too() -> None:
    with telling(host="::1") as server:
        connection = http.client.HTTPConnection("::1", server.port, timeout=WITHIN_S)
        with closing(connection):
            connection.request("GET", "/health")
            assert connection.getresponse().status == 200
