"""The rollout service as the trainer sees it over HTTP: every wait has a limit, every failure names the URL.

Knows the routes and what may be repeated; knows nothing of rewards, weights' values or ZeroMQ.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import httpx
from pydantic import TypeAdapter
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_exponential
from tenacity.asyncio import AsyncRetrying

from flashrl_wire.errors import NotReadyError, QueueFullError, UpdateInProgressError, WireError, from_body
from flashrl_wire.layout import TensorSpec, WeightLayout
from flashrl_wire.messages import (
    CommitReply,
    GenerateRequest,
    GenerateResponse,
    LoadCheckpoint,
    Manifest,
    TransferAccepted,
    WeightsInfo,
)

CONTROL_TIMEOUT_S = 30.0
MAX_CONCURRENT_REQUESTS = 64
_LAYOUT = TypeAdapter(list[TensorSpec])


class ServiceUnreachableError(RuntimeError):
    """No usable answer from a service before the deadline."""


class RolloutClient:
    """One replica. Blocking calls, safe to repeat; `generate` runs many requests at a time."""

    def __init__(self, url: str, token: str | None, *, request_timeout_s: float, retry_s: float = 60.0) -> None:
        self.url = url.rstrip("/")
        self._headers = {"Content-Type": "application/json"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self._request_timeout_s, self._retry_s = request_timeout_s, retry_s
        self._http = httpx.Client(base_url=self.url, headers=self._headers, timeout=CONTROL_TIMEOUT_S)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def wait_ready(self, deadline_s: float, on_wait: Callable[[str], None]) -> None:
        """Return once `/ready` says so; ServiceUnreachableError names URL and last answer after the deadline."""
        end = time.monotonic() + deadline_s
        while True:
            state = self._ready_state()
            if state is None:
                return
            if time.monotonic() >= end:
                raise ServiceUnreachableError(
                    f"rollout service at {self.url} not ready after {deadline_s:g} s: {state}"
                )
            on_wait(state)
            time.sleep(min(1.0, max(0.0, end - time.monotonic())))

    def _ready_state(self) -> str | None:
        try:
            reply = self._http.get("/ready", timeout=5.0)
        except httpx.HTTPError as error:
            return _describe(error)
        if reply.status_code == 200:
            return None
        refusal = from_body(reply.status_code, _json(reply))
        if not isinstance(refusal, NotReadyError):
            raise ServiceUnreachableError(f"rollout service at {self.url}: {refusal}")
        return refusal.message

    def weights(self) -> WeightsInfo:
        """Version, digest and what a handshake compares."""
        return WeightsInfo.model_validate(self._call("GET", "/weights"))

    def layout(self) -> WeightLayout:
        """What the service stores how."""
        return WeightLayout.of(_LAYOUT.validate_python(self._call("GET", "/weights/layout")))

    def begin(self, manifest: Manifest) -> TransferAccepted:
        """Announce a delta or snapshot."""
        body = manifest.model_dump_json()
        return TransferAccepted.model_validate(self._call("POST", "/load_weights", content=body))

    def commit(self, transfer_id: str, timeout_s: float) -> CommitReply:
        """Commit a staged transfer; may be repeated."""
        path = f"/load_weights/{transfer_id}/commit"
        return CommitReply.model_validate(self._call("POST", path, timeout=timeout_s))

    def abort(self, transfer_id: str) -> None:
        """Drop a transfer; may be repeated."""
        self._call("DELETE", f"/load_weights/{transfer_id}", timeout=5.0, retry_s=0.0)

    def release(self, run_id: str) -> None:
        """Let another trainer be followed; best effort, since the service forgets an idle one by itself."""
        with suppress(WireError, ServiceUnreachableError):
            self._call("DELETE", f"/runs/{run_id}", timeout=5.0, retry_s=0.0)

    def load_checkpoint(self, path: str, version: int, timeout_s: float) -> CommitReply:
        """Have the service read a folder on its own disk."""
        body = LoadCheckpoint(kind="checkpoint", path=path, version=version).model_dump_json()
        return CommitReply.model_validate(self._call("POST", "/load_weights", content=body, timeout=timeout_s))

    def generate(
        self, requests: Sequence[GenerateRequest], on_done: Callable[[GenerateResponse], None] = lambda _: None
    ) -> list[GenerateResponse]:
        """Replies in the order of `requests`, sent concurrently; `on_done` is called as each arrives."""
        try:
            return asyncio.run(self._generate(requests, on_done))
        except ExceptionGroup as group:  # the requests fail for one reason; the first says it
            raise group.exceptions[0] from None

    async def _generate(
        self, requests: Sequence[GenerateRequest], on_done: Callable[[GenerateResponse], None]
    ) -> list[GenerateResponse]:
        slots = asyncio.Semaphore(MAX_CONCURRENT_REQUESTS)
        timeout = httpx.Timeout(self._request_timeout_s, connect=10.0)
        limits = httpx.Limits(max_connections=MAX_CONCURRENT_REQUESTS)
        async with (
            httpx.AsyncClient(base_url=self.url, headers=self._headers, timeout=timeout, limits=limits) as http,
            asyncio.TaskGroup() as group,
        ):

            async def one(request: GenerateRequest) -> GenerateResponse:
                async with slots:
                    reply = await self._post_generate(http, request)
                on_done(reply)
                return reply

            tasks = [group.create_task(one(request)) for request in requests]
        return [task.result() for task in tasks]

    async def _post_generate(self, http: httpx.AsyncClient, request: GenerateRequest) -> GenerateResponse:
        body = request.model_dump_json()
        async for attempt in AsyncRetrying(**_policy(self._retry_s), retry_error_callback=self._give_up):
            with attempt:
                reply = await http.post("/generate", content=body)
                return GenerateResponse.model_validate(_checked(reply))
        raise AssertionError("tenacity either returns or raises")

    def _call(self, method: str, path: str, *, retry_s: float | None = None, **options: Any) -> Any:
        policy = _policy(self._retry_s if retry_s is None else retry_s)
        for attempt in Retrying(**policy, retry_error_callback=self._give_up):
            with attempt:
                return _checked(self._http.request(method, path, **options))
        raise AssertionError("tenacity either returns or raises")

    def _give_up(self, state: RetryCallState) -> Any:
        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, httpx.HTTPError):
            raise ServiceUnreachableError(f"rollout service at {self.url}: {_describe(error)}") from error
        assert error is not None
        raise error


def _policy(retry_s: float) -> dict[str, Any]:
    return {
        "retry": retry_if_exception(_may_pass),
        "stop": stop_after_delay(retry_s),
        "wait": _wait,
    }


_BACKOFF = wait_exponential(multiplier=0.2, max=5.0)


def _wait(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    asked = error.facts.get("retry_after_s") if isinstance(error, WireError) else None
    return float(asked) if isinstance(asked, int | float) else _BACKOFF(state)


def _may_pass(error: BaseException) -> bool:
    """Whether the same call may succeed later: a lost connection, a full queue, a service that is starting."""
    if isinstance(error, httpx.HTTPError):
        return not isinstance(error, httpx.UnsupportedProtocol | httpx.ReadTimeout)
    return isinstance(error, NotReadyError | QueueFullError | UpdateInProgressError)


def _checked(reply: httpx.Response) -> Any:
    if reply.is_success:
        return _json(reply)
    error = from_body(reply.status_code, _json(reply))
    if (asked := reply.headers.get("retry-after", "")).isdigit():
        error.facts["retry_after_s"] = float(asked)
    raise error


def _json(reply: httpx.Response) -> Any:
    try:
        return reply.json()
    except ValueError:
        return reply.text


def _describe(error: httpx.HTTPError) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
