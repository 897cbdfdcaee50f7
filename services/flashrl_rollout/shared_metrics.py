"""vLLM's own Prometheus metrics where one process has several engines: one set of metrics with a label for each.

Left alone, every engine that starts takes the metrics of the one before it out of the registry. Knows vLLM's loggers.
"""

from typing import Any

from vllm.v1.metrics.loggers import PrometheusStatLogger


class SharedMetrics:
    """`loggers(index)` is what the engine of that index is started with."""

    def __init__(self, engines: int) -> None:
        self._engines = engines
        self._shared: Any = None

    def loggers(self, index: int) -> list[Any]:
        """vLLM's factories of loggers besides its own; none for a single engine, whose own are right."""
        return [_forwarding(self, index)] if self._engines > 1 else []

    def shared(self, vllm_config: Any) -> Any:
        """The one logger with a label for each engine, made with the first engine's configuration."""
        if self._shared is None:
            self._shared = PrometheusStatLogger(vllm_config, list(range(self._engines)))
        return self._shared


def _forwarding(metrics: SharedMetrics, index: int) -> type[Any]:
    class Forwarding(PrometheusStatLogger):  # type: ignore[misc]
        """Of this type, so that vLLM adds no other; each engine takes itself for engine 0."""

        def __init__(self, vllm_config: Any, engine_indexes: list[int] | None = None) -> None:
            self._to = metrics.shared(vllm_config)

        def record(
            self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
        ) -> None:
            self._to.record(scheduler_stats, iteration_stats, mm_cache_stats, index)

        def record_admission_rejection(self, reason: str) -> None:
            self._to.record_admission_rejection(reason)

        def record_sleep_state(self, sleep: int = 0, level: int = 0) -> None:
            """No engine of ours sleeps."""

        def log_engine_initialized(self) -> None:
            if index == 0:
                self._to.log_engine_initialized()

    return Forwarding
