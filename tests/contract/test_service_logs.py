"""What a whole service process writes to standard error with `log_format` json."""

import json
import signal
from pathlib import Path

import httpx
from tests.helpers.forked import LIMIT_S, Program, free_ports


def test_every_line_of_a_service_is_an_object(tmp_path: Path) -> None:
    port, weights_port = free_ports(2)
    settings = {"PORT": port, "WEIGHTS_PORT": weights_port, "STAGE_ROOT": tmp_path}
    settings |= {"LOG_FORMAT": "json", "LOG_LEVEL": "debug"}
    variables = {f"FLASHRL_ROLLOUT_{name}": str(value) for name, value in settings.items()}
    service = Program("service", ["{}"], tmp_path / "service", variables)
    try:
        while '"ready on' not in service.errors:
            assert not service.ends_within(0.02), service.errors
        body = {"prompts": ["hi"], "sampling": {"max_tokens": 2}}
        headers = {"X-Request-Id": "mine"}
        httpx.post(f"http://127.0.0.1:{port}/generate", json=body, headers=headers, timeout=LIMIT_S).raise_for_status()
        service.signal(signal.SIGTERM)
        ended = service.wait()
    finally:
        service.kill()
    lines = [json.loads(line) for line in ended.errors.splitlines()]
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    (request,) = (line for line in lines if line["message"] == "request")
    assert (request["request_id"], request["completion_tokens"], request["versions"]) == ("mine", 2, [0])
    assert lines[-1]["message"].startswith("stopping")
    assert ended.code == 0
