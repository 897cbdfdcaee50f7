"""One trainer and two services with real engines, of which one is killed while it samples and started again."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from benchmarks.service_process import ServiceProcess, free_port, start_real
from tests.helpers.real_engine import ROOT
from tests.helpers.workshop import Row, rows

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1500)]

MODEL = ROOT / "examples" / "tiny_arith" / "model"
FLAGS = ["--quantization=int8", "--device=cpu", "--threads=1", "--max-model-len=256", "--enforce-eager"]
STEPS, KILLED_AFTER, LIMIT_S = 60, 3, 900.0  # on busy cores an engine takes as long as 24 steps to start


class Pair:
    """Two services that can be started again on the ports they had."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack
        self._ports = [(free_port(), free_port()) for _ in range(2)]
        self.services = [self.start(index) for index in range(2)]

    def start(self, index: int) -> ServiceProcess:
        log = self._folder / f"service-{index}.log"
        started = start_real(MODEL, log, *self._ports[index], *FLAGS)
        self._stack.callback(started.stop)
        return started

    def until_ready(self) -> None:
        for index, service in enumerate(self.services):
            service.wait_ready(self._folder / f"service-{index}.log")


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with ExitStack() as stack:
        yield Pair(tmp_path, stack)


def steps(run: Path) -> list[Row]:
    return [row for row in rows(run) if row["step"] > 0]


def running_requests(service: ServiceProcess) -> float:
    lines = httpx.get(f"{service.url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running"))


def until(holds: Callable[[], bool], trainer: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < end
        assert trainer.poll() is None
        time.sleep(0.02)


def test_a_run_survives_the_loss_of_an_engine(pair: Pair, tmp_path: Path) -> None:
    pair.until_ready()
    run, log = tmp_path / "run", tmp_path / "trainer.log"
    urls = ",".join(service.url for service in pair.services)
    settings = [
        f"run.dir={tmp_path}",
        "run.name=run",
        f"run.steps={STEPS}",
        "run.stop_accuracy=0",
        f"rollout.urls={urls}",
        "eval.every=0",
    ]
    arguments = ["train", "--config", "configs/tiny_arith.toml", *(f"--set={setting}" for setting in settings)]
    with log.open("wb") as out:
        command = [sys.executable, "-m", "flashrl_trainer", *arguments]
        trainer = subprocess.Popen(command, stdout=out, stderr=out, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        until(lambda: len(steps(run)) >= KILLED_AFTER, trainer)
        until(lambda: running_requests(pair.services[1]) > 0, trainer)
        pair.services[1].kill()
        pair.services[1] = pair.start(1)
        assert trainer.wait(LIMIT_S) == 0, log.read_text()[-3000:]
    finally:
        trainer.kill()
    pair.until_ready()
    found = steps(run)
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    assert sum(row["sampling/requests_moved"] for row in found) > 0, "what was lost is reported"
    digests = [service.weights()["digest"] for service in pair.services]
    print(f"requests moved: {[row['sampling/requests_moved'] for row in found]}; digests {digests}")
    said = log.read_text()
    assert f"{pair.services[1].url} gets no prompts" in said, "and its loss is said"
    assert f"{pair.services[1].url} is in use at version" in said, said[-3000:]
    assert digests[0] == digests[1], said[-3000:]
