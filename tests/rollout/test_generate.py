"""/generate over the scripted engine: what is accepted, what is refused, and who is told what."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.rig import INFO, Rig, running

pytestmark = pytest.mark.anyio


async def post(rig: Rig, **body: object) -> tuple[int, dict[str, Any]]:
    reply = await rig.http.post("/generate", json=body)
    return reply.status_code, reply.json()


async def test_reply_has_the_documented_shape(rig: Rig) -> None:
    sampling = {"max_tokens": 4, "seed": 7}
    status, reply = await post(rig, prompts=["hi", [5, 6]], n=3, sampling=sampling, top_logprobs=2)
    assert status == 200
    assert reply.keys() == {"weight_version", "quantization", "results", "usage"}
    assert [result["prompt_token_ids"] for result in reply["results"]] == [[104, 105], [5, 6]]
    completions = [completion for result in reply["results"] for completion in result["completions"]]
    assert len(completions) == 6
    for completion in completions:
        count = len(completion["token_ids"])
        assert len(completion["logprobs"]) == len(completion["top_logprobs"]) == count
        assert completion["weight_versions"] == [[0, 0, count]]
        assert all(logprob <= 0 for logprob in completion["logprobs"])
        assert completion["top_logprobs"][0][str(completion["token_ids"][0])] == completion["logprobs"][0]
    total = sum(len(completion["token_ids"]) for completion in completions)
    assert reply["usage"] == {"prompt_tokens": 4, "completion_tokens": total}


async def test_seeds_count_on_over_samples_and_prompts(rig: Rig) -> None:
    sampling = {"max_tokens": 6, "seed": 40}
    _, together = await post(rig, prompts=["hi", "hi"], n=2, sampling=sampling)
    tokens = [c["token_ids"] for result in together["results"] for c in result["completions"]]
    alone = []
    for seed in (40, 41, 42, 43):
        _, reply = await post(rig, prompts=["hi"], sampling=sampling | {"seed": seed})
        alone.append(reply["results"][0]["completions"][0]["token_ids"])
    assert tokens == alone
    assert len({tuple(ids) for ids in tokens}) == 4


async def test_largest_seed_wraps_instead_of_overflowing(rig: Rig) -> None:
    sampling = {"max_tokens": 2, "seed": 2**63 - 1}
    assert (await post(rig, prompts=["hi", "hi"], n=2, sampling=sampling))[0] == 200


async def test_chat_is_encoded_by_the_engine(rig: Rig) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    _, reply = await post(rig, prompts=[chat], sampling={"max_tokens": 1})
    assert reply["results"][0]["prompt_token_ids"] == [97, 10, 98, 10]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "prompts"),
        ({"prompts": []}, "prompts"),
        ({"prompts": "hi"}, "prompts"),
        ({"prompts": [""]}, "prompts.0"),
        ({"prompts": ["hi", []], "sampling": {"max_tokens": 1}}, "prompts.1"),
        ({"prompts": [5]}, "prompts.0"),
        ({"prompts": [[1, -1]]}, "prompts.0.1"),
        ({"prompts": [[1, 300]]}, "prompts.0"),
        ({"prompts": [[1.5]]}, "prompts.0.0"),
        ({"prompts": [[{"role": "user"}]]}, "prompts.0"),
        ({"prompts": [[{"role": 1}]]}, "prompts.0.0.role"),
        ({"prompts": ["hi"], "n": 0}, "n"),
        ({"prompts": ["hi"], "n": 10**9}, "n"),
        ({"prompts": ["hi"], "top_logprobs": 21}, "top_logprobs"),
        ({"prompts": ["hi"], "min_weight_version": -1}, "min_weight_version"),
        ({"prompts": ["hi"], "unknown": 1}, "unknown"),
        ({"prompts": ["hi"], "sampling": {"temperature": -1}}, "sampling.temperature"),
        ({"prompts": ["hi"], "sampling": {"top_p": 0}}, "sampling.top_p"),
        ({"prompts": ["hi"], "sampling": {"max_tokens": 0}}, "sampling.max_tokens"),
        ({"prompts": ["hi"], "sampling": {"seed": 2**63}}, "sampling.seed"),
        ({"prompts": ["hi"], "sampling": {"stop": [""]}}, "sampling.stop.0"),
        ({"prompts": ["hi"], "sampling": {"min_p": 0.1}}, "sampling.min_p"),
        ({"prompts": ["hi"], "sampling": {"max_tokens": 127}}, "prompts.0"),
        ({"prompts": [[1] * 128], "sampling": {"max_tokens": 1}}, "prompts.0"),
    ],
)
async def test_bad_field_is_named(rig: Rig, body: dict[str, object], field: str) -> None:
    status, reply = await post(rig, **body)
    assert (status, reply["error"]["code"]) == (422, "invalid_field")
    assert reply["error"]["message"].startswith(f"{field}: ")
    assert rig.parts.gate.active_sequences == 0


@pytest.mark.parametrize("text", ['{"prompts": ["hi"], "sampling": {"temperature": NaN}}', '{"prompts": ["\\ud800"]}'])
async def test_values_that_json_should_not_have(rig: Rig, text: str) -> None:
    reply = await rig.http.post("/generate", content=text)
    assert reply.status_code == 422


async def test_context_is_used_to_its_last_token(rig: Rig) -> None:
    _, reply = await post(rig, prompts=[[1] * (INFO.max_model_len - 1)], sampling={"max_tokens": 1})
    assert len(reply["results"][0]["completions"][0]["token_ids"]) == 1
    _, reply = await post(rig, prompts=[[1] * INFO.max_model_len], sampling={"max_tokens": 1})
    assert "128 prompt tokens and sampling.max_tokens 1 are more than the context of 128" in reply["error"]["message"]


async def test_version_that_is_still_to_come(rig: Rig) -> None:
    status, reply = await post(rig, prompts=["hi"], min_weight_version=1, sampling={"max_tokens": 1})
    assert (status, reply["error"]["code"], reply["error"]["version"]) == (409, "version_not_reached", 0)


async def test_queue_is_bounded(tmp_path: Path) -> None:
    async with running(tmp_path, max_num_seqs=4, max_waiting=4, token_s=0.01) as rig:
        body = {"prompts": ["hi"], "n": 6, "sampling": {"max_tokens": 2}}
        waiting = asyncio.create_task(rig.http.post("/generate", json=body))
        await rig.until(lambda: rig.engine.running_requests > 0)
        full = await rig.http.post("/generate", json=body)
        assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
        assert full.headers["retry-after"] == str(full.json()["error"]["retry_after_s"]) == "5"  # nobody has left yet
        assert (await post(rig, **body | {"n": 9}))[0] == 413
        assert (await waiting).status_code == 200
        assert (await rig.http.post("/generate", json=body)).status_code == 200


async def test_request_that_takes_too_long_frees_its_sequences(tmp_path: Path) -> None:
    async with running(tmp_path, request_timeout_s=0.05, token_s=0.02) as rig:
        status, reply = await post(rig, prompts=["hi"], sampling={"max_tokens": 100})
        assert (status, reply["error"]["code"]) == (503, "timed_out")
        assert (rig.engine.cancelled_requests, rig.parts.gate.active_sequences) == (1, 0)


async def test_pause_holds_requests_back_only_so_long(tmp_path: Path) -> None:
    async with running(tmp_path, admit_timeout_s=0.02) as rig:
        await rig.http.post("/pause")
        status, reply = await post(rig, prompts=["hi"], sampling={"max_tokens": 1})
        assert (status, reply["error"]["code"]) == (503, "not_ready")
        assert "pause" in reply["error"]["message"]
        await rig.http.post("/resume")
        assert len(await rig.sample()) > 0


async def test_drain_pause_gives_up_at_its_deadline(tmp_path: Path) -> None:
    async with running(tmp_path, drain_deadline_s=0.02, token_s=0.005) as rig:
        body = {"prompts": ["hi"], "sampling": {"max_tokens": 60, "seed": 1}}
        waiting = asyncio.create_task(rig.http.post("/generate", json=body))
        await rig.until(lambda: rig.engine.running_requests > 0)
        reply = await rig.http.post("/pause?mode=drain")
        assert (reply.status_code, reply.json()["error"]["code"]) == (409, "drain_timeout")
        assert (await waiting).status_code == 200
        assert (await rig.http.post("/pause?mode=drain")).status_code == 200


async def test_logprob_that_is_no_number_is_an_error_not_a_null(rig: Rig) -> None:
    rig.engine._draw = lambda prompt, seed, tokens: (1, float("nan"))  # type: ignore[method-assign]
    status, reply = await post(rig, prompts=["hi"], sampling={"max_tokens": 1})
    assert (status, reply["error"]["code"]) == (500, "engine_failed")


async def test_client_that_leaves_has_its_request_cancelled(tmp_path: Path) -> None:
    async with running(tmp_path, token_s=0.01) as rig:
        body = {"prompts": ["hi", "ho"], "sampling": {"max_tokens": 100}}
        messages: asyncio.Queue[dict[str, object]] = asyncio.Queue()
        sent: list[dict[str, object]] = []
        await messages.put({"type": "http.request", "body": rig.http.build_request("POST", "/", json=body).content})
        scope = {
            "type": "http", "method": "POST", "path": "/generate", "raw_path": b"/generate", "query_string": b"",
            "headers": [(b"content-type", b"application/json")], "http_version": "1.1", "scheme": "http",
            "server": ("service", 80), "client": ("test", 1), "root_path": "", "asgi": {"version": "3.0"},
        }  # fmt: skip

        async def send(message: dict[str, object]) -> None:
            sent.append(message)

        app = rig.http._transport.app  # type: ignore[attr-defined]
        handling = asyncio.create_task(app(scope, messages.get, send))
        await rig.until(lambda: rig.engine.running_requests == 2)
        await messages.put({"type": "http.disconnect"})
        await asyncio.wait_for(handling, 5)
        assert rig.engine.cancelled_requests == 2
        assert rig.parts.gate.active_sequences == 0
        assert sent[0]["status"] == 499
