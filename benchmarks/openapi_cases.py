"""Requests drawn from a running service's OpenAPI description, and what it answers.

Knows schemathesis and hypothesis; knows nothing of what a good answer is.
"""

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import hypothesis
import requests
import schemathesis
from hypothesis import HealthCheck, Phase
from schemathesis import Case, GenerationMode
from schemathesis.core.failures import FailureGroup
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

EXAMPLES = 40
DEPARTS = " DEPARTS FROM THE DESCRIPTION:"
_CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]
_STANDARD = frozenset({"/v1/models", "/v1/completions", "/v1/chat/completions", "/inference/v1/generate"})
_GOOD: dict[str, dict[str, Any]] = {
    "/generate": {"prompts": ["hi", [1, 2, 3]], "n": 2, "sampling": {"max_tokens": 4}},
    "/v1/completions": {"prompt": "hi", "max_tokens": 4},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4},
    "/inference/v1/generate": {"token_ids": [1, 2, 3], "sampling_params": {"max_tokens": 4}},
}
_MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)


@dataclass(frozen=True)
class Sent:
    """A request in one line, and its answer; `status` 0: none came."""

    name: str
    status: int
    headers: dict[str, str]
    content: bytes
    seconds: float
    method: str = ""


class OpenApiCases:
    """Draws requests for every operation of the description; `with_standard`: for vLLM's own routes, too."""

    def __init__(self, url: str, limit_s: float, *, with_standard: bool) -> None:
        self._url, self._limit_s = url, limit_s
        self._session = requests.Session()
        description = requests.get(f"{url}/openapi.json", timeout=limit_s).json()
        self._model, self._random = "", random.Random(0)
        if with_standard:
            self._model = requests.get(f"{url}/v1/models", timeout=limit_s).json()["data"][0]["id"]
            _add_standard(description)
        operations = schemathesis.openapi.from_dict(description).get_all_operations()
        self._operations = [found.ok() for found in operations if isinstance(found, Ok)]

    def round(self, seed: int, end: float) -> Iterator[tuple[str, list[Sent]]]:
        """Some requests for every operation, right ones and wrong ones, until `end` (time.monotonic())."""
        for operation in self._operations:
            for mode in _MODES:
                if time.monotonic() < end:
                    yield operation.label, self._some(operation.as_strategy(generation_mode=mode), seed, end)

    def _some(self, strategy: Any, seed: int, end: float) -> list[Sent]:
        sent: list[Sent] = []

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @hypothesis.given(case=strategy)
        def draw(case: Case[Any]) -> None:
            if time.monotonic() < end:
                sent.append(self._send(case))

        try:
            draw()
        except hypothesis.errors.Unsatisfiable:  # nothing is wrong for a route that takes nothing
            return sent
        except ValueError as error:  # schemathesis cannot check a wrong body with bytes in it, and gives up
            if "'Binary'" not in str(error):
                raise
        return sent

    def _send(self, case: Case[Any]) -> Sent:
        if case.formatted_path in _GOOD and isinstance(case.body, dict):
            case.body = self._steered(case.formatted_path, case.body)
        name = f"{case.method} {case.formatted_path} {case.query} {case.headers} {case.body!r}"
        start = time.monotonic()
        try:
            reply = case.call(base_url=self._url, session=self._session, timeout=self._limit_s)
        except (requests.RequestException, UnicodeError) as error:
            is_ours = isinstance(error, requests.Timeout | requests.ConnectionError)
            status = 0 if is_ours else 1  # what requests itself cannot send never left
            return Sent(f"{name}: {error}", status, {}, b"", time.monotonic() - start, case.method)
        seconds = time.monotonic() - start
        headers = {key.lower(): values[0] for key, values in reply.headers.items()}
        if case.formatted_path not in _STANDARD:
            name += _departure(case, reply)
        return Sent(name, reply.status_code, headers, reply.content, seconds, case.method)

    def _steered(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Mostly a good request with one or two of the drawn fields: wholly drawn ones seldom pass the first check."""
        model = {"model": self._model} if path.startswith("/v1/") else {}
        if not body or self._random.random() < 0.2:
            return body
        chosen = self._random.sample(sorted(body), min(len(body), self._random.choice([1, 2])))
        return model | _GOOD[path] | {name: body[name] for name in chosen}


def _departure(case: Case[Any], reply: schemathesis.Response) -> str:
    """How an answer differs from the description, or nothing."""
    try:
        case.validate_response(reply, checks=_CHECKS)
    except (AssertionError, FailureGroup) as failure:
        return f"{DEPARTS} {' '.join(str(failure).split())[:300]}"
    return ""


def _add_standard(description: dict[str, Any]) -> None:
    """vLLM's own routes, which the service's description leaves out."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest

    replies = {"200": {"description": "whatever vLLM says"}}
    description["paths"]["/v1/models"] = {"get": {"responses": replies}}
    for path, kind in (
        ("/v1/completions", CompletionRequest),
        ("/v1/chat/completions", ChatCompletionRequest),
        ("/inference/v1/generate", GenerateRequest),
    ):
        schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        description["components"]["schemas"] |= schema.pop("$defs", {})
        body = {"content": {"application/json": {"schema": schema}}, "required": True}
        description["paths"][path] = {"post": {"requestBody": body, "responses": replies}}
