"""An HTTP server that gives the answers it was told to, and notes what it was asked and when.

Knows sockets; knows nothing of rollout services.
"""

import json
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LIMIT_S = 20.0


@dataclass(frozen=True)
class Answer:
    """A reply; it is given once `when` is set, and never where `hang_up`: the connection is closed without a word."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    when: threading.Event | None = None
    hang_up: bool = False


HANG_UP = Answer(hang_up=True)


def refusal(status: int, code: str, message: str, headers: dict[str, str] | None = None, **facts: object) -> Answer:
    """An error as the service words it."""
    return Answer({"error": {"code": code, "message": message, **facts}}, status, headers or {})


@dataclass(frozen=True)
class Asked:
    """A request as it arrived."""

    at: float
    headers: dict[str, str]
    body: Any


class ScriptedHttp:
    """Answers of a route are given in order, the last one again and again."""

    def __init__(self) -> None:
        self.asked: dict[str, list[Asked]] = defaultdict(list)
        self._answers: dict[str, list[Answer]] = {}
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def on(self, route: str, *answers: Answer) -> None:
        """`on("GET /weights", Answer({...}))`."""
        self._answers[route] = list(answers)

    def _next(self, route: str, asked: Asked) -> Answer:
        with self._lock:
            self.asked[route].append(asked)
            answers = self._answers.get(route, [refusal(404, "not_found", f"nobody expected {route}")])
            return answers.pop(0) if len(answers) > 1 else answers[0]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        script = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                content = self.rfile.read(int(self.headers.get("content-length", 0)))
                asked = Asked(time.monotonic(), dict(self.headers), json.loads(content) if content else None)
                answer = script._next(f"{self.command} {self.path}", asked)
                if answer.when is not None:
                    answer.when.wait(LIMIT_S)
                if answer.hang_up:
                    self.close_connection = True
                    return
                body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
                self.send_response(answer.status)
                for name, value in {"Content-Length": str(len(body)), **answer.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = do_DELETE = answer  # noqa: N815 (the base class looks them up by these names)

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing."""

        return Handler

    @contextmanager
    def serving(self) -> Iterator["ScriptedHttp"]:
        """Answer until the block ends."""
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            thread.join(LIMIT_S)
            self._server.server_close()
