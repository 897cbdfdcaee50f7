"""Trainer and service programs in processes of their own, forked from one that has imported everything already.

Importing torch and transformers takes seconds a process, and these tests need many. Knows how to start a program and
what it left behind; knows nothing of what is tested.
"""

import dataclasses
import json
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

LIMIT_S = 180.0  # for a crowded machine; nothing waits for it in vain
IMPORTED = [
    "flashrl_trainer.commands",
    "flashrl_trainer.report",
    "flashrl_rollout.scripted_folder",
    "flashrl_rollout.scripted_service",
    "matplotlib.pyplot",
    "torch.distributed.fsdp",
    "transformers.models.qwen2.modeling_qwen2",
]

_context = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Ended:
    """Exit code, standard output and error of a program."""

    code: int
    output: str
    errors: str


class Program:
    """A running program: `name` of PROGRAMS with its arguments and, beside what it inherits, variables."""

    def __init__(self, name: str, arguments: Sequence[str], log: Path, variables: dict[str, str]) -> None:
        self._output, self._errors = log.with_suffix(".out"), log.with_suffix(".err")
        run = (name, list(arguments), str(self._output), str(self._errors), variables)
        self._process = _context.Process(target=_run, args=run, daemon=True)
        os.environ["OMP_NUM_THREADS"] = "1"  # the fork server inherits it, and is started by the first process
        _context.set_forkserver_preload(IMPORTED)
        self._process.start()

    def ends_within(self, seconds: float) -> bool:
        """Whether it has ended, or does so in that time."""
        self._process.join(seconds)
        return not self._process.is_alive()

    @property
    def errors(self) -> str:
        """What it has written to standard error so far."""
        return self._errors.read_text() if self._errors.exists() else ""

    def signal(self, number: signal.Signals) -> None:
        """As from a terminal or `kill`."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        """End it without a chance to clean up, if it has not ended."""
        self._process.kill()
        self._process.join(LIMIT_S)

    def wait(self) -> Ended:
        """How it ended; an AssertionError with its errors if it does not."""
        self._process.join(LIMIT_S)
        code = self._process.exitcode
        assert code is not None, f"still running after {LIMIT_S:g} s:\n{self.errors}"
        return Ended(code, self._output.read_text(), self.errors)


class ServiceProgram(Program):
    """A scripted service with the weights of a model's folder; `deaf`: it hears nothing on its weights port."""

    def __init__(
        self,
        log: Path,
        ports: Sequence[int],
        *,
        deaf: bool = False,
        settings: Mapping[str, object] | None = None,
        **options: Any,
    ) -> None:
        values = {"port": ports[0], "weights_port": ports[1], "stage_root": log.parent} | dict(settings or {})
        name = "deaf service" if deaf else "service"
        variables = {f"FLASHRL_ROLLOUT_{key.upper()}": str(value) for key, value in values.items()}
        super().__init__(name, [json.dumps(options)], log, variables)
        self.url = f"http://127.0.0.1:{ports[0]}"
        self._http = httpx.Client(base_url=self.url, timeout=LIMIT_S)  # one, since making it takes 30 ms

    def give_token(self, token: str) -> None:
        """What to ask it with from now on."""
        self._http.headers["Authorization"] = f"Bearer {token}"

    @property
    def is_ready(self) -> bool:
        """Whether its model is loaded."""
        try:
            return self._http.get("/ready").is_success
        except httpx.ConnectError:
            return False

    def generate(self, **body: Any) -> dict[str, Any]:
        """POST /generate."""
        return dict(self._http.post("/generate", json=body).raise_for_status().json())

    def until_ready(self) -> None:
        """Return once it is; AssertionError with its errors if it ends before that."""
        while not self.is_ready:
            assert not self.ends_within(0.02), self.errors

    def weights(self) -> dict[str, Any]:
        """GET /weights."""
        return dict(self._http.get("/weights").raise_for_status().json())

    @property
    def is_sampling(self) -> bool:
        """Whether a request is at work."""
        return "flashrl_active_requests 0.0" not in self._http.get("/metrics").text


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on at this moment."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _run(name: str, arguments: list[str], output: str, errors: str, variables: dict[str, str]) -> None:
    """In the new process: be that program."""
    for number, file in ((1, output), (2, errors)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
    for variable in [variable for variable in os.environ if variable.startswith("FLASHRL_")]:
        del os.environ[variable]
    os.environ |= {"HF_HUB_OFFLINE": "1", "TERM": "dumb"} | variables
    sys.exit(PROGRAMS[name](arguments))


def _trainer(arguments: list[str]) -> None:
    from flashrl_trainer import cli

    sys.argv = ["flashrl-trainer", *arguments]
    cli.main()


def _service(arguments: list[str]) -> int:
    from flashrl_rollout import scripted_service

    return scripted_service.main(arguments)


def _deaf_service(arguments: list[str]) -> int:
    """Accepts the manifest of an update over HTTP, and none of its chunks: a transfer that never gets on."""
    from flashrl_rollout import startup
    from flashrl_rollout.config import load_config
    from flashrl_rollout.receiver import Receiver
    from flashrl_rollout.scripted_service import start_engine
    from flashrl_rollout.serving import serve

    class Deaf(Receiver):
        def start(self) -> None:
            pass

        @property
        def is_alive(self) -> bool:
            return True

        def stop(self) -> None:
            pass

    config = load_config(None, os.environ, {"model": "scripted"})
    bound = startup.bind(config)
    bound.receiver.stop()
    deaf = dataclasses.replace(bound, receiver=Deaf(config.host, config.weights_port))
    return serve(config, deaf, lambda: start_engine(json.loads(arguments[0])))


def _publisher(arguments: list[str]) -> int:
    from tests.faults import publisher_program

    return publisher_program.main(arguments)


PROGRAMS = {"trainer": _trainer, "service": _service, "deaf service": _deaf_service, "publisher": _publisher}
