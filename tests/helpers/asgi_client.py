"""A client of an ASGI app that reads a reply piece by piece and can leave, neither of which httpx's transport can.

Knows ASGI; knows nothing of what is tested.
"""

import asyncio
import json
from typing import Any

from starlette.types import ASGIApp, Message

LIMIT_S = 20.0


class AsgiCall:
    """One request under way; `await call.ended()` is its status, `content` what has come so far."""

    def __init__(self, app: ASGIApp, path: str, body: Any) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.content = b""
        self._has_sent = False
        self._body = json.dumps(body).encode()
        self._left, self._changed = asyncio.Event(), asyncio.Condition()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(self._body)).encode())]
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
            "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
            "headers": headers, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
        }  # fmt: skip
        self._task = asyncio.ensure_future(app(scope, self._receive, self._send))

    def leave(self) -> None:
        """Close the connection."""
        self._left.set()

    async def begun(self) -> None:
        """Wait for the first piece of the reply's body."""
        async with asyncio.timeout(LIMIT_S), self._changed:
            await self._changed.wait_for(lambda: bool(self.content))

    async def ended(self) -> int:
        """Wait until the app is done with the request."""
        async with asyncio.timeout(LIMIT_S):
            await self._task
        return self.status

    def json(self) -> Any:
        """The reply's body."""
        return json.loads(self.content)

    async def _receive(self) -> Message:
        if not self._has_sent:
            self._has_sent = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], dict(message["headers"])
            return
        async with self._changed:
            self.content += message.get("body", b"")
            self._changed.notify_all()
