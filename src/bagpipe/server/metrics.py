"""What a shard server tells of itself: numbers in Prometheus' format, and whether it serves.

`ServerMetrics` counts requests; the rest is read from the shard when somebody asks. `MetricsServer`
answers `GET /metrics` and `GET /health` over HTTP on a port of its own. The rules are those of the
Flight port: reached from other hosts only with TLS and the token. What it tells: sizes, counts,
times, the epoch and names of groups. No record, no row number, no name of a table.
"""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from typing import Any

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from bagpipe.errors import ConfigError
from bagpipe.server.credentials import Credentials
from bagpipe.server.logins import Logins, address_of

_BUCKETS_S = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 60.0)
_TIMEOUT_S = 10.0
"""How long a caller may take to say what it wants, and to take the answer."""
_MAX_CALLERS = 16
_LOOK_EVERY_S = 0.1
"""How soon it sees that it is to end."""


@dataclass(frozen=True, kw_only=True)
class GroupStatus:
    """Of the shard's rows of one group, how many were written."""

    name: str
    num_rows: int
    """Of the whole group, in all shards."""
    ever: int
    since_base: int
    """Since the last committed checkpoint: what the next one writes."""


@dataclass(frozen=True, kw_only=True)
class ShardStatus:
    """A moment of a shard."""

    shard: int
    num_shards: int
    instance: str
    epoch: int | None
    """None: it waits for trainers to begin one."""
    base: str | None
    """The checkpoint that rows go back to; None: the run's beginning, or not known."""
    num_waiting: int
    """Fetches that wait for other ranks' writes."""
    num_reads: int
    num_writes: int
    """Requests that are being applied."""
    groups: tuple[GroupStatus, ...]


class ServerMetrics:
    """Counts requests, and puts a shard's status into Prometheus' format.

    Args:
        status: Reads the shard's status.
        logins: Whose refusals are told.
    """

    def __init__(self, status: Callable[[], ShardStatus], logins: Logins) -> None:
        self._status, self._logins = status, logins
        self._registry = CollectorRegistry(auto_describe=False)
        own: dict[str, Any] = {"labelnames": ("kind",), "registry": self._registry}
        self._rows = Counter("bagpipe_rows", "Rows read or written", **own)
        self._bytes = Counter("bagpipe_record_bytes", "Bytes of their records", **own)
        self._failures = Counter("bagpipe_failures", "Requests that failed", **own)
        self._seconds = Histogram(
            "bagpipe_request_seconds",
            "From a request's arrival to its answer, with the wait for other ranks' writes",
            buckets=_BUCKETS_S,
            **own,
        )
        ProcessCollector(registry=self._registry)
        self._registry.register(self)

    @contextmanager
    def request(self, kind: str, num_rows: int = 0, size_bytes: int = 0) -> Iterator[None]:
        """Around one request of a kind, such as "fetch"; one that raises counts as failed."""
        start = time.perf_counter()
        try:
            yield
        except BaseException:
            self._failures.labels(kind).inc()
            raise
        self._seconds.labels(kind).observe(time.perf_counter() - start)
        self._rows.labels(kind).inc(num_rows)
        self._bytes.labels(kind).inc(size_bytes)

    def text(self) -> bytes:
        """All numbers, in Prometheus' text format."""
        return generate_latest(self._registry)

    def health(self) -> dict[str, Any]:
        """Whether the server serves an epoch, and which, as JSON values."""
        status = self._status()
        return {
            "state": "waits for an epoch" if status.epoch is None else "serves",
            "shard": status.shard,
            "num_shards": status.num_shards,
            "instance": status.instance,
            "epoch": status.epoch,
            "base": status.base,
        }

    def collect(self) -> Iterator[Metric]:
        """The shard's status, for Prometheus' registry."""
        status = self._status()
        gauges = {
            "bagpipe_shard": ("Which shard this is, from 0 on", status.shard),
            "bagpipe_shards": ("Into how many shards rows are divided", status.num_shards),
            "bagpipe_epoch": (
                "The start of trainers that is served; -1: none",
                -1 if status.epoch is None else status.epoch,
            ),
            "bagpipe_waiting_fetches": (
                "Fetches that wait for other ranks' writes",
                status.num_waiting,
            ),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value=value)
        running = GaugeMetricFamily(
            "bagpipe_running_requests", "Requests being applied", labels=["kind"]
        )
        running.add_metric(["fetch"], status.num_reads)
        running.add_metric(["write"], status.num_writes)
        yield running
        written = GaugeMetricFamily(
            "bagpipe_written_rows",
            "Rows of this shard that were written: ever, and since the last committed checkpoint",
            labels=["group", "since"],
        )
        for group in status.groups:
            written.add_metric([group.name, "ever"], group.ever)
            written.add_metric([group.name, "base"], group.since_base)
        yield written
        yield CounterMetricFamily(
            "bagpipe_refused_logins",
            "Calls without the right token",
            value=self._logins.num_refused,
        )


