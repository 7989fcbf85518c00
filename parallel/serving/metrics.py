"""Metrics of every server for Prometheus, in a registry of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class HttpMetrics:
    """Requests by the code of the answer, their times, and reloads; a server adds its own to `registry`.

    Args:
        prefix: of all names.
        buckets: of the times, in seconds.
    """

    def __init__(self, prefix: str, buckets: tuple[float, ...] = SECONDS) -> None:
        from prometheus_client import CollectorRegistry, Counter, Histogram

        self.prefix, self.registry = prefix, CollectorRegistry()
        kept = {"registry": self.registry}
        self.requests = Counter(f"{prefix}_requests", "Requests by the code of the answer", ["code"], **kept)
        self.seconds = Histogram(f"{prefix}_request_seconds", "Time of a request", buckets=buckets, **kept)
        self.reloads = Counter(f"{prefix}_reloads", "Reloads by outcome", ["outcome"], **kept)

    def gauge(self, name: str, what: str, read: Callable[[], float]) -> None:
        """A value that is read when Prometheus asks."""
        from prometheus_client import Gauge

        Gauge(f"{self.prefix}_{name}", what, registry=self.registry).set_function(read)

    def counter(self, name: str, what: str, read: Callable[[], float]) -> None:
        """A count that somebody else keeps."""
        from prometheus_client.core import CounterMetricFamily

        full = f"{self.prefix}_{name}"

        class Collector:
            def collect(self) -> Any:
                yield CounterMetricFamily(full, what, value=read())

        self.registry.register(Collector())

    def text(self) -> tuple[bytes, str]:
        """What Prometheus reads, and its media type."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self.registry), CONTENT_TYPE_LATEST
