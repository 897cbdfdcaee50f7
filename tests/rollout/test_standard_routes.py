"""The routes of vLLM's own behind our gate, with an app in vLLM's place that does to a server what vLLM's does."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send
from tests.helpers.asgi_client import AsgiCall
from tests.helpers.rig import INFO, LAYOUT, Rig, running

from flashrl_rollout import stored_state
from flashrl_rollout.app import create_app
from flashrl_rollout.engine import NUM_SEQUENCES
from flashrl_rollout.engine_group import EngineGroup
from flashrl_rollout.scripted_engine import ScriptedEngine
from flashrl_rollout.service import Service
from flashrl_rollout.standard_routes import ROUTES, StandardRoutes, num_sequences
from flashrl_rollout.versions import VersionGate
from flashrl_wire.errors import NotReadyError

pytestmark = pytest.mark.anyio

COMPLETIONS = "/v1/completions"


class FakeRoutes:
    """A reply whole or in events once `go` is set; given up, as vLLM does it, when the client leaves."""

    def __init__(self) -> None:
        self.begun, self.go = asyncio.Event(), asyncio.Event()
        self.paths: list[str] = []
        self.num_sequences = 0
        self.was_left = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = json.loads((await receive()).get("body") or b"{}")
        self.paths.append(scope["path"])
        self.num_sequences = scope[NUM_SEQUENCES]
        kind = b"text/event-stream" if body.get("stream") else b"application/json"
        start = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]}
        if body.get("stream"):
            await send(start)
            await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        self.begun.set()
        await self._work(receive)
        if not body.get("stream"):
            await send(start)
            await send({"type": "http.response.body", "body": b"null" if self.was_left else b'{"ok": true}'})
        elif not self.was_left:
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def _work(self, receive: Receive) -> None:
        left, go = asyncio.ensure_future(receive()), asyncio.ensure_future(self.go.wait())
        await asyncio.wait({left, go}, return_when=asyncio.FIRST_COMPLETED)
        self.was_left = left.done()
        left.cancel()
        go.cancel()


@asynccontextmanager
async def serving(folder: Path, timeout_s: float = 20.0, **settings: object) -> AsyncIterator[tuple[Rig, FakeRoutes]]:
    """A service whose engine has routes of its own."""
    async with running(folder, **settings) as rig:  # type: ignore[arg-type]
        fake = FakeRoutes()
        rig.service.parts = replace(rig.parts, standard=StandardRoutes(fake, rig.parts.gate, timeout_s))
        yield rig, fake


def call(rig: Rig, **body: object) -> AsgiCall:
    """A request of a client that can leave."""
    app = create_app(rig.service, token=None, max_body_bytes=1000)
    return AsgiCall(app, COMPLETIONS, {"prompt": "hi", **body})


async def ask(http: httpx.AsyncClient, path: str) -> httpx.Response:
    """The route with its own method."""
    return await http.request(ROUTES[path], path, json={"prompt": "hi"})


def check_error(reply: httpx.Response, status: int, code: str) -> None:
    """An error of the form that OpenAI's clients read."""
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["type"], error["param"]) == (status, status, code, None)
    assert error["message"]


@pytest.mark.parametrize("path", ROUTES)
async def test_a_route_reaches_the_engines_own(tmp_path: Path, path: str) -> None:
    async with serving(tmp_path) as (rig, fake):
        fake.go.set()
        reply = await ask(rig.http, path)
        assert (reply.status_code, reply.json(), fake.paths) == (200, {"ok": True}, [path])
        assert f'route="{path}",status="200"' in (await rig.http.get("/metrics")).text


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions/batch", "/v1/responses", "/inference/v1/abort_requests", "/tokenize", "/v1/messages"]
)
async def test_no_other_route_is_reached(tmp_path: Path, path: str) -> None:
    async with serving(tmp_path) as (rig, fake):
        fake.go.set()
        assert (await rig.http.post(path, json={})).status_code == 404
        assert (await rig.http.get(COMPLETIONS)).status_code == 405
        assert fake.paths == []


