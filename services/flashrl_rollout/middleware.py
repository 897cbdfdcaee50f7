"""What happens to every request before a route sees it: the token, and the size of its body.

Pure ASGI, so that a client's disconnect reaches the routes. Knows nothing of routes or engines.
"""

import asyncio
import json
import logging
from collections.abc import Callable

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flashrl_rollout.refusals import Refusals
from flashrl_rollout.request_record import note_error
from flashrl_rollout.security import is_authorized
from flashrl_rollout.status_page import Page
from flashrl_wire.errors import MalformedError, QueueFullError, TooLargeError, UnauthorizedError, WireError

_OPEN_PATHS = frozenset({"/health"})  # a load balancer has no token
_BODY_TIMEOUT_S = 60.0
_BODIES_AT_ONCE = 8  # of the largest size: what all requests together may make the process hold
_RETRY_AFTER_S = {429: 1, 503: 2}

logger = logging.getLogger(__name__)


def error_headers(error: WireError) -> dict[str, str]:
    """Headers that go with an error."""
    headers = {"content-type": "application/json"}
    if error.status in _RETRY_AFTER_S:
        headers["retry-after"] = str(error.facts.get("retry_after_s", _RETRY_AFTER_S[error.status]))
    if error.status == UnauthorizedError.status:
        headers["www-authenticate"] = "Bearer"
    return headers


def error_content(error: WireError, path: str) -> bytes:
    """The JSON of an error: ours, or on vLLM's own routes that of OpenAI's clients."""
    if path.startswith(("/v1/", "/inference/")):
        body: object = {"error": {"message": error.message, "type": error.code, "param": None, "code": error.status}}
    else:
        body = error.body()
    return json.dumps(body).encode()


async def send_error(error: WireError, scope: Scope, send: Send) -> None:
    """Answer a request that no route will see."""
    note_error(scope, error.code)
    headers = [(name.encode(), value.encode()) for name, value in error_headers(error).items()]
    headers.append((b"connection", b"close"))  # the rest of its body is not read
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": error_content(error, scope["path"])})


class TokenCheck:
    """401 for every request without the token, except to /health.

    At / the body of the 401 is `page`, which says nothing of the service, but lets a person type the token.
    """

    def __init__(self, app: ASGIApp, token: str, page: Page) -> None:
        self._app, self._token, self._page = app, token, page
        self._refusals = Refusals()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._is_allowed(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            error = UnauthorizedError("the Authorization header has no valid token")
            self._refusals.note("an HTTP request: no valid token")
            if (scope["method"], scope["path"]) == ("GET", "/"):
                note_error(scope, error.code)
                headers = self._page.headers | {"www-authenticate": error_headers(error)["www-authenticate"]}
                await Response(self._page.content, error.status, headers)(scope, receive, send)
            else:
                await send_error(error, scope, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _is_allowed(self, scope: Scope) -> bool:
        if scope["type"] == "lifespan" or scope["path"] in _OPEN_PATHS:
            return True
        return is_authorized(dict(scope["headers"]).get(b"authorization"), self._token)


class BodyLimit:
    """413 for a body over the limit, before anything of it is parsed; 429 where all bodies together are too large."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes
        self._held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        held_bytes = 0

        def hold(num_bytes: int) -> None:
            nonlocal held_bytes
            held_bytes += num_bytes
            self._hold(num_bytes)

        try:
            async with asyncio.timeout(_BODY_TIMEOUT_S):
                body = await self._read(scope, receive, hold)
        except WireError as error:
            await send_error(error, scope, send)
        except TimeoutError:
            await send_error(MalformedError(f"the body was not complete after {_BODY_TIMEOUT_S:g} s"), scope, send)
        else:
            await self._app(scope, _replay(body, receive), send)
        finally:
            self._held_bytes -= held_bytes

    async def _read(self, scope: Scope, receive: Receive, hold: Callable[[int], None]) -> Message:
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
            hold(len(pieces[-1]))
            num_bytes += len(pieces[-1])
            self._check(num_bytes)
            if not message.get("more_body", False):
                return {"type": "http.request", "body": b"".join(pieces), "more_body": False}

    def _check(self, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            raise TooLargeError(f"the body has more than {self._max_bytes} bytes")

    def _hold(self, num_bytes: int) -> None:
        self._held_bytes += num_bytes
        if self._held_bytes > _BODIES_AT_ONCE * self._max_bytes:
            raise QueueFullError(f"the bodies of all requests have more than {_BODIES_AT_ONCE * self._max_bytes} bytes")


def _replay(first: Message, receive: Receive) -> Receive:
    """`first`, then whatever comes from the client: its disconnect."""
    pending = [first]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay
