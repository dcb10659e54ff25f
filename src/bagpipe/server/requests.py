"""What a shard counts, whichever way its requests come."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.core import Metric

_BUCKETS_S = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 60.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Counts:
    """What is counted of one kind of requests."""

    rows: Counter
    bytes: Counter
    failures: Counter
    under_way: Gauge
    seconds: Histogram


class Requests:
    """Counts requests by kind, with their rows, bytes and times; any thread may call it."""

    def __init__(self) -> None:
        self._kinds: dict[str, _Counts] = {}
        own: dict[str, Any] = {"labelnames": ("kind",), "registry": None}
        self._rows = Counter("bagpipe_rows", "Rows read or written", **own)
        self._bytes = Counter("bagpipe_record_bytes", "Bytes of their records", **own)
        self._failures = Counter("bagpipe_failures", "Requests that failed", **own)
        self._under_way = Gauge("bagpipe_requests_under_way", "Requests that have not ended", **own)
        self._seconds = Histogram(
            "bagpipe_request_seconds", "How long requests took", buckets=_BUCKETS_S, **own
        )

    @contextmanager
    def counted(self, kind: str, num_rows: int = 0, size_bytes: int = 0) -> Iterator[None]:
        """Around one request of a kind, such as "fetch"; one that raises counts as failed."""
        start = time.perf_counter()
        counts = self._of_kind(kind)
        counts.under_way.inc()
        try:
            yield
        except BaseException:
            counts.failures.inc()
            raise
        finally:
            counts.under_way.dec()
        counts.seconds.observe(time.perf_counter() - start)
        counts.rows.inc(num_rows)
        counts.bytes.inc(size_bytes)

    def _of_kind(self, kind: str) -> _Counts:
        """The counts of one kind; finding them anew each time would take 25 us a request."""
        if kind not in self._kinds:
            self._kinds[kind] = _Counts(
                rows=self._rows.labels(kind),
                bytes=self._bytes.labels(kind),
                failures=self._failures.labels(kind),
                under_way=self._under_way.labels(kind),
                seconds=self._seconds.labels(kind),
            )
        return self._kinds[kind]

    def collect(self) -> Iterator[Metric]:
        """All counts, as Prometheus has them."""
        for each in (self._rows, self._bytes, self._failures, self._under_way, self._seconds):
            yield from each.collect()
