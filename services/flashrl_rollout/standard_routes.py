"""vLLM's own HTTP routes behind the service's gate: who is let in, what counts as active, what ends a reply early.

Knows admission, limits and disconnects; knows nothing of what the routes do, nor of vLLM.
"""

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flashrl_rollout.engine import NUM_SEQUENCES
from flashrl_rollout.generation import ClientGoneError
from flashrl_rollout.middleware import error_content
from flashrl_rollout.versions import VersionGate
from flashrl_wire.errors import NotReadyError, TimedOutError, WireError

ROUTES: Mapping[str, str] = {
    "/v1/models": "GET",
    "/v1/completions": "POST",
    "/v1/chat/completions": "POST",
    "/inference/v1/generate": "POST",
}
"""Path and method of each; no other route of vLLM's can be reached."""

_LEAVE_S = 10.0
_MANY = 1 << 31  # more than any queue holds; JSON's numbers may be too long to be printed again


class StandardRoutes:
    """An ASGI app around vLLM's; a request is active in the gate until the last byte of its reply, streams included."""

    def __init__(self, app: ASGIApp, gate: VersionGate, timeout_s: float) -> None:
        self._app, self._gate, self._timeout_s = app, gate, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ClientGoneError, or the gate's and the limit's WireErrors, where nothing of a reply has been sent."""
        call, reply = _Call(await receive(), receive), _Reply(send)
        # from 2.4 on starlette learns of a disconnect from `send` alone, and a stream could not be ended from here
        inner = {**scope, "asgi": {**scope.get("asgi", {}), "spec_version": "2.3"}, NUM_SEQUENCES: call.num_sequences}
        work = asyncio.create_task(self._work(inner, call, reply))
        gone = asyncio.create_task(call.disconnected())
        fenced = asyncio.create_task(self._gate.fenced())
        try:
            await asyncio.wait({work, gone, fenced}, timeout=self._timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
                return
            error = self._reason(gone, fenced)
            reply.close()
        finally:
            await _hang_up(call, work)
            gone.cancel()
            fenced.cancel()
            await asyncio.gather(gone, fenced, return_exceptions=True)
        await reply.end(error, scope["path"])

    async def _work(self, scope: Scope, call: "_Call", reply: "_Reply") -> None:
        if scope["method"] != "POST":  # asks for no tokens
            await self._app(scope, call.receive, reply.send)
            return
        async with self._gate.admitted(call.num_sequences):
            call.is_waiting = False
            await self._app(scope, call.receive, reply.send)

    def _reason(self, gone: "asyncio.Task[None]", fenced: "asyncio.Task[None]") -> Exception:
        if gone.done():
            return ClientGoneError()
        if not fenced.done():
            return TimedOutError(f"not finished after {self._timeout_s:g} s (request_timeout_s)")
        try:
            self._gate.check()
        except WireError as error:
            return error
        return NotReadyError("sampling was interrupted")


async def _hang_up(call: "_Call", work: "asyncio.Task[None]") -> None:
    """End what is left of a request by telling vLLM that its client has gone, which frees its sequences.

    Cancelled instead, vLLM's handlers would leave the task that samples behind.
    """
    call.is_over.set()
    if not call.is_waiting:
        await asyncio.wait({work}, timeout=_LEAVE_S)
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)


class _Call:
    """A request as vLLM sees it: its body, and a disconnect once `is_over` is set."""

    def __init__(self, first: Message, receive: Receive) -> None:
        self.num_sequences = num_sequences(first.get("body", b""))
        self.is_waiting = True
        self.is_over = asyncio.Event()
        self._first: Message | None = first
        self._receive = receive

    async def receive(self) -> Message:
        """The body, then the disconnect."""
        first, self._first = self._first, None
        if first is not None:
            return first
        await self.is_over.wait()
        return {"type": "http.disconnect"}

    async def disconnected(self) -> None:
        """Wait for the real client to leave."""
        while (await self._receive())["type"] != "http.disconnect":
            pass


class _Reply:
    """What goes to the client: vLLM's messages, or after `close` an error of ours."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._has_begun = self._is_stream = self._is_closed = False

    async def send(self, message: Message) -> None:
        """Pass one of vLLM's messages on."""
        if self._is_closed:
            return
        if message["type"] == "http.response.start":
            self._has_begun = True
            self._is_stream = dict(message["headers"]).get(b"content-type", b"").startswith(b"text/event-stream")
        await self._send(message)

    def close(self) -> None:
        """Let nothing of vLLM's through any more, except the rest of a reply that is no stream."""
        self._is_closed = self._is_stream or not self._has_begun

    async def end(self, error: Exception, path: str) -> None:
        """Raise the error where no reply has begun; in a stream it is the last event."""
        if not self._has_begun:
            raise error
        if self._is_stream and isinstance(error, WireError):
            event = b"data: " + error_content(error, path) + b"\n\ndata: [DONE]\n\n"
            await self._send({"type": "http.response.body", "body": event})


def num_sequences(body: bytes) -> int:
    """Prompts x n of a request, as far as that can be told; a body that the route will refuse counts as one."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return 1
    if not isinstance(request, dict):
        return 1
    sampling = request.get("sampling_params")
    n = sampling.get("n") if isinstance(sampling, dict) else request.get("n")
    return _num_prompts(request.get("prompt")) * _count(n)


def _num_prompts(prompt: Any) -> int:
    is_list_of_prompts = isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list)
    return len(prompt) if is_list_of_prompts else 1


def _count(n: Any) -> int:
    try:
        return max(1, min(int(n), _MANY))  # vLLM takes "2" for 2
    except (TypeError, ValueError, OverflowError):
        return 1
