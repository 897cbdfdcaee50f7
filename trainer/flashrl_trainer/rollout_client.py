"""The rollout service as the trainer sees it over HTTP: every wait has a limit, every failure names the URL.

Knows the routes; knows nothing of rewards, weights' values, ZeroMQ or when to try again (`retries`).
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import httpx
from pydantic import TypeAdapter, ValidationError
from tenacity import Retrying
from tenacity.asyncio import AsyncRetrying

from flashrl_trainer import retries
from flashrl_wire.errors import NotReadyError, WireError, from_body
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
_LAYOUT = TypeAdapter(list[TensorSpec])
T = TypeVar("T")


class ServiceUnreachableError(RuntimeError):
    """No usable answer from a service before the deadline."""


class RolloutClient:
    """One replica. Blocking calls, safe to repeat and from any thread; `generate` is for an event loop."""

    def __init__(self, url: str, token: str | None, *, request_timeout_s: float, retry_s: float = 60.0) -> None:
        self.url = url.rstrip("/")
        self._headers = {"Content-Type": "application/json"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self._request_timeout_s, self._retry_s = request_timeout_s, retry_s
        try:
            self._http = httpx.Client(base_url=self.url, headers=self._headers, timeout=CONTROL_TIMEOUT_S)
        except httpx.InvalidURL as error:
            raise ValueError(f"rollout.urls: {url}: {error}") from None

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def wait_ready(self, deadline_s: float, on_wait: Callable[[str], None]) -> None:
        """Return once `/ready` says so; ServiceUnreachableError names URL and last answer after the deadline.

        A service with poisoned weights is as ready as it gets without an update.
        """
        end = time.monotonic() + deadline_s
        while True:
            state = self.ready_state()
            if state is None:
                return
            if time.monotonic() >= end:
                raise ServiceUnreachableError(
                    f"rollout service at {self.url} not ready after {deadline_s:g} s: {state}"
                )
            on_wait(state)
            time.sleep(min(1.0, max(0.0, end - time.monotonic())))

    def ready_state(self) -> str | None:
        """What the service is waiting for; None: it is ready, or poisoned and ready for a snapshot."""
        try:
            reply = self._http.get("/ready", timeout=5.0)
        except httpx.HTTPError as error:
            return _describe(error)
        if reply.status_code == 200:
            return None
        refusal = from_body(reply.status_code, _json(reply))
        if not isinstance(refusal, NotReadyError):
            raise ServiceUnreachableError(f"rollout service at {self.url}: {refusal}")
        return None if refusal.facts.get("poisoned") else refusal.message

    def weights(self) -> WeightsInfo:
        """Version, digest and what a handshake compares."""
        return self._call(WeightsInfo.model_validate, "GET", "/weights")

    def layout(self) -> WeightLayout:
        """What the service stores how."""
        return WeightLayout.of(self._call(_LAYOUT.validate_python, "GET", "/weights/layout"))

    def begin(self, manifest: Manifest) -> TransferAccepted:
        """Announce a delta or snapshot."""
        return self._call(TransferAccepted.model_validate, "POST", "/load_weights", content=manifest.model_dump_json())

    def commit(self, transfer_id: str, timeout_s: float) -> CommitReply:
        """Commit a staged transfer; may be repeated."""
        return self._call(CommitReply.model_validate, "POST", f"/load_weights/{transfer_id}/commit", timeout=timeout_s)

    def abort(self, transfer_id: str) -> None:
        """Drop a transfer; may be repeated."""
        self._call(_anything, "DELETE", f"/load_weights/{transfer_id}", timeout=5.0, retry_s=0.0)

    def release(self, run_id: str) -> None:
        """Let another trainer be followed; best effort, since the service forgets an idle one by itself."""
        with suppress(WireError, ServiceUnreachableError):
            self._call(_anything, "DELETE", f"/runs/{run_id}", timeout=5.0, retry_s=0.0)

    def load_checkpoint(self, path: str, version: int, timeout_s: float) -> CommitReply:
        """Have the service read a folder on its own disk."""
        body = LoadCheckpoint(kind="checkpoint", path=path, version=version).model_dump_json()
        return self._call(CommitReply.model_validate, "POST", "/load_weights", content=body, timeout=timeout_s)

    async def generate(self, http: httpx.AsyncClient, request: GenerateRequest) -> GenerateResponse:
        """One request over `http`, which `session` makes; a full queue is waited for, for as long as it stays full."""
        body = request.model_dump_json()

        async def attempt() -> GenerateResponse:
            return GenerateResponse.model_validate(_checked(await http.post("/generate", content=body)))

        with self._naming_failures():
            return await AsyncRetrying(**retries.while_full(self._retry_s))(attempt)

    def session(self, max_connections: int) -> httpx.AsyncClient:
        """Connections for `generate`, for one event loop."""
        return httpx.AsyncClient(
            base_url=self.url,
            headers=self._headers,
            timeout=httpx.Timeout(self._request_timeout_s, connect=10.0),
            limits=httpx.Limits(max_connections=max_connections),
        )

    def is_alive(self, timeout_s: float) -> bool:
        """Whether anything answers `/health` in time."""
        try:
            return self._http.get("/health", timeout=timeout_s).is_success
        except httpx.HTTPError:
            return False

    def _call(
        self, parse: Callable[[Any], T], method: str, path: str, *, retry_s: float | None = None, **options: Any
    ) -> T:
        def attempt() -> T:
            return parse(_checked(self._http.request(method, path, **options)))

        with self._naming_failures():
            return Retrying(**retries.policy(self._retry_s if retry_s is None else retry_s))(attempt)

    @contextmanager
    def _naming_failures(self) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPError as error:
            raise ServiceUnreachableError(f"rollout service at {self.url}: {_describe(error)}") from error
        except ValidationError as error:
            raise ServiceUnreachableError(
                f"{self.url} answers, but not as a rollout service of this version: {_first_problem(error)}"
            ) from error


def _checked(reply: httpx.Response) -> Any:
    if reply.is_success:
        return _json(reply)
    error = from_body(reply.status_code, _json(reply))
    if (asked := reply.headers.get("retry-after", "")).isdigit():
        error.facts[retries.RETRY_AFTER_FACT] = float(asked)
    raise error


def _anything(body: Any) -> None:
    """For replies that say nothing."""


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    return " ".join(f"{'.'.join(map(str, problem['loc']))} {problem['msg']}".split())


def _json(reply: httpx.Response) -> Any:
    try:
        return reply.json()
    except ValueError:
        return reply.text


def _describe(error: httpx.HTTPError) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