@pytest.mark.parametrize("path", ROUTES)
async def test_an_engine_without_routes_of_its_own_says_so(rig: Rig, path: str) -> None:
    check_error(await ask(rig.http, path), 404, "not_found")


@pytest.mark.parametrize("path", ROUTES)
async def test_a_stranger_is_turned_away(tmp_path: Path, path: str) -> None:
    async with serving(tmp_path, token="s3cret") as (rig, fake):
        rig.http.headers.pop("Authorization")
        check_error(await ask(rig.http, path), 401, "unauthorized")
        assert fake.paths == []


@pytest.mark.parametrize("path", ROUTES)
async def test_nothing_is_sampled_while_starting_poisoned_or_stopping(tmp_path: Path, path: str) -> None:
    app = create_app(Service(), token=None, max_body_bytes=1000)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as http:
        reply = await ask(http, path)
        check_error(reply, 503, "not_ready")
        assert int(reply.headers["retry-after"]) > 0
    async with serving(tmp_path) as (rig, fake):
        rig.parts.gate.fence(NotReadyError("poisoned", poisoned=True))
        check_error(await ask(rig.http, path), 503, "not_ready")
        rig.parts.gate.unfence()
        rig.service.stop("the service is stopping")
        check_error(await ask(rig.http, path), 503, "not_ready")
        assert fake.paths == []


async def test_a_large_body_is_refused(tmp_path: Path) -> None:
    async with serving(tmp_path, max_body_mib=1) as (rig, fake):
        check_error(await rig.http.post(COMPLETIONS, content=bytes((1 << 20) + 1)), 413, "too_large")
        assert fake.paths == []


async def test_a_request_waits_while_sampling_stands_still(tmp_path: Path) -> None:
    async with serving(tmp_path) as (rig, fake):
        fake.go.set()
        await rig.http.post("/pause")
        waiting = call(rig)
        await rig.until(lambda: rig.parts.gate.active_requests == 1)
        assert fake.paths == []
        assert (await rig.http.get("/v1/models")).status_code == 200  # asks for no tokens
        await rig.http.post("/resume")
        assert (await waiting.ended(), waiting.json()) == (200, {"ok": True})


async def test_a_wait_has_a_limit(tmp_path: Path) -> None:
    async with serving(tmp_path, admit_timeout_s=0.01) as (rig, fake):
        rig.parts.gate.close("commit")
        reply = await ask(rig.http, COMPLETIONS)
        check_error(reply, 503, "not_ready")
        assert int(reply.headers["retry-after"]) > 0
        assert fake.paths == []


async def test_sequences_count_against_the_queue(tmp_path: Path) -> None:
    async with serving(tmp_path, max_num_seqs=2, max_waiting=1) as (rig, fake):
        first = call(rig, n=2)
        await fake.begun.wait()
        assert (rig.parts.gate.active_sequences, fake.num_sequences) == (2, 2)
        reply = await rig.http.post(COMPLETIONS, json={"prompt": ["a", "b"]})
        check_error(reply, 429, "queue_full")
        assert int(reply.headers["retry-after"]) > 0
        check_error(await rig.http.post(COMPLETIONS, json={"prompt": "a", "n": 4}), 413, "too_large")
        fake.go.set()
        assert await first.ended() == 200
        assert rig.parts.gate.active_sequences == 0


async def test_a_stream_is_active_until_its_end(tmp_path: Path) -> None:
    async with serving(tmp_path) as (rig, fake):
        stream = call(rig, stream=True)
        await stream.begun()
        assert (stream.status, rig.parts.gate.active_requests) == (200, 1)
        fake.go.set()
        await stream.ended()
        assert stream.content == b"data: 1\n\ndata: [DONE]\n\n"
        assert rig.parts.gate.active_requests == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_frees_its_sequences(tmp_path: Path, stream: bool) -> None:
    async with serving(tmp_path) as (rig, fake):
        left = call(rig, stream=stream)
        await fake.begun.wait()
        left.leave()
        await left.ended()
        assert fake.was_left
        assert (rig.parts.gate.active_requests, b"error" in left.content) == (0, False)


