"""Rows as Prometheus metrics: over a real socket."""

import socket
from pathlib import Path

import httpx
import pytest

from flashrl_trainer.config import load_config
from flashrl_trainer.exporter import Exporter, Mirrors, open_mirrors
from flashrl_trainer.metric_rows import Row


def scrape(port: int) -> dict[str, float]:
    reply = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False)
    assert reply.status_code == 200
    lines = [line.rsplit(" ", 1) for line in reply.text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


def test_every_number_of_the_last_row_is_shown_and_one_left_out_stays() -> None:
    exporter = Exporter("tiny-1", "127.0.0.1", 0)
    try:
        exporter.log({"step": 4.0, "sync/pause_ms": 12.5, "eval/accuracy": 0.375})
        exporter.log({"step": 5.0, "sync/pause_ms": 13.5, "eval/accuracy": None})
        shown = scrape(exporter.port)
    finally:
        exporter.close()
    assert shown.pop("flashrl_trainer_last_row_seconds") > 1.7e9
    assert shown == {
        'flashrl_trainer_info{run="tiny-1"}': 1.0,
        "flashrl_trainer_step": 5.0,
        "flashrl_trainer_sync_pause_ms": 13.5,
        "flashrl_trainer_eval_accuracy": 0.375,
    }


def test_a_closed_exporter_gives_its_port_back() -> None:
    first = Exporter("a", "127.0.0.1", 0)
    port = first.port
    first.close()
    second = Exporter("b", "127.0.0.1", port)
    try:
        assert 'flashrl_trainer_info{run="b"}' in scrape(port)
    finally:
        second.close()


def config(*overrides: str):  # type: ignore[no-untyped-def]
    return load_config(None, ["model.path=m", "data.train=t", "data.eval=e", "run.wandb=off", *overrides], {})


def test_nothing_listens_unless_a_port_is_set(tmp_path: Path) -> None:
    mirrors = open_mirrors(config(), tmp_path, print)
    mirrors.log({"step": 1.0})
    mirrors.close()


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ValueError, match=rf"run\.metrics_port: cannot listen on 127\.0\.0\.1:{port}: Address already"
        ):
            open_mirrors(config(f"run.metrics_port={port}"), tmp_path, print)


def test_rows_go_to_every_mirror() -> None:
    class Kept:
        def __init__(self) -> None:
            self.rows: list[Row] = []
            self.is_closed = False

        def log(self, row: Row) -> None:
            self.rows.append(row)

        def close(self) -> None:
            self.is_closed = True

    kept = [Kept(), Kept()]
    mirrors = Mirrors(kept)
    mirrors.log({"step": 1.0})
    mirrors.close()
    assert [(one.rows, one.is_closed) for one in kept] == [([{"step": 1.0}], True)] * 2
