"""What is known of an HTTP request once it is answered: a log line for people, numbers for whoever counts.

Pure ASGI, the outermost layer of all. Knows nothing of routes, which tell it what they want told (`note`).
"""

import logging
import re
import time
import uuid
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flashrl_rollout.logs import fields

_KEY = "flashrl.request"
_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_ID_HEADER = b"x-request-id"

logger = logging.getLogger(__name__)


@dataclass
class RequestRecord:
    """One request: `route` is the template of its path, `error` the code of its refusal, `facts` for the log."""

    request_id: str
    method: str
    began: float = field(default_factory=time.monotonic)
    route: str = "other"
    status: int = 0
    seconds: float = 0.0
    error: str | None = None
    has_ended: bool = False
    is_abandoned: bool = False
    facts: dict[str, object] = field(default_factory=dict)

    def line(self) -> dict[str, object]:
        """Named values of its log line."""
        known = {"request_id": self.request_id, "method": self.method, "route": self.route, "status": self.status}
        return known | {"seconds": round(self.seconds, 4), "error": self.error} | self.facts


OnEnd = Callable[[RequestRecord], None]


def note(scope: MutableMapping[str, Any], **facts: object) -> None:
    """Add named values to a request's log line: numbers and codes, never what it says or who may say it."""
    scope[_KEY].facts.update(facts)


def note_error(scope: MutableMapping[str, Any], code: str) -> None:
    """The code of the error that the request is answered with."""
    scope[_KEY].error = code


class RequestRecords:
    """Makes a record of every request, and gives it to `on_end` before the client sees the end of its reply."""

    def __init__(self, app: ASGIApp, on_end: OnEnd) -> None:
        self._app, self._on_end = app, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = scope[_KEY] = RequestRecord(_request_id(scope), scope["method"])

        async def receiving() -> Message:
            message = await receive()
            record.is_abandoned |= message["type"] == "http.disconnect" and not record.has_ended
            return message

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message.setdefault("headers", []).append((_ID_HEADER, record.request_id.encode()))
            elif message["type"] == "http.response.body" and not message.get("more_body", False):
                self._end(record, scope)
            await send(message)

        try:
            await self._app(scope, receiving, sending)
        finally:  # after the reply, or without one: what was raised is answered with 500 further out
            self._end(record, scope)

    def _end(self, record: RequestRecord, scope: Scope) -> None:
        if record.has_ended:
            return
        record.has_ended = True
        if not record.status:
            record.status, record.error = 500, "error"
        elif record.status >= 400 and record.error is None and not record.is_abandoned:
            record.error = "other"  # the engine's own routes answer in their own words
        record.seconds = time.monotonic() - record.began
        # the template, not the path: a metric must not grow with what clients make up
        record.route = getattr(scope.get("route"), "path", "other")
        self._on_end(record)
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("request", extra=fields(**record.line()))


def _request_id(scope: Scope) -> str:
    """The client's own, where it is one that a log can bear."""
    given = dict(scope["headers"]).get(_ID_HEADER, b"")
    return given.decode() if _ID.fullmatch(given) else uuid.uuid4().hex
