"""A rollout service, or vLLM's own server, as a process of a benchmark's own: started, awaited, asked, stopped.

Knows the command lines and a few routes; knows nothing of what is measured.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

TINY_MODEL = Path("examples/tiny_arith/model")
START_DEADLINE_S = 900.0
STOP_DEADLINE_S = 60.0


class ServiceProcess:
    """A running service; `url` is where it answers, `exit_code` is known once it has ended."""

    def __init__(self, url: str, weights_port: int, process: "subprocess.Popen[bytes]") -> None:
        self.url, self.weights_port, self._process = url, weights_port, process
        self._http = httpx.Client(base_url=url, timeout=600.0)

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def wait_ready(self, log: Path, path: str = "/ready") -> None:
        """Until `path` answers with 200; RuntimeError with its log's end if it does not."""
        end = time.monotonic() + START_DEADLINE_S
        while time.monotonic() < end and self.exit_code is None:
            try:
                if self._http.get(path, timeout=5.0).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.1)
        end_of_log = log.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"the service did not get ready; the end of its log:\n{end_of_log}")

    def stop(self) -> None:
        """SIGTERM, and SIGKILL for what is left of it after a minute."""
        if self.exit_code is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_DEADLINE_S)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        """Without a word, and all that it started."""
        os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()

    def weights(self) -> dict[str, Any]:
        """`GET /weights`."""
        return self._json("GET", "/weights")

    def generate(self, **body: Any) -> dict[str, Any]:
        """`POST /generate`."""
        return self._json("POST", "/generate", json=body)

    def greedy(self, prompts: Sequence[str], max_tokens: int) -> list[tuple[list[int], list[float]]]:
        """Token ids and log-probs, one prompt after another, so that no batch can change a last bit."""
        sampling = {"temperature": 0.0, "max_tokens": max_tokens}
        replies = [self.generate(prompts=[prompt], sampling=sampling) for prompt in prompts]
        found = [reply["results"][0]["completions"][0] for reply in replies]
        return [(completion["token_ids"], completion["logprobs"]) for completion in found]

    def reload(self) -> float:
        """Have vLLM's own server read its checkpoint again; seconds, in which it cannot sample."""
        started = time.monotonic()
        self._json("POST", "/collective_rpc", json={"method": "reload_weights"})
        return time.monotonic() - started

    def _json(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        reply = self._http.request(method, path, **options)
        reply.raise_for_status()
        body: dict[str, Any] = reply.json()
        return body


@contextmanager
def service(model: str, quantization: str, log: Path, *flags: str) -> Iterator[ServiceProcess]:
    """A service on free ports, ready; RuntimeError with its log's end if it does not get ready."""
    arguments = ["flashrl_rollout", "serve", "--model", model, "--quantization", quantization, *flags]
    with _running(arguments, log, {}) as running:
        yield running


@contextmanager
def scripted_service(log: Path, options: dict[str, Any], **settings: object) -> Iterator[ServiceProcess]:
    """The same around the engine that computes no model; `options` are its own, `settings` those of every service."""
    with _running(["flashrl_rollout.scripted_service", json.dumps(options)], log, settings) as running:
        yield running


@contextmanager
def tiny_service(
    log: Path, *, real: bool, quantization: str, scripted: dict[str, Any], settings: dict[str, Any]
) -> Iterator[ServiceProcess]:
    """The tiny model under vLLM on one thread of the CPU, or its weights in the scripted engine."""
    if real:
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
        flags += ["--device=cpu", "--max-model-len=256", "--max-num-seqs=64", "--enforce-eager", "--threads=1"]
        flags += ["--quantize-layers=all"]
        with service(str(TINY_MODEL), quantization, log, *flags) as running:
            yield running
    else:
        options = {"folder": str(TINY_MODEL), "quantization": quantization} | scripted
        with scripted_service(log, options, **settings) as running:
            yield running


@contextmanager
def stock_server(model: str, log: Path, *flags: str) -> Iterator[ServiceProcess]:
    """vLLM's own server, as a user would start it, in development mode, without which HTTP reaches no reload."""
    port = free_port()
    # the command `vllm serve` itself asks for a distribution named vllm, which that for the CPU is not
    line = ["vllm.entrypoints.openai.api_server", "--model", model, "--host", "127.0.0.1", "--port", str(port), *flags]
    variables = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with _ending_on_sigterm(), _ready(_start_module(line, log, variables, port), log, "/health") as running:
        yield running


def start_scripted(log: Path, options: dict[str, Any], port: int, weights_port: int) -> ServiceProcess:
    """The same on ports of the caller's, who has to `kill` it; ready when this returns."""
    arguments = ["flashrl_rollout.scripted_service", json.dumps(options)]
    running = _start(arguments, log, {"port": port, "weights_port": weights_port})
    running.wait_ready(log)
    return running


def start_real(model: Path, log: Path, port: int, weights_port: int, *flags: str) -> ServiceProcess:
    """`flashrl-rollout serve` on ports of the caller's, who has to `kill` or `stop` it; not ready when this returns."""
    arguments = ["flashrl_rollout", "serve", "--model", str(model), *flags]
    return _start(arguments, log, {"port": port, "weights_port": weights_port})


@contextmanager
def _running(arguments: list[str], log: Path, settings: dict[str, object]) -> Iterator[ServiceProcess]:
    values = {"port": free_port(), "weights_port": free_port()} | settings
    with _ending_on_sigterm(), _ready(_start(arguments, log, values), log, "/ready") as running:
        yield running


@contextmanager
def _ready(running: ServiceProcess, log: Path, path: str) -> Iterator[ServiceProcess]:
    """Ready once `path` answers, stopped when the block ends."""
    try:
        running.wait_ready(log, path)
        yield running
    finally:
        running.stop()


def _start(arguments: list[str], log: Path, values: dict[str, Any]) -> ServiceProcess:
    variables = {f"FLASHRL_ROLLOUT_{name.upper()}": str(value) for name, value in values.items()}
    return _start_module(arguments, log, variables, values["port"], values["weights_port"])


def _start_module(
    arguments: list[str], log: Path, variables: dict[str, str], port: int, weights_port: int = 0
) -> ServiceProcess:
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdout=out,
            stderr=out,
            env=os.environ | variables,
            start_new_session=True,
        )
    return ServiceProcess(f"http://127.0.0.1:{port}", weights_port, process)


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """SIGTERM, as from `timeout`, unwinds this process: else its services, in sessions of their own, would stay."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def free_port() -> int:
    """One that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
