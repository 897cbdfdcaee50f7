"""What `/metrics` shows, in a registry of its own beside the engine's.

Knows names and types of metrics; knows nothing of where the numbers arise.
"""

from collections.abc import Mapping

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from flashrl_wire.messages import LastUpdate, Usage

_PAUSE_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 60.0)
_REQUEST_BUCKETS_S = (0.005, 0.02, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_UPDATE_BUCKETS_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """Counters that others add to, and gauges that are set at every scrape."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self._requests = Counter("flashrl_requests", "HTTP requests", ["route", "status"], registry=registry)
        self._request_seconds = Histogram(
            "flashrl_request_seconds",
            "From a request's first byte to its reply's last",
            ["route"],
            buckets=_REQUEST_BUCKETS_S,
            registry=registry,
        )
        self._rejected = Counter("flashrl_rejected", "Requests answered with an error", ["reason"], registry=registry)
        self._abandoned = Counter("flashrl_client_disconnects", "Clients that left before a reply", registry=registry)
        self._tokens = Counter("flashrl_tokens", "Tokens of /generate", ["kind"], registry=registry)
        self._updates = Counter("flashrl_updates", "Weight updates by how they ended", ["result"], registry=registry)
        self._bytes = Counter("flashrl_update_wire_bytes", "Bytes of committed updates", ["kind"], registry=registry)
        self._update_seconds = Histogram(
            "flashrl_update_seconds", "From begin to commit", ["kind"], buckets=_UPDATE_BUCKETS_S, registry=registry
        )
        self._pause = Histogram(
            "flashrl_commit_pause_seconds", "Sampling at rest", buckets=_PAUSE_BUCKETS_S, registry=registry
        )
        self._gauges: dict[str, Gauge] = {}

    def count_request(self, route: str, status: int, seconds: float, error: str | None, is_abandoned: bool) -> None:
        """One HTTP request has ended; `error` is the code of its refusal."""
        self._requests.labels(route, str(status)).inc()
        self._request_seconds.labels(route).observe(seconds)
        if error is not None:
            self._rejected.labels(error).inc()
        if is_abandoned:
            self._abandoned.inc()

    def count_tokens(self, usage: Usage) -> None:
        """One /generate request is answered."""
        self._tokens.labels("prompt").inc(usage.prompt_tokens)
        self._tokens.labels("completion").inc(usage.completion_tokens)

    def count_update(self, result: str, update: LastUpdate | None) -> None:
        """One update has ended, or an audit."""
        self._updates.labels(result).inc()
        if update is not None:
            self._bytes.labels(update.kind).inc(update.wire_bytes)
            self._update_seconds.labels(update.kind).observe(update.seconds)
            self._pause.observe(update.pause_ms / 1e3)

    def set_gauges(self, values: Mapping[str, float], labels: Mapping[str, str] | None = None) -> None:
        """Set `flashrl_NAME` for every item; a name has the same labels in every call."""
        labels = labels or {}
        for name, value in values.items():
            if name not in self._gauges:
                text = name.replace("_", " ")
                self._gauges[name] = Gauge(f"flashrl_{name}", text, list(labels), registry=self._registry)
            gauge = self._gauges[name]
            (gauge.labels(**labels) if labels else gauge).set(value)

    def text(self) -> bytes:
        """All of it and the default registry (where vLLM's metrics are), in Prometheus' text format."""
        return generate_latest(self._registry) + generate_latest(REGISTRY)
