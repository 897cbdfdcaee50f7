"""A stack of the compose files in a clone of this repository: start it, look into it, break it.

Knows Docker's command line and host processes; knows nothing of what a test wants to see.
"""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[2]
POLL_S = 0.002
DEADLINE_S = 1800.0


def commands() -> list[list[str]]:
    """The compose commands of this machine: the plugin (v2), then docker-compose (v1); FLASHRL_COMPOSE chooses one."""
    if chosen := os.environ.get("FLASHRL_COMPOSE"):
        return [chosen.split()]
    candidates = [["docker", "compose"], ["docker-compose"]]
    return [c for c in candidates if shutil.which(c[0]) and run([*c, "version"], check=False).returncode == 0]


def run(command: list[str], *, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
    """Text in, text out."""
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0 or not check, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done


class Stack:
    """One compose project."""

    def __init__(self, folder: Path, project: str, command: list[str], **variables: str) -> None:
        self.folder, self.project = folder, project
        self.runs = Path(variables.get("FLASHRL_RUNS", folder / "runs"))
        self.command = command
        # without the buildx plugin only the older builder is there
        legacy = {} if run(["docker", "buildx", "version"], check=False).returncode == 0 else {"DOCKER_BUILDKIT": "0"}
        self._environ = {**os.environ, **legacy, "COMPOSE_PROJECT_NAME": project, **variables}
        self.log = folder / f"{project}.log"
        self._up: subprocess.Popen[bytes] | None = None

    def environ(self, name: str) -> str:
        """A variable that compose sees."""
        return self._environ[name]

    def compose(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """One compose command to its end."""
        return run([*self.command, *arguments], check=check, cwd=self.folder, env=self._environ)

    @contextmanager
    def up(self, *arguments: str) -> Iterator["subprocess.Popen[bytes]"]:
        """`compose up` in the foreground of a log file; all of it, volumes too, is gone afterwards."""
        with self.log.open("wb") as log:
            process = subprocess.Popen(
                [*self.command, "up", *arguments], cwd=self.folder, env=self._environ, stdout=log, stderr=log
            )
            self._up = process
            try:
                yield process
            finally:
                self._up = None
                if process.poll() is None:
                    process.terminate()
                    process.wait(180)
                self.compose("down", "--volumes", "--remove-orphans", "--timeout", "20", check=False)

    def until(self, what: str, ready: Callable[[], Any], deadline_s: float = DEADLINE_S, poll_s: float = POLL_S) -> Any:
        """What `ready` returns once that is true; AssertionError after the deadline, or once `up` has ended."""
        end = time.monotonic() + deadline_s
        while time.monotonic() < end:
            if value := ready():
                return value
            assert self._up is None or self._up.poll() is None, f"no {what}: {self.log.read_text()[-3000:]}"
            time.sleep(poll_s)
        raise AssertionError(f"no {what} within {deadline_s:g} s")

    def containers(self, service: str) -> list[dict[str, Any]]:
        """What Docker knows of a service's containers, by name."""
        labels = [f"label=com.docker.compose.{k}={v}" for k, v in (("project", self.project), ("service", service))]
        filters = [word for label in labels for word in ("--filter", label)]
        ids = run(["docker", "ps", "--all", "--quiet", *filters]).stdout.split()
        found = json.loads(run(["docker", "inspect", *ids]).stdout) if ids else []
        return sorted(found, key=lambda container: container["Name"])

    def container(self, service: str) -> dict[str, Any]:
        """The only container of a service."""
        (one,) = self.containers(service)
        return one

    def running(self, service: str) -> dict[str, Any] | None:
        """The first container of a service that runs."""
        return next((one for one in self.containers(service) if one["State"]["Running"]), None)

    def url(self, container: dict[str, Any]) -> str:
        """Where the host reaches a replica's API."""
        (published,) = container["NetworkSettings"]["Ports"]["8000/tcp"]
        assert published["HostIp"] == "127.0.0.1"
        return f"http://127.0.0.1:{published['HostPort']}"

    def token(self) -> str:
        """The API token, as a person gets it."""
        return self.compose("exec", "-T", "rollout", "cat", "/keys/service/token").stdout.strip()

    def rows(self) -> list[dict[str, Any]]:
        """The run's rows so far, on the host."""
        files = list(self.runs.glob("*/metrics.jsonl"))
        lines = files[0].read_text().splitlines() if files else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def finish(self, process: "subprocess.Popen[bytes]", deadline_s: float = DEADLINE_S) -> None:
        """Wait for the end of `up`; the trainer's exit code, and every service's, must be 0."""
        assert process.wait(deadline_s) == 0, self.log.read_text()[-3000:]
        codes = {one["Name"]: one["State"]["ExitCode"] for s in ("trainer", "rollout") for one in self.containers(s)}
        assert set(codes.values()) == {0}, (codes, self.log.read_text()[-3000:])


def kill(container: dict[str, Any]) -> None:
    """kill -9 of a container's first process, from the host: Docker sees a crash, not a stop."""
    os.kill(container["State"]["Pid"], 9)


def get(url: str, token: str = "") -> httpx.Response:
    """As curl would."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return httpx.get(url, headers=headers, timeout=10, trust_env=False)
