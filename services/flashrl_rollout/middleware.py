"""What happens to every request before a route sees it: the token, the size of its body, the count of its reply.

Pure ASGI, so that a client's disconnect reaches the routes. Knows nothing of routes or engines.
"""

import asyncio
import json
import logging
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flashrl_rollout.security import is_authorized
from flashrl_wire.errors import MalformedError, TooLargeError, UnauthorizedError, WireError

_OPEN_PATHS = frozenset({"/health"})  # a load balancer has no token
_BODY_TIMEOUT_S = 60.0
_RETRY_AFTER_S = {429: 1, 503: 2}

logger = logging.getLogger(__name__)


def error_headers(error: WireError) -> dict[str, str]:
    """Headers that go with an error."""
    headers = {"content-type": "application/json"}
    if error.status in _RETRY_AFTER_S:
        headers["retry-after"] = str(_RETRY_AFTER_S[error.status])
    if error.status == UnauthorizedError.status:
        headers["www-authenticate"] = "Bearer"
    return headers


def error_content(error: WireError, path: str) -> bytes:
    """The JSON of an error: ours, or under /v1 that of OpenAI's clients."""
    if path.startswith("/v1/"):
        body: object = {"error": {"message": error.message, "type": error.code, "param": None, "code": error.status}}
    else:
        body = error.body()
    return json.dumps(body).encode()


async def send_error(error: WireError, scope: Scope, send: Send) -> None:
    """Answer a request that no route will see."""
    headers = [(name.encode(), value.encode()) for name, value in error_headers(error).items()]
    headers.append((b"connection", b"close"))  # the rest of its body is not read
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": error_content(error, scope["path"])})


class TokenCheck:
    """401 for every request without the token, except to /health."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._is_allowed(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await send_error(UnauthorizedError("the Authorization header has no valid token"), scope, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _is_allowed(self, scope: Scope) -> bool:
        if scope["type"] == "lifespan" or scope["path"] in _OPEN_PATHS:
            return True
        return is_authorized(dict(scope["headers"]).get(b"authorization"), self._token)


class BodyLimit:
    """413 for a body over the limit, before anything of it is parsed."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(_BODY_TIMEOUT_S):
                body = await self._read(scope, receive)
        except WireError as error:
            await send_error(error, scope, send)
        except TimeoutError:
            await send_error(MalformedError(f"the body was not complete after {_BODY_TIMEOUT_S:g} s"), scope, send)
        else:
            await self._app(scope, _replay(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> Message:
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit():
            self._check(int(declared))
        pieces: list[bytes] = []
        num_bytes = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return message
            pieces.append(message.get("body", b""))
            num_bytes += len(pieces[-1])
            self._check(num_bytes)
            if not message.get("more_body", False):
                return {"type": "http.request", "body": b"".join(pieces), "more_body": False}

    def _check(self, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            raise TooLargeError(f"the body has more than {self._max_bytes} bytes")


def _replay(first: Message, receive: Receive) -> Receive:
    """`first`, then whatever comes from the client: its disconnect."""
    pending = [first]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay


class RequestCount:
    """Reports route and status of every request."""

    def __init__(self, app: ASGIApp, count: Callable[[str, int], None]) -> None:
        self._app, self._count = app, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                # the template, not the path: a metric must not grow with what clients make up
                self._count(getattr(scope.get("route"), "path", "other"), message["status"])
            await send(message)

        await self._app(scope, receive, counted)
