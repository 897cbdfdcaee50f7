"""What is logged and counted of a request, and that it says nothing that is private."""

import asyncio
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.rig import Rig, running

from flashrl_rollout.logs import JsonFormatter, TextFormatter

pytestmark = pytest.mark.anyio

LOGGER = "flashrl_rollout.request_record"


def requests(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """The fields of every request's line."""
    return [record.__dict__["fields"] for record in caplog.records if record.name == LOGGER]


async def metrics(rig: Rig) -> str:
    """The text of /metrics."""
    return (await rig.http.get("/metrics")).text


async def test_generate_request_is_one_line(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, LOGGER)
    body = {"prompts": ["one", "three"], "n": 3, "sampling": {"max_tokens": 4}}
    reply = await rig.http.post("/generate", json=body, headers={"X-Request-Id": "step-7.a"})
    assert reply.headers["x-request-id"] == "step-7.a"
    (found,) = requests(caplog)
    assert found.pop("seconds") > 0
    assert found == {
        "request_id": "step-7.a",
        "method": "POST",
        "route": "/generate",
        "status": 200,
        "prompts": 2,
        "n": 3,
        "prompt_tokens": 8,
        "completion_tokens": 24,
        "versions": [0],
    }


async def test_nothing_private_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "flashrl_rollout")
    async with running(tmp_path, token="s3cret") as rig:
        await rig.http.post("/generate?key=private", json={"prompts": ["my private diary"]})
        await rig.http.post("/generate", json={"prompts": [{"private": 1}]}, headers={"X-Request-Id": "private stuff"})
        await rig.http.get("/private")
        await rig.http.get("/weights", headers={"Authorization": "Bearer private"})
        await rig.trainer.publish(rig.delta())
    lines = [form.format(record) for record in caplog.records for form in (TextFormatter(), JsonFormatter())]
    assert len(lines) > 10
    assert not [line for line in lines if "private" in line or "s3cret" in line]


@pytest.mark.parametrize("given", ["", "a" * 65, "two words", "ü".encode().decode("latin-1"), 'a"b'])
async def test_request_id_that_a_log_cannot_bear_is_replaced(rig: Rig, given: str) -> None:
    reply = await rig.http.get("/health", headers={"X-Request-Id": given.encode("latin-1")})  # type: ignore[dict-item]
    assert re.fullmatch("[0-9a-f]{32}", reply.headers["x-request-id"])


async def test_refusals_are_counted_by_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, LOGGER)
    async with running(tmp_path, token="s3cret", max_num_seqs=1, max_waiting=0) as rig:
        await rig.http.get("/weights", headers={"Authorization": "Bearer wrong"})
        await rig.http.get("/nowhere")
        await rig.http.post("/generate", content=b"{")
        await rig.http.post("/generate", json={"prompts": ["a", "b"], "sampling": {"max_tokens": 1}})
        text = await metrics(rig)
    reasons = ["unauthorized", "not_found", "malformed", "too_large"]
    assert [found["error"] for found in requests(caplog)[:4]] == reasons
    for reason in reasons:
        assert f'flashrl_rejected_total{{reason="{reason}"}} 1.0' in text


async def test_internal_error_is_counted_too(rig: Rig) -> None:
    def broken(prompt: object) -> list[int]:
        raise ZeroDivisionError

    rig.engine.encode = broken  # type: ignore[method-assign]
    await rig.http.post("/generate", json={"prompts": ["hi"]})
    text = await metrics(rig)
    assert 'flashrl_requests_total{route="/generate",status="500"} 1.0' in text
    assert 'flashrl_rejected_total{reason="error"} 1.0' in text


async def test_client_that_leaves_is_counted(tmp_path: Path) -> None:
    async with running(tmp_path, token_s=0.05) as rig:
        app = rig.http._transport.app  # type: ignore[attr-defined]
        body = b'{"prompts": ["hi"], "sampling": {"max_tokens": 100}}'
        messages: list[Any] = [{"type": "http.request", "body": body}, {"type": "http.disconnect"}]
        scope = {"type": "http", "method": "POST", "path": "/generate", "query_string": b"", "headers": []}

        async def receive() -> Any:
            if len(messages) == 1:
                await rig.until(lambda: rig.engine.running_requests == 1)
            return messages.pop(0)

        async def send(message: Any) -> None:
            await asyncio.sleep(0)

        await app(scope, receive, send)
        text = await metrics(rig)
    assert "flashrl_client_disconnects_total 1.0" in text
    assert 'flashrl_requests_total{route="/generate",status="499"} 1.0' in text
    assert "flashrl_rejected_total{" not in text


async def test_seconds_are_those_of_the_whole_request(tmp_path: Path) -> None:
    async with running(tmp_path, token_s=0.03) as rig:
        await rig.sample(max_tokens=5)
        text = await metrics(rig)
    assert 'flashrl_request_seconds_bucket{le="0.1",route="/generate"} 0.0' in text
    assert 'flashrl_request_seconds_count{route="/generate"} 1.0' in text