class MetricsServer(ThreadingTCPServer):
    """Answers over HTTP, a thread a caller, from its making until `close`.

    Args:
        host: Where to listen.
        port: 0: any that is free; `port` then says which.
        metrics: What to tell.
        credentials: Of the shard server, as `server_credentials` read them for this host.
        logins: Whom to let in.

    Raises:
        ConfigError: It can't listen there.
    """

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64
    block_on_close = False

    def __init__(
        self,
        host: str,
        port: int,
        metrics: ServerMetrics,
        credentials: Credentials,
        logins: Logins,
    ) -> None:
        self.metrics, self.logins = metrics, logins
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._callers = threading.BoundedSemaphore(_MAX_CALLERS)
        own = credentials.certificate
        root = credentials.root if credentials.mutual else None
        self._tls = None if own is None else own.ssl_context(root)
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise ConfigError(
                f"can't listen for metrics on {host}, port {port}: {error.strerror or error}: "
                "choose another, or port 0"
            ) from error
        self._thread = threading.Thread(
            target=self.serve_forever, args=(_LOOK_EVERY_S,), name="metrics", daemon=True
        )
        self._thread.start()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.server_address[1])

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Serves one caller, on its own thread: a slow one holds up nobody else."""
        if not self._callers.acquire(blocking=False):
            return
        try:
            request.settimeout(_TIMEOUT_S)
            # what goes wrong from here on is the caller's
            with contextlib.suppress(OSError):
                if self._tls is None:
                    _Handler(request, client_address, self)
                else:
                    with self._tls.wrap_socket(request, server_side=True) as wrapped:
                        _Handler(wrapped, client_address, self)
                        with contextlib.suppress(ssl.SSLError):
                            wrapped.unwrap()
        finally:
            self._callers.release()

    def close(self) -> None:
        """Listens no longer."""
        self.shutdown()
        self._thread.join()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    """One request, and the end: nothing is kept open."""

    server: MetricsServer
    timeout = _TIMEOUT_S

    def do_GET(self) -> None:
        shown = self.headers.get_all("authorization", ())
        refusal = self.server.logins.refusal(address_of(self.client_address[0]), shown)
        if refusal is not None:
            self._answer(HTTPStatus.UNAUTHORIZED, "text/plain", refusal.encode())
        elif self.path == "/metrics":
            self._answer(HTTPStatus.OK, CONTENT_TYPE_LATEST, self.server.metrics.text())
        elif self.path == "/health":
            body = json.dumps(self.server.metrics.health()).encode()
            self._answer(HTTPStatus.OK, "application/json", body)
        else:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"there are /metrics and /health")

    def version_string(self) -> str:
        """Strangers need not know of which versions this is made."""
        return "bagpipe"

    def log_message(self, format: str, *args: object) -> None:
        """Logs nothing: what a caller sent is no text of ours."""

    def _answer(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        if status == HTTPStatus.UNAUTHORIZED:
            self.send_header("www-authenticate", "Bearer")
        self.end_headers()
        self.wfile.write(body)
