"""vLLM's own OpenAI and token routes on our app and a real engine: the same tokens as /generate, errors as OpenAI's."""

import asyncio
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from tests.engine.conftest import MODEL
from tests.helpers.asgi_client import AsgiCall
from tests.helpers.real_engine import GREEDY, MAX_MODEL_LEN, PROMPTS, LoopThread, greedy

from flashrl_rollout import startup
from flashrl_rollout.app import create_app
from flashrl_rollout.assembly import assemble
from flashrl_rollout.config import RolloutConfig
from flashrl_rollout.engine import Engine
from flashrl_rollout.service import Service
from flashrl_wire.messages import Sampling

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]

COMPLETIONS, CHAT, TOKENS = "/v1/completions", "/v1/chat/completions", "/inference/v1/generate"
TEXT = "Ann has 3 apples and buys 4 more. How many apples does she have?"
LIMIT_S = 1.0


@dataclass(frozen=True)
class Server:
    """An app over the session's engine, and requests to it from a test that has no loop."""

    app: FastAPI
    loop: LoopThread
    service: Service

    def ask(self, path: str, body: Any, method: str = "POST") -> httpx.Response:
        """The reply to a request; what is no text or bytes is sent as JSON."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.loop.run(self._ask(method, path, content))

    async def _ask(self, method: str, path: str, content: bytes) -> httpx.Response:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://service", timeout=60) as http:
            return await http.request(method, path, content=content, headers={"Content-Type": "application/json"})

    def events(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The events of a stream, without the last, which says that it is the last."""
        reply = self.ask(path, {**body, "stream": True})
        assert reply.headers["content-type"].startswith("text/event-stream"), reply.text
        *events, done, rest = reply.text.split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]