async def test_a_client_that_leaves_while_it_waits_is_forgotten(tmp_path: Path) -> None:
    async with serving(tmp_path) as (rig, fake):
        rig.parts.gate.close("commit")
        left = call(rig)
        await rig.until(lambda: rig.parts.gate.active_requests == 1)
        left.leave()
        await left.ended()
        assert (rig.parts.gate.active_requests, fake.paths) == (0, [])


async def test_a_fence_ends_what_runs(tmp_path: Path) -> None:
    async with serving(tmp_path) as (rig, fake):
        gate, whole, stream = rig.parts.gate, call(rig), call(rig, stream=True)
        await stream.begun()
        await rig.until(lambda: len(fake.paths) == 2)
        rig.service.fence("the engine has died")
        assert await whole.ended() == 503
        assert whole.json()["error"]["message"] == "the engine has died"
        await stream.ended()
        begin, last, done, rest = stream.content.split(b"\n\n")
        assert (begin, done, rest) == (b"data: 1", b"data: [DONE]", b"")
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == 503
        assert gate.active_requests == 0


async def test_a_number_too_long_to_be_printed_is_too_many(tmp_path: Path) -> None:
    async with serving(tmp_path) as (rig, _):
        body = b'{"prompt": ["a", "b", "c"], "n": ' + b"9" * 4300 + b"}"
        check_error(await rig.http.post(COMPLETIONS, content=body), 413, "too_large")


async def test_a_request_has_a_limit(tmp_path: Path) -> None:
    async with serving(tmp_path, timeout_s=0.01) as (rig, fake):
        check_error(await ask(rig.http, COMPLETIONS), 503, "timed_out")
        assert fake.was_left


class EngineWithRoutes(ScriptedEngine):
    """One that has routes of its own."""

    def __init__(self) -> None:
        super().__init__(LAYOUT, stored_state.random_parts(LAYOUT, 0), INFO)
        self.routes = FakeRoutes()

    async def standard_app(self, empty_app: Callable[[], Any]) -> ASGIApp:
        return self.routes


async def test_several_engines_share_the_requests_by_their_sequences() -> None:
    engines = [EngineWithRoutes(), EngineWithRoutes()]
    group = await EngineGroup.of(engines)
    app = await group.standard_app(FastAPI)
    assert app is not None
    routes = StandardRoutes(app, VersionGate(100, 1.0), 20.0)
    calls = []
    for n in (3, 1, 1, 2):  # three on the first, then two on the second, and again the second, which has fewer
        calls.append(AsgiCall(routes, COMPLETIONS, {"prompt": "hi", "n": n}))
        for _ in range(20):  # no clock is involved: the routes have it once the loop has gone round
            await asyncio.sleep(0)
    assert [len(engine.routes.paths) for engine in engines] == [1, 3]
    assert group.sequences == (3, 4)
    for engine in engines:
        engine.routes.go.set()
    assert [await call.ended() for call in calls] == [200] * 4
    assert group.sequences == (0, 0)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", 1), (b"{", 1), (b"[]", 1), (b"[" * 100_000, 1), (b'{"prompt": "a"}', 1), (b'{"prompt": "a", "n": 3}', 3),
        (b'{"prompt": ["a", "b"], "n": 3}', 6), (b'{"prompt": [1, 2, 3], "n": 2}', 2),
        (b'{"prompt": [[1, 2], [3], [4]], "n": 2}', 6), (b'{"prompt": [], "n": 2}', 2), (b'{"n": "5"}', 5),
        (b'{"n": -1}', 1), (b'{"n": null}', 1), (b'{"n": [2]}', 1), (b'{"n": Infinity}', 1), (b'{"n": 1e3}', 1000),
        (b'{"messages": [{}, {}], "n": 2}', 2), (b'{"token_ids": [1, 2], "sampling_params": {"n": 4}}', 4),
        (b'{"sampling_params": 7, "n": 2}', 2),
    ],
)  # fmt: skip
def test_sequences_of_a_request(body: bytes, expected: int) -> None:
    assert num_sequences(body) == expected
