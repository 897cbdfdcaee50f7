"""The last row of a run as Prometheus metrics, on a port of the trainer; off unless `run.metrics_port` is set.

`sync/pause_ms` becomes `flashrl_trainer_sync_pause_ms`. It does not know what any number means.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, start_http_server

from flashrl_trainer.metric_rows import Row
from flashrl_trainer.metrics import Mirror, start_wandb
from flashrl_trainer.settings import TrainerConfig

PREFIX = "flashrl_trainer_"


class Exporter:
    """Serves /metrics from the start until `close`; a value that a row leaves out keeps its last one."""

    def __init__(self, run: str, host: str, port: int) -> None:
        """OSError where the port is taken; 0: any free one."""
        self._registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        self._last = Gauge(f"{PREFIX}last_row_seconds", "Time of the last row, Unix", registry=self._registry)
        Gauge(f"{PREFIX}info", "Always 1", ["run"], registry=self._registry).labels(run).set(1)
        self._server, self._thread = start_http_server(port, host, self._registry)

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.server_port)

    def log(self, row: Row) -> None:
        """Show `row` from now on."""
        for key, value in row.items():
            if value is not None:
                self._gauge(key).set(value)
        self._last.set_to_current_time()

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Prometheus takes numbers only."""

    def close(self) -> None:
        """Give the port back."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _gauge(self, key: str) -> Gauge:
        if key not in self._gauges:
            name = PREFIX + key.replace("/", "_")
            self._gauges[key] = Gauge(name, f"`{key}` of metrics.jsonl", registry=self._registry)
        return self._gauges[key]


class Mirrors:
    """Several second places for rows as one."""

    def __init__(self, mirrors: Sequence[Mirror]) -> None:
        self._mirrors = mirrors

    def log(self, row: Row) -> None:
        """Pass `row` on to all."""
        for mirror in self._mirrors:
            mirror.log(row)

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """The same for completions."""
        for mirror in self._mirrors:
            mirror.samples(rows)

    def close(self) -> None:
        """Close all."""
        for mirror in self._mirrors:
            mirror.close()


def open_mirrors(config: TrainerConfig, run_dir: Path, warn: Callable[[str], None]) -> Mirrors:
    """Prometheus and Weights & Biases, each where it is wanted; ValueError where the port cannot be had."""
    run = config.run
    mirrors: list[Mirror] = []
    if run.metrics_port:
        try:
            mirrors.append(Exporter(run_dir.name, run.metrics_host, run.metrics_port))
        except OSError as error:
            where = f"{run.metrics_host}:{run.metrics_port}"
            raise ValueError(f"run.metrics_port: cannot listen on {where}: {error.strerror}") from error
    if wandb := start_wandb(config, run_dir, warn):
        mirrors.append(wandb)
    return Mirrors(mirrors)
