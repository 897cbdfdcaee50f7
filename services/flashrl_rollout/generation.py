"""A /generate request from validation to reply: encode, admit, sample, give up when nobody listens any more.

Knows prompts, seeds and limits; knows nothing of HTTP or of how weights change.
"""

import asyncio
import math
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, cast

from flashrl_rollout.engine import Engine, EngineCompletion
from flashrl_rollout.versions import VersionGate
from flashrl_wire.errors import EngineFailedError, InvalidFieldError, NotReadyError, TimedOutError
from flashrl_wire.messages import Completion, GenerateRequest, GenerateResponse, GenerateResult, Prompt, Sampling, Usage

_LARGEST_SEED = (1 << 63) - 1


class ClientGoneError(Exception):
    """The client left; there is nobody to answer."""


class Generator:
    """Answers /generate requests with one engine."""

    def __init__(self, engine: Engine, gate: VersionGate, timeout_s: float) -> None:
        self._engine, self._gate, self._timeout_s = engine, gate, timeout_s

    async def generate(self, request: GenerateRequest, disconnected: Callable[[], Awaitable[None]]) -> GenerateResponse:
        """The reply; ClientGoneError once `disconnected` returns, TimedOutError after the limit.

        Whatever ends it early, its sequences are freed in the engine. Sample j of prompt i has the seed
        `seed + i * n + j`, so that equal prompts of a request do not share their noise.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._while_wanted(request, disconnected)
        except TimeoutError as error:
            raise TimedOutError(f"not finished after {self._timeout_s:g} s (request_timeout_s)") from error

    async def _while_wanted(
        self, request: GenerateRequest, disconnected: Callable[[], Awaitable[None]]
    ) -> GenerateResponse:
        work = asyncio.ensure_future(self._generate(request))
        gone = asyncio.ensure_future(disconnected())
        tasks: set[asyncio.Future[Any]] = {work, gone, asyncio.ensure_future(self._gate.fenced())}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            if gone.done():
                raise ClientGoneError
            self._gate.check()
            raise NotReadyError("sampling was interrupted")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _generate(self, request: GenerateRequest) -> GenerateResponse:
        if request.sampling.temperature == 0 and request.n > 1:
            raise InvalidFieldError(f"n: samples at temperature 0 are all the same one, got {request.n}", field="n")
        prompts = await self._encode(request)
        async with self._gate.admitted(len(prompts) * request.n, request.min_weight_version) as version:
            samples = await self._sample(prompts, request)
        results = [
            GenerateResult(prompt_token_ids=prompt, completions=[_completion(sample) for sample in group])
            for prompt, group in zip(prompts, samples, strict=True)
        ]
        return GenerateResponse(
            weight_version=version,
            quantization=self._engine.info.quantization,
            results=results,
            usage=_usage(results),
        )

    async def _encode(self, request: GenerateRequest) -> list[list[int]]:
        prompts = []
        for index, prompt in enumerate(request.prompts):
            ids = self._token_ids(prompt, f"prompts.{index}")
            self._check_length(len(ids), request.sampling.max_tokens, f"prompts.{index}")
            prompts.append(ids)
            await asyncio.sleep(0)  # thousands of texts must not hold everybody else up
        return prompts

    def _token_ids(self, prompt: Prompt, field: str) -> list[int]:
        if prompt and isinstance(prompt, list) and isinstance(prompt[0], int):
            return self._known(prompt, field)
        try:
            ids = self._engine.encode(cast("str | list[dict[str, str]]", prompt)) if prompt else []
        except ValueError as error:
            raise InvalidFieldError(f"{field}: {error}") from error
        if not ids:
            raise InvalidFieldError(f"{field}: is empty")
        return ids

    def _known(self, ids: list[int], field: str) -> list[int]:
        vocab_size = self._engine.info.vocab_size
        if max(ids) >= vocab_size:
            raise InvalidFieldError(f"{field}: token id {max(ids)} is outside the vocabulary of {vocab_size}")
        return ids

    def _check_length(self, prompt_tokens: int, max_tokens: int, field: str) -> None:
        limit = self._engine.info.max_model_len
        if prompt_tokens + max_tokens > limit:
            raise InvalidFieldError(
                f"{field}: {prompt_tokens} prompt tokens and sampling.max_tokens {max_tokens} "
                f"are more than the context of {limit}"
            )

    async def _sample(self, prompts: Sequence[list[int]], request: GenerateRequest) -> list[list[EngineCompletion]]:
        request_id = uuid.uuid4().hex
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(
                        self._engine.generate(
                            f"{request_id}-{index}",
                            prompt,
                            request.n,
                            _seeded(request.sampling, index * request.n),
                            request.top_logprobs,
                        )
                    )
                    for index, prompt in enumerate(prompts)
                ]
        except ExceptionGroup as errors:
            error = errors.exceptions[0]  # it cancelled the others
            raise InvalidFieldError(f"prompts: {error}") if isinstance(error, ValueError) else error from None
        return [task.result() for task in tasks]


def _seeded(sampling: Sampling, offset: int) -> Sampling:
    if sampling.seed is None or not offset:
        return sampling
    return sampling.model_copy(update={"seed": (sampling.seed + offset) & _LARGEST_SEED})


def _completion(sample: EngineCompletion) -> Completion:
    """EngineFailedError for what no client should take for a sample."""
    if sample.finish_reason not in ("stop", "length"):
        raise EngineFailedError(f"the engine ended a sequence early: {sample.finish_reason}")
    if not all(map(math.isfinite, sample.logprobs)):
        raise EngineFailedError("the model computed a log-probability that is no finite number")
    return Completion(
        text=sample.text,
        token_ids=sample.token_ids,
        logprobs=sample.logprobs,
        finish_reason="stop" if sample.finish_reason == "stop" else "length",
        weight_versions=sample.weight_versions,
        top_logprobs=sample.top_logprobs,
    )


def _usage(results: Sequence[GenerateResult]) -> Usage:
    completions = (completion for result in results for completion in result.completions)
    return Usage(
        prompt_tokens=sum(len(result.prompt_token_ids) for result in results),
        completion_tokens=sum(len(completion.token_ids) for completion in completions),
    )
