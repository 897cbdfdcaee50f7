"""The engine protocol on vLLM's AsyncLLM.

Knows vLLM's weight versions and worker calls; knows nothing of HTTP, transfers or who asks.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from starlette.types import ASGIApp
from vllm.exceptions import VLLMClientError
from vllm.inputs.engine import tokens_input
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError as VllmDeadError
from vllm.v1.engine.exceptions import EngineGenerateError

from flashrl_rollout import rank_replies
from flashrl_rollout.completions import completions, sampling_params
from flashrl_rollout.device_memory import DeviceMemory
from flashrl_rollout.engine import EngineCompletion, EngineDeadError, EngineError, EngineInfo, EngineStats
from flashrl_rollout.engine_settings import EngineSettings, environment
from flashrl_rollout.engine_start import StartEngine
from flashrl_rollout.gauges import Gauges
from flashrl_rollout.openai_routes import add_standard_routes
from flashrl_rollout.pausing import Pausing
from flashrl_rollout.shared_metrics import SharedMetrics
from flashrl_rollout.staged import StagedUpdate
from flashrl_rollout.stall import StallWatch
from flashrl_rollout.tokenization import Tokenization
from flashrl_rollout.vllm_launch import find_folder, launch
from flashrl_rollout.warm_up import warm_up
from flashrl_wire.digest import PartDigest
from flashrl_wire.layout import WeightLayout
from flashrl_wire.messages import PauseMode, Sampling

_CALL_TIMEOUT_S = 1800.0
_SHORTEST_STALL_S = 60.0  # a busy machine may hold a step up for longer than a short limit of requests
_HEARTBEAT_S = 0.5
_PREPARED_POLL_S = 0.002
_DEATH_NOTICE_S = 1.0
_SHUTDOWN_S = 20.0


class VllmEngine:
    """A started engine; `await VllmEngine.start(settings)` makes one."""

    def __init__(self, llm: AsyncLLM, settings: EngineSettings, gauges: Gauges) -> None:
        self._llm = llm
        self._gauges = gauges
        self._scratch_bytes = int(settings.update_scratch_gib * (1 << 30)) or None
        self._device_memory = DeviceMemory(settings.tensor_parallel_size)
        self._tokenization = Tokenization(llm.get_tokenizer(), llm.model_config.max_model_len)
        self._layout = WeightLayout(())
        self._is_lost = False
        self._pausing = Pausing(llm, self._core)
        self._kept_version = self._adopted_version = 0
        self._prepared: tuple[str, dict[str, PartDigest]] | None = None  # path, and what the workers said of it
        self._stall_watch = StallWatch(max(settings.request_timeout_s, _SHORTEST_STALL_S))
        config = llm.model_config
        self.info = EngineInfo(
            model=settings.model,
            quantization=settings.quantization,
            vocab_size=config.get_vocab_size(),
            max_model_len=config.max_model_len,
            tokenizer_hash=self._tokenization.hash,
            kv_cache_dtype=settings.kv_cache_dtype,
            kv_cache_tokens=llm.vllm_config.cache_config.kv_cache_size_tokens or 0,
        )

    @classmethod
    def starter(cls, engines: int) -> StartEngine:
        """Starts each of so many engines of one process."""
        metrics = SharedMetrics(engines)
        return lambda settings, index: cls.start(settings, metrics.loggers(index))

    @classmethod
    async def start(cls, settings: EngineSettings, loggers: Sequence[Any] = ()) -> "VllmEngine":
        """Load the model, find its tensors, warm up; ValueError for settings or models that cannot work.

        `loggers` are vLLM's factories of loggers besides its own.
        """
        folder = await asyncio.to_thread(find_folder, settings.model)
        gauges = Gauges()
        with environment(settings.environment()):
            llm = await asyncio.to_thread(launch, settings, folder, [gauges.factory, *loggers])
        try:
            engine = cls(llm, settings, gauges)
            await engine._open(folder)
        except BaseException:
            await asyncio.to_thread(llm.shutdown, _SHUTDOWN_S)
            raise
        return engine

    async def _open(self, folder: Path) -> None:
        try:
            replies = await self._workers("flashrl_open", str(folder))
            self._layout = rank_replies.layout(replies)
        except EngineError as error:
            raise ValueError(str(error)) from error
        self.info = replace(self.info, kv_cache_bytes=min(int(reply["kv_cache_bytes"]) for reply in replies))
        await self._name_version(self._kept_version)
        await warm_up(self)

    @property
    def is_alive(self) -> bool:
        """False once a process of the engine has died or hangs, or its weights are lost."""
        return not self._is_lost and not self._llm.errored and not self._is_stalled

    @property
    def _is_stalled(self) -> bool:
        """Whether a step takes longer than a whole request may."""
        has_work = self._llm.output_processor.has_unfinished_requests() and not self._pausing.is_paused
        return self._stall_watch.is_stalled(has_work, self._gauges.last_step)

    def encode(self, prompt: str | list[dict[str, str]]) -> list[int]:
        """Token ids of a text or a chat (with the generation prompt); ValueError if the tokenizer cannot."""
        return self._tokenization.encode(prompt)

    async def generate(
        self, request_id: str, prompt_token_ids: list[int], n: int, sampling: Sampling, top_logprobs: int
    ) -> list[EngineCompletion]:
        """n samples of one prompt, sample i drawn with seed + i; cancelling the task frees their sequences.

        Raises ValueError for a prompt that is too long or no prompt of this model.
        """
        try:
            params = sampling_params(sampling, n, top_logprobs)
            async for output in self._llm.generate(tokens_input(prompt_token_ids), params, request_id):
                if output.finished:
                    return completions(output, params, self._tokenization)
        except VllmDeadError as error:
            raise EngineDeadError("the engine has died") from error
        except EngineGenerateError as error:
            raise EngineError(f"generation failed: {error.__cause__}") from error
        except VLLMClientError as error:
            raise ValueError(str(error)) from error
        raise EngineError("vLLM ended a request without an answer")

    async def pause(self, mode: PauseMode, deadline_s: float) -> None:
        """Stop at a step boundary; TimeoutError for a drain past its deadline, and sampling goes on."""
        await self._pausing.pause(mode, deadline_s)

    async def resume(self) -> None:
        """Go on after `pause`."""
        await self._pausing.resume()

    async def layout(self) -> WeightLayout:
        """Every stored tensor."""
        return self._layout

    async def digests(self) -> dict[str, PartDigest]:
        """Digest of every part, computed now from what the engine computes with."""
        return rank_replies.digests(await self._workers("flashrl_digests"))

    async def prepare(self, update: StagedUpdate) -> None:
        """Make a staged update ready on the device while sampling goes on, so that `apply` has little left to do."""
        self._prepared = None
        await self._workers("flashrl_prepare", update.path, update.model_dump_json(), self._scratch_bytes)
        replies = await self._workers("flashrl_is_prepared")
        while not all(reply["done"] for reply in replies):
            await asyncio.sleep(_PREPARED_POLL_S)
            replies = await self._workers("flashrl_is_prepared")
        if all("digests" in reply for reply in replies):
            self._prepared = update.path, rank_replies.digests(replies)

    async def apply(self, update: StagedUpdate) -> dict[str, PartDigest]:
        """Write a staged update in place, keep the old values aside; EngineError: nothing changed."""
        prepared, self._prepared = self._prepared, None
        if prepared is None or prepared[0] != update.path:
            return await self._write("flashrl_apply", update.path, update.model_dump_json())
        await self._write("flashrl_apply_prepared", update.path)
        return prepared[1]

    async def load_checkpoint(self, path: Path) -> dict[str, PartDigest]:
        """Quantize a Hugging Face folder and write it in place, as `apply` does."""
        self._prepared = None
        return await self._write("flashrl_load_checkpoint", str(path))

    async def _write(self, call: str, *arguments: str) -> dict[str, PartDigest]:
        try:
            return rank_replies.digests(await self._workers(call, *arguments))
        except EngineDeadError:
            self._is_lost = True
            raise
        except EngineError as error:
            await self._undo(error)
            raise EngineError(f"{error}; the old weights are in place") from error

    async def _undo(self, cause: EngineError) -> None:
        """Take a failed write back on every rank: the one that failed has done so, the others have not."""
        try:
            await self.revert()
        except EngineError as error:
            self._is_lost = True
            raise EngineDeadError(f"{cause}; and the old weights could not be put back: {error}") from cause

    async def adopt(self, version: int) -> None:
        """Tokens from now on belong to `version`; forget every cached key and value.

        Running sequences are recomputed: without that they, and prompts that share their prefix, would go on with
        keys and values of the old weights.
        """
        self._adopted_version = version
        core = self._llm.engine_core
        forgetting = self._core(core.reset_prefix_cache_async(reset_running_requests=True))
        calls = forgetting, self._name_version(version), self._pausing.answered()  # at once: sampling waits
        is_forgotten, *_ = await asyncio.gather(*calls)
        if not is_forgotten:
            raise EngineError("vLLM did not forget the keys and values of the old weights")

    async def revert(self) -> None:
        """Put the old values of the last write back, and the name of their version."""
        await self._workers("flashrl_revert")
        await self._name_version(self._kept_version)

    async def keep(self) -> None:
        """Drop the old values."""
        try:
            await self._workers("flashrl_keep")
        except EngineError as error:
            self._is_lost = True
            raise EngineDeadError(f"the old values could not be dropped: {error}") from error
        self._kept_version = self._adopted_version

    async def _name_version(self, version: int) -> None:
        """What vLLM says that tokens from now on belong to."""
        await self._core(self._llm.engine_core.set_weight_version_async(str(version)))

    async def standard_app(self, empty_app: Callable[[], Any]) -> ASGIApp:
        """vLLM's own HTTP routes for this engine, in a FastAPI app that `empty_app` makes."""
        app = empty_app()
        await add_standard_routes(app, self._llm, self.info.model)
        return cast("ASGIApp", app)

    async def stats(self) -> EngineStats:
        """Gauges."""
        stats = self._gauges.stats()
        return replace(stats, extra={**stats.extra, **self._device_memory.gauges()})

    async def close(self) -> None:
        """Stop the engine and its processes."""
        if self._llm.output_handler is not None:
            self._llm.output_handler.cancel()  # it would report the engine's end as a failure
        self._pausing.close()
        await asyncio.to_thread(self._llm.shutdown, _SHUTDOWN_S)
        self._llm.shutdown = _nothing  # its finalizer calls it again, after the interpreter has taken vLLM apart

    async def _workers(self, call: str, *arguments: str | int | None) -> list[rank_replies.Reply]:
        replies: list[rank_replies.Reply] = await self._core(self._llm.collective_rpc(call, args=arguments))
        rank_replies.check(replies)
        return replies

    async def _core(self, call: Awaitable[Any], timeout_s: float = _CALL_TIMEOUT_S) -> Any:
        """The result of a call to the engine's process; vLLM leaves such calls pending for ever when it dies."""
        task = asyncio.ensure_future(call)
        try:
            async with asyncio.timeout(timeout_s):
                while not (await asyncio.wait({task}, timeout=_HEARTBEAT_S))[0]:
                    if not self.is_alive:
                        raise EngineDeadError("the engine has died")
        except TimeoutError as error:
            self._is_lost = True
            raise EngineDeadError(f"the engine did not answer for {timeout_s:g} s") from error
        finally:
            task.cancel()
        failure = task.exception()
        if isinstance(failure, VllmDeadError):
            raise EngineDeadError("the engine has died") from failure
        if failure is not None:  # vLLM passes on whatever happened in the engine's process as a bare Exception
            if await self._dies():
                raise EngineDeadError("the engine has died") from failure
            raise EngineError(str(failure)) from failure
        return task.result()

    async def _dies(self) -> bool:
        """Whether the engine is dead or about to be: calls fail a moment before vLLM knows that a worker is gone."""
        deadline = asyncio.get_running_loop().time() + _DEATH_NOTICE_S
        while not self._llm.errored and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110 (no event for it)
            await asyncio.sleep(_DEATH_NOTICE_S / 20)
        return bool(self._llm.errored)


def _nothing() -> None:
    """The shutdown of an engine that has been shut down."""
