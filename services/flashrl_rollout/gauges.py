"""The scheduler's latest numbers and the tokens so far, as vLLM reports them with every step.

Knows vLLM's statistics; knows nothing of how they are shown.
"""

import time
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase

from flashrl_rollout.engine import EngineStats


class Gauges:
    """Running and waiting sequences, and the share of the cache in use."""

    def __init__(self) -> None:
        self._latest: Any = None
        self.last_step = 0.0  # time.monotonic()
        self._generated_tokens = 0

    def factory(self, vllm_config: Any, engine_index: int) -> StatLoggerBase:
        """What vLLM calls to get a logger."""
        return _Listener(self)

    def record(self, scheduler_stats: Any, iteration_stats: Any) -> None:
        """Take the numbers of a step; either may be None."""
        if scheduler_stats is not None:
            self._latest, self.last_step = scheduler_stats, time.monotonic()
        if iteration_stats is not None:
            self._generated_tokens += iteration_stats.num_generation_tokens

    def stats(self) -> EngineStats:
        """The numbers of the last step; zero before the first."""
        latest = self._latest
        if latest is None:
            return EngineStats()
        waiting = latest.num_waiting_reqs + latest.num_skipped_waiting_reqs
        extra = {"kv_cache_usage": latest.kv_cache_usage}
        return EngineStats(latest.num_running_reqs, waiting, extra, self._generated_tokens)


class _Listener(StatLoggerBase):  # type: ignore[misc]
    def __init__(self, gauges: Gauges) -> None:
        self._gauges = gauges

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        self._gauges.record(scheduler_stats, iteration_stats)

    def log_engine_initialized(self) -> None:
        """Nothing to say."""
