"""A service with hardly any file descriptors, whose log cannot be written."""

import json
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from tests.helpers.forked import LIMIT_S, free_ports

from flashrl_rollout import startup
from flashrl_rollout.config import RolloutConfig

CONNECTIONS = 120
OPEN_FILES = 64


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> int:
    """Of a scripted service that may open 64 files and logs to a full disk."""
    ports, folder = free_ports(2), tmp_path_factory.mktemp("stage")
    settings = {"port": ports[0], "weights_port": ports[1], "stage_root": folder}
    variables = {f"FLASHRL_ROLLOUT_{name.upper()}": str(value) for name, value in settings.items()}
    shell = f'ulimit -n {OPEN_FILES} && exec "$0" -m flashrl_rollout.scripted_service "$1" 2>/dev/full'
    process = subprocess.Popen(["bash", "-c", shell, sys.executable, json.dumps({})], env=os.environ | variables)
    try:
        wait_ready(ports[0], process)
        yield ports[0]
        process.terminate()
        assert process.wait(LIMIT_S) == 0
        assert not any(Path(folder).iterdir())
    finally:
        process.kill()
        process.wait()


def wait_ready(port: int, process: "subprocess.Popen[bytes]") -> None:
    while process.poll() is None:
        try:
            httpx.get(f"http://127.0.0.1:{port}/ready", timeout=LIMIT_S).raise_for_status()
        except httpx.HTTPError:
            continue
        return
    raise AssertionError(f"ended with {process.returncode}")


def test_more_connections_than_files_cost_those_connections_only(port: int) -> None:
    crowd = [socket.create_connection(("127.0.0.1", port)) for _ in range(CONNECTIONS)]
    for connection in crowd:
        connection.close()
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=LIMIT_S) as http:
        assert http.get("/ready").status_code == 200
        reply = http.post("/generate", json={"prompts": ["hi"], "sampling": {"max_tokens": 4}})
        assert reply.status_code == 200


def test_log_that_cannot_be_written_stops_nothing(port: int) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=LIMIT_S) as http:
        assert http.post("/load_weights", json={"kind": "checkpoint", "path": "/x", "version": 1}).status_code == 403
        assert http.get("/ready").status_code == 200


def test_soft_limit_of_open_files_is_raised(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        config = RolloutConfig(model="scripted", port=0, weights_port=0, stage_root=tmp_path)
        startup.bind(config, {}).close()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert (soft > 256, hard) == (True, before[1])
