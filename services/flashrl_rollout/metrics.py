"""What `/metrics` shows, in a registry of its own beside the engine's.

Knows names and types of metrics; knows nothing of where the numbers arise.
"""

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from flashrl_wire.messages import LastUpdate, Usage

_PAUSE_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 60.0)


class Metrics:
    """Counters that others add to, and gauges that are set at every scrape."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self._requests = Counter("flashrl_requests", "HTTP requests", ["route", "status"], registry=registry)
        self._tokens = Counter("flashrl_tokens", "Tokens of /generate", ["kind"], registry=registry)
        self._updates = Counter("flashrl_updates", "Weight updates by how they ended", ["result"], registry=registry)
        self._bytes = Counter("flashrl_update_wire_bytes", "Bytes of committed updates", ["kind"], registry=registry)
        self._pause = Histogram(
            "flashrl_commit_pause_seconds", "Sampling at rest", buckets=_PAUSE_BUCKETS_S, registry=registry
        )
        self._gauges: dict[str, Gauge] = {}

    def count_request(self, route: str, status: int) -> None:
        """One HTTP request is answered."""
        self._requests.labels(route, str(status)).inc()

    def count_tokens(self, usage: Usage) -> None:
        """One /generate request is answered."""
        self._tokens.labels("prompt").inc(usage.prompt_tokens)
        self._tokens.labels("completion").inc(usage.completion_tokens)

    def count_update(self, result: str, update: LastUpdate | None) -> None:
        """One update has ended, or an audit."""
        self._updates.labels(result).inc()
        if update is not None:
            self._bytes.labels(update.kind).inc(update.wire_bytes)
            self._pause.observe(update.pause_ms / 1e3)

    def set_gauges(self, values: dict[str, float]) -> None:
        """Set `flashrl_NAME` for every item."""
        for name, value in values.items():
            if name not in self._gauges:
                self._gauges[name] = Gauge(f"flashrl_{name}", name.replace("_", " "), registry=self._registry)
            self._gauges[name].set(value)

    def text(self) -> bytes:
        """All of it and the default registry (where vLLM's metrics are), in Prometheus' text format."""
        return generate_latest(self._registry) + generate_latest(REGISTRY)
