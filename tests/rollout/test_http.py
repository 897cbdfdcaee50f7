"""What every route has in common: tokens, sizes, errors in one form, and a state that is told truthfully."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from tests.helpers.rig import LAYOUT, Rig, running

from flashrl_rollout.app import create_app
from flashrl_rollout.service import Service

pytestmark = pytest.mark.anyio

ROUTES = [
    ("GET", "/ready"), ("GET", "/weights"), ("GET", "/weights/layout"), ("GET", "/metrics"), ("POST", "/generate"),
    ("POST", "/load_weights"), ("POST", "/load_weights/x/commit"), ("DELETE", "/load_weights/x"), ("POST", "/pause"),
    ("POST", "/resume"), ("DELETE", "/runs/x"), ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/nowhere"),
    ("GET", "/v1/models"),
]  # fmt: skip


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer wrong", "Bearer s3cret ", "bearer s3cret", "s3cret"])
async def test_every_route_but_health_wants_the_token(tmp_path: Path, header: str | None) -> None:
    async with running(tmp_path, token="s3cret") as rig:
        rig.http.headers.pop("Authorization")
        headers = {} if header is None else {"Authorization": header}
        for method, path in ROUTES:
            reply = await rig.http.request(method, path, headers=headers)
            assert (reply.status_code, reply.headers["www-authenticate"]) == (401, "Bearer")
        assert (await rig.http.get("/health")).json() == {"alive": True}


async def test_right_token_opens_every_route(tmp_path: Path) -> None:
    async with running(tmp_path, token="s3cret") as rig:
        for method, path in ROUTES:
            assert (await rig.http.request(method, path)).status_code != 401
        assert (await rig.http.get("/ready")).status_code == 200


async def test_stranger_gets_nothing_buffered(tmp_path: Path) -> None:
    async with running(tmp_path, token="s3cret", max_body_mib=1) as rig:
        reply = await rig.http.post("/generate", content=bytes(2 << 20), headers={"Authorization": "Bearer x"})
        assert reply.status_code == 401


@pytest.mark.parametrize("is_chunked", [True, False])
async def test_large_body_is_refused(tmp_path: Path, is_chunked: bool) -> None:
    async def pieces() -> object:
        for _ in range(3):
            yield bytes(1 << 19)

    async with running(tmp_path, max_body_mib=1) as rig:
        reply = await rig.http.post("/generate", content=pieces() if is_chunked else bytes((1 << 20) + 1))  # type: ignore[arg-type]
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, "too_large")


async def test_bodies_together_are_bounded(tmp_path: Path) -> None:
    """Each is allowed, but nine of them under way are too much; once they are gone there is room again."""
    ended = asyncio.Event()
    started = 0

    async def half_a_body() -> AsyncIterator[bytes]:
        nonlocal started
        yield bytes(1 << 20)
        started += 1
        await ended.wait()
        yield b""

    async with running(tmp_path, max_body_mib=1) as rig:
        slow = [asyncio.create_task(rig.http.post("/generate", content=half_a_body())) for _ in range(8)]
        await rig.until(lambda: started == 8)
        full = await rig.http.post("/generate", content=b"[]")
        assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
        assert int(full.headers["retry-after"]) > 0
        assert (await rig.http.get("/ready")).status_code == 200
        ended.set()
        assert {(await reply).status_code for reply in slow} == {400}
        assert (await rig.http.post("/generate", content=b"[]")).status_code == 422


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/nowhere", b"", 404, "not_found"),
        ("PUT", "/weights", b"", 405, "method_not_allowed"),
        ("POST", "/generate", b"{", 400, "malformed"),
        ("POST", "/generate", b"\xff\xfe", 400, "malformed"),
        ("POST", "/generate", b"[" * 100_000, 400, "malformed"),
        ("POST", "/generate", b"", 422, "invalid_field"),
        ("POST", "/generate", b"[]", 422, "invalid_field"),
        ("POST", "/load_weights", b"{}", 422, "invalid_field"),
        ("POST", "/load_weights", b'{"kind": "pickle"}', 422, "invalid_field"),
        ("POST", "/load_weights", b'{"kind": "checkpoint"}', 422, "invalid_field"),
        ("POST", "/load_weights/none/commit", b"", 404, "unknown_transfer"),
        ("DELETE", "/load_weights/none", b"", 404, "unknown_transfer"),
        ("POST", "/pause?mode=abort", b"", 422, "invalid_field"),
    ],
)
async def test_errors_have_one_form(rig: Rig, method: str, path: str, body: bytes, status: int, code: str) -> None:
    reply = await rig.http.request(method, path, content=body)
    assert reply.status_code == status
    assert reply.headers["content-type"] == "application/json"
    error = reply.json()["error"]
    assert (error["code"], list(reply.json())) == (code, ["error"])
    assert "\n" not in error["message"]


async def test_form_body_is_told_apart_from_bad_json(rig: Rig) -> None:
    reply = await rig.http.post("/generate", data={"prompts": "hi"})
    assert (reply.status_code, "application/json" in reply.json()["error"]["message"]) == (400, True)


async def test_body_without_a_declared_type_is_json(rig: Rig) -> None:
    reply = await rig.http.post("/generate", content=b'{"prompts": ["hi"], "sampling": {"max_tokens": 1}}')
    assert reply.status_code == 200


async def test_errors_under_v1_are_those_of_openai(rig: Rig) -> None:
    error = (await rig.http.get("/v1/nowhere")).json()["error"]
    assert (error["code"], error["type"], error["param"]) == (404, "not_found", None)


async def test_unknown_exception_shows_no_trace(rig: Rig) -> None:
    def broken(prompt: object) -> list[int]:
        raise ZeroDivisionError("a secret of ours")

    rig.engine.encode = broken  # type: ignore[method-assign]
    reply = await rig.http.post("/generate", json={"prompts": ["hi"]})
    assert reply.status_code == 500
    assert reply.json() == {"error": {"code": "error", "message": "internal error; the service's log has more"}}


async def test_service_that_is_starting_says_so() -> None:
    app = create_app(Service(), token=None, max_body_bytes=1000)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as http:
        assert (await http.get("/health")).status_code == 200
        for reply in (await http.get("/ready"), await http.get("/weights"), await http.post("/resume")):
            assert (reply.status_code, reply.json()["error"]["code"]) == (503, "not_ready")
            assert "starting" in reply.json()["error"]["message"]
            assert int(reply.headers["retry-after"]) > 0
        assert "flashrl_ready 0.0" in (await http.get("/metrics")).text


async def test_weights_and_layout_describe_the_engine(rig: Rig) -> None:
    info = await rig.weights()
    assert info["storage_bytes"] == 64 * 32 + 64 * 4 + 16 * 8 + 16 * 4 + 100 * 2
    assert (info["layout_hash"], info["max_model_len"], info["poisoned"]) == (LAYOUT.hash, 128, False)
    assert info["last_update"] is None
    layout = (await rig.http.get("/weights/layout")).json()
    assert layout[0] == {"name": "down.weight", "shape": [64, 32], "storage": "int8_rows"}
    await rig.trainer.publish(rig.delta())
    update = (await rig.weights())["last_update"]
    assert (update["kind"], update["version"], update["changed_elements"]) == ("delta", 1, 5)  # type: ignore[index]


async def test_metrics_count_what_happened(rig: Rig) -> None:
    _, reply = None, await rig.http.post("/generate", json={"prompts": ["hi"], "sampling": {"max_tokens": 3}})
    tokens = reply.json()["usage"]["completion_tokens"]
    update = rig.delta()
    await rig.trainer.publish(update)
    await rig.http.get("/never/heard/of")
    text = (await rig.http.get("/metrics")).text
    for line in (
        'flashrl_tokens_total{kind="prompt"} 2.0',
        f'flashrl_tokens_total{{kind="completion"}} {tokens}.0',
        'flashrl_requests_total{route="/generate",status="200"} 1.0',
        'flashrl_requests_total{route="other",status="404"} 1.0',
        'flashrl_updates_total{result="committed"} 1.0',
        f'flashrl_update_wire_bytes_total{{kind="delta"}} {update.manifest.wire_bytes}.0',
        "flashrl_commit_pause_seconds_count 1.0",
        "flashrl_weight_version 1.0",
        "flashrl_poisoned 0.0",
        "flashrl_running_sequences 0.0",
    ):
        assert line in text.splitlines()
