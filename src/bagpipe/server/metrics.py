"""What a shard server tells of itself: numbers in Prometheus' format, and whether it serves.

All is read from the shard when somebody asks. `MetricsServer` answers `GET /metrics` and `GET
/health` over HTTP on a port of its own. The rules are those of the Flight port: reached from other
hosts only with TLS and the token. What it tells: sizes, counts, times, the epoch and names of
groups. No record, no row number, no name of a table.
"""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from typing import Any

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from bagpipe.errors import ConfigError
from bagpipe.server.credentials import Credentials
from bagpipe.server.logins import Logins, address_of
from bagpipe.server.shard import Shard

_TIMEOUT_S = 10.0
"""How long a caller may take to say what it wants, and to take the answer."""
_MAX_CALLERS = 16
_LOOK_EVERY_S = 0.1
"""How soon it sees that it is to end."""


class ServerMetrics:
    """Puts what a shard does into Prometheus' format.

    Args:
        shard: Whose status and requests are told.
        logins: Whose refusals are told.
    """

    def __init__(self, shard: Shard, logins: Logins) -> None:
        self._shard, self._logins = shard, logins
        self._registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=self._registry)
        self._registry.register(self)

    def text(self) -> bytes:
        """All numbers, in Prometheus' text format."""
        return generate_latest(self._registry)

    def health(self) -> dict[str, Any]:
        """Whether the server serves an epoch, and which, as JSON values."""
        shard = self._shard
        return {
            "state": "waits for an epoch" if shard.epoch is None else "serves",
            "shard": shard.number,
            "num_shards": shard.num_shards,
            "instance": shard.instance,
            "epoch": shard.epoch,
            "base": shard.base,
        }

    def collect(self) -> Iterator[Metric]:
        """The shard's numbers, for Prometheus' registry."""
        shard = self._shard
        epoch = -1 if shard.epoch is None else shard.epoch
        yield from shard.requests.collect()
        for name, text, value in (
            ("shard", "Which shard this is, from 0 on", shard.number),
            ("shards", "Into how many shards rows are divided", shard.num_shards),
            ("epoch", "The start of trainers that is served; -1: none", epoch),
        ):
            yield GaugeMetricFamily(f"bagpipe_{name}", text, value=value)
        written = GaugeMetricFamily(
            "bagpipe_written_rows",
            "Rows of this shard that were written: ever, and since the last committed checkpoint",
            labels=["group", "since"],
        )
        for group, (ever, since_base) in zip(shard.groups, shard.count_written(), strict=True):
            written.add_metric([group.name, "ever"], ever)
            written.add_metric([group.name, "base"], since_base)
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