@pytest.fixture(scope="module")
def server(int8_engine: Engine, loop: LoopThread, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service around the session's engine, without a socket for HTTP."""
    yield from _server(int8_engine, loop, tmp_path_factory.mktemp("stage"))


@pytest.fixture(scope="module")
def chat_server(none_engine: Engine, loop: LoopThread, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The same around the engine whose model has a chat template."""
    yield from _server(none_engine, loop, tmp_path_factory.mktemp("stage"))


def _server(engine: Engine, loop: LoopThread, folder: Path) -> Iterator[Server]:
    settings = {"model": engine.info.model, "port": 0, "weights_port": 0, "stage_root": folder, "max_num_seqs": 64}
    config = RolloutConfig.model_validate(settings)
    bound = startup.bind(config, {})
    bound.receiver.start()
    service = Service()
    app = create_app(service, token=None, max_body_bytes=1 << 20)
    record = service.metrics.count_update
    service.parts = loop.run(assemble(config, engine, bound.receiver, bound.stage_dir, record))
    yield Server(app, loop, service)
    loop.run(service.parts.store.close(5.0))
    bound.close()


@pytest.fixture(scope="module")
def expected(int8_engine: Engine, loop: LoopThread) -> list[list[int]]:
    """Greedy tokens of every prompt, as /generate has them."""
    return [token_ids for token_ids, _ in loop.run(greedy(int8_engine))]


def completion(prompt: Any, **settings: Any) -> dict[str, Any]:
    """A greedy request."""
    greedy = {"temperature": 0, "max_tokens": GREEDY.max_tokens, "return_token_ids": True}
    return {"model": str(MODEL), "prompt": prompt, **greedy, **settings}


def tokens(prompt: list[int], **settings: Any) -> dict[str, Any]:
    """A greedy request of the route that knows tokens only."""
    return {"token_ids": prompt, "sampling_params": {"temperature": 0, "max_tokens": GREEDY.max_tokens, **settings}}


def joined(events: list[dict[str, Any]]) -> list[int]:
    """The tokens of all events of a stream."""
    return [token for event in events for token in event["choices"][0]["token_ids"]]


def test_models_has_the_name_as_it_was_given(server: Server) -> None:
    (model,) = server.ask("/v1/models", b"", "GET").json()["data"]
    assert (model["id"], model["root"], model["max_model_len"]) == (str(MODEL), str(MODEL), MAX_MODEL_LEN)


def test_completions_are_those_of_generate(server: Server, expected: list[list[int]]) -> None:
    for prompt, token_ids in zip(PROMPTS, expected, strict=True):
        assert server.ask(COMPLETIONS, completion(prompt)).json()["choices"][0]["token_ids"] == token_ids
    both = server.ask(COMPLETIONS, completion(PROMPTS[:2], max_tokens=2)).json()
    assert [choice["token_ids"] for choice in both["choices"]] == [token_ids[:2] for token_ids in expected[:2]]
    assert both["usage"]["prompt_tokens"] == len(PROMPTS[0]) + len(PROMPTS[1])


def test_text_and_its_tokens_are_one_prompt(server: Server, int8_engine: Engine) -> None:
    text = server.ask(COMPLETIONS, completion(TEXT)).json()["choices"][0]
    ids = server.ask(COMPLETIONS, completion(int8_engine.encode(TEXT))).json()["choices"][0]
    assert text["text"] == ids["text"] != ""


def test_a_seed_draws_what_it_draws_with_generate(server: Server, int8_engine: Engine, loop: LoopThread) -> None:
    sampling = Sampling(temperature=1.5, seed=5, max_tokens=16)
    drawn = loop.run(int8_engine.generate("seeded", PROMPTS[0], 2, sampling, 0))
    body = completion(PROMPTS[0], temperature=1.5, seed=5, max_tokens=16, n=2)
    choices = server.ask(COMPLETIONS, body).json()["choices"]
    assert [choice["token_ids"] for choice in choices] == [sample.token_ids for sample in drawn]


def test_a_stream_adds_up_to_the_whole(server: Server) -> None:
    whole = server.ask(COMPLETIONS, completion(TEXT)).json()["choices"][0]
    events = server.events(COMPLETIONS, completion(TEXT))
    assert len(events) > 1
    assert "".join(event["choices"][0]["text"] for event in events) == whole["text"]
    assert joined(events) == whole["token_ids"]
    assert events[-1]["choices"][0]["finish_reason"] == whole["finish_reason"]


def test_tokens_in_and_tokens_out(server: Server, expected: list[list[int]]) -> None:
    for prompt, token_ids in zip(PROMPTS, expected, strict=True):
        (choice,) = server.ask(TOKENS, tokens(prompt)).json()["choices"]
        assert choice["token_ids"] == token_ids
        events = server.events(TOKENS, tokens(prompt))
        assert joined(events) == token_ids


def test_the_end_of_a_stop_string_is_not_in_the_text(server: Server) -> None:
    whole = server.ask(COMPLETIONS, completion(TEXT)).json()["choices"][0]["text"]
    found = server.ask(COMPLETIONS, completion(TEXT, stop=whole[2:4])).json()["choices"][0]
    assert (found["text"], found["finish_reason"]) == (whole[: whole.index(whole[2:4])], "stop")


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        (COMPLETIONS, b"{", 400),
        (COMPLETIONS, b"[]", 400),
        (COMPLETIONS, b"[" * 100_000, 400),
        (COMPLETIONS, {}, 400),
        (COMPLETIONS, completion(TEXT, model="another"), 404),
        (COMPLETIONS, completion([1] * (MAX_MODEL_LEN + 1)), 400),
        (COMPLETIONS, completion([10**9]), 400),
        (COMPLETIONS, completion([-1]), 400),
        (COMPLETIONS, completion([]), 400),
        (COMPLETIONS, completion({"a": 1}), 400),
        (COMPLETIONS, completion(TEXT, max_tokens="many"), 400),
        (COMPLETIONS, completion(TEXT, max_tokens=-1), 400),
        (COMPLETIONS, completion(TEXT, temperature=-1), 400),
        (COMPLETIONS, completion(TEXT, temperature=0, n=2), 400),
        (COMPLETIONS, completion(TEXT, n=0), 400),
        (COMPLETIONS, completion(TEXT, n=100_000), 413),
        (COMPLETIONS, completion(TEXT, logprobs=10_000), 400),
        (COMPLETIONS, completion(TEXT, top_p=7), 400),
        (COMPLETIONS, completion(TEXT, stop=[""]), 400),
        (COMPLETIONS, completion(TEXT, stop=7), 400),
        (COMPLETIONS, completion(TEXT, logit_bias={"999999": 1}), 400),
        (CHAT, {"model": str(MODEL), "messages": [{"role": "user", "content": "hi"}]}, 400),
        (CHAT, {"model": str(MODEL), "messages": "hi"}, 400),
        (TOKENS, {"token_ids": [1]}, 400),
        (TOKENS, tokens([]), 400),
        (TOKENS, tokens([10**9]), 400),
        (TOKENS, tokens([1] * (MAX_MODEL_LEN + 1)), 400),
        (TOKENS, tokens([1], temperature="hot"), 400),
        (TOKENS, tokens([1], trace_decode_token_ids=[-1]), 400),  # vLLM calls this a failure of the engine
    ],
)
def test_mistakes_are_told_as_openai_tells_them(server: Server, path: str, body: Any, status: int) -> None:
    reply = server.ask(path, body)
    assert "error" in reply.json(), reply.text
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (status, status), reply.text
    assert error["message"]
    assert "Traceback" not in reply.text
    assert server.service.require_sampling().gate.active_sequences == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"messages": [{"author": {"role": "user"}, "content": [{"type": "text", "text": "hi"}]}]},  # of gpt-oss
        {"structured_outputs": True},
    ],
)
def test_what_vllm_stumbles_over_is_the_requests_mistake(chat_server: Server, wrong: dict[str, Any]) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 4}
    reply = chat_server.ask(CHAT, body | wrong)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, 400), reply.text
    assert chat_server.ask(CHAT, body).status_code == 200


@pytest.mark.parametrize(
    ("path", "body"), [(COMPLETIONS, {"prompt": [10**9], "max_tokens": 4}), (TOKENS, tokens([10**9]))]
)
def test_a_mistake_in_a_stream_is_a_line_of_the_log(
    server: Server, caplog: pytest.LogCaptureFixture, path: str, body: dict[str, Any]
) -> None:
    logger = logging.getLogger("vllm")  # it does not pass its records on
    logger.addHandler(caplog.handler)
    try:
        (event, *_) = server.events(path, body)
    finally:
        logger.removeHandler(caplog.handler)
    assert event["error"]["code"] == 400, event
    assert "Traceback" not in caplog.text
    assert any("vocab" in record.getMessage() for record in caplog.records), caplog.text


def test_what_vllm_does_not_know_it_ignores(server: Server, expected: list[list[int]]) -> None:
    completed = server.ask(COMPLETIONS, completion(PROMPTS[0], no_such_field=1)).json()
    drawn = server.ask(TOKENS, tokens(PROMPTS[0], no_such_field=1)).json()
    assert completed["choices"][0]["token_ids"] == drawn["choices"][0]["token_ids"] == expected[0]


def test_a_chat_is_what_the_template_makes_of_it(chat_server: Server, none_engine: Engine, loop: LoopThread) -> None:
    messages = [{"role": "system", "content": "Ann has 3 apples."}, {"role": "user", "content": "How many has she?"}]
    (sample,) = loop.run(none_engine.generate("chat", none_engine.encode(messages), 1, GREEDY, 0))
    body = {"messages": messages, "temperature": 0, "max_completion_tokens": GREEDY.max_tokens}
    whole = chat_server.ask(CHAT, body).json()["choices"][0]
    assert (whole["message"]["role"], whole["message"]["content"]) == ("assistant", sample.text)
    events = chat_server.events(CHAT, body)
    assert "".join(event["choices"][0]["delta"].get("content") or "" for event in events) == sample.text


def test_a_model_without_a_chat_template_says_so(server: Server) -> None:
    reply = server.ask(CHAT, {"messages": [{"role": "user", "content": "hi"}]})
    assert "chat template" in reply.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [COMPLETIONS, TOKENS])
def test_a_client_that_leaves_frees_its_sequences(server: Server, loop: LoopThread, path: str, stream: bool) -> None:
    sampling = {"temperature": 1.0, "max_tokens": 300, "ignore_eos": True, "n": 4}
    body = {"token_ids": [5], "sampling_params": sampling} if path == TOKENS else {"prompt": [5], **sampling}

    async def leave() -> float:
        call = AsgiCall(server.app, path, {**body, "stream": stream})
        await running(server, 4)
        left = time.monotonic()
        call.leave()
        await call.ended()
        await running(server, 0)
        return time.monotonic() - left

    assert loop.run(leave()) < LIMIT_S


async def running(server: Server, count: int) -> None:
    """Return once so many sequences run in the engine."""
    engine = server.service.require().engine
    async with asyncio.timeout(60):
        while (await engine.stats()).running != count:  # noqa: ASYNC110 (the engine has no event for it)
            await asyncio.sleep(0.005)
