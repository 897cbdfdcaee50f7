"""The health check of a container, against a real server."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import health
import pytest


class Service(BaseHTTPRequestHandler):
    """Ready for who has the token."""

    def do_GET(self) -> None:
        is_good = self.path == "/ready" and self.headers["Authorization"] == "Bearer secret"
        self.send_response(200 if is_good or self.path == "/metrics" else 401)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def port() -> Iterator[int]:
    server = HTTPServer(("127.0.0.1", 0), Service)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_service_is_well_once_it_is_ready(port: int, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret\n")
    environ = {"FLASHRL_PART": "rollout", "FLASHRL_ROLLOUT_PORT": str(port), "FLASHRL_ROLLOUT_TOKEN_FILE": str(token)}
    assert health.is_well(environ)
    token.write_text("other\n")
    assert not health.is_well(environ)


def test_a_trainer_is_asked_for_its_metrics_where_it_has_a_port(port: int) -> None:
    assert health.is_well({"FLASHRL_PART": "trainer", health.TRAINER_PORT: str(port)})
    assert health.is_well({"FLASHRL_PART": "trainer"})


def test_nobody_there_is_not_well() -> None:
    assert not health.answers(1, "/ready")
