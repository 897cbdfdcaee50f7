"""What the service needs of an inference engine, as a Protocol and plain values.

Knows nothing of vLLM, HTTP or ZeroMQ. `vllm_engine` is the real one, `scripted_engine` a deterministic double.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from starlette.types import ASGIApp

from flashrl_rollout.staged import StagedUpdate
from flashrl_wire.digest import PartDigest
from flashrl_wire.layout import WeightLayout
from flashrl_wire.messages import PauseMode, Quantization, Sampling

NUM_SEQUENCES = "flashrl.num_sequences"
"""Key of a `standard_app`'s scope: how many sequences the request asks for."""


@dataclass(frozen=True)
class EngineInfo:
    """What never changes while an engine lives."""

    model: str
    quantization: Quantization
    vocab_size: int
    max_model_len: int
    tokenizer_hash: str
    kv_cache_dtype: str = "auto"
    kv_cache_tokens: int = field(default=0, compare=False)  # what memory was free, not what the model is
    kv_cache_bytes: int = field(default=0, compare=False)  # of each device; 0 where it was not measured but asked for


@dataclass(frozen=True)
class EngineCompletion:
    """One sample: `logprobs[i]` is ln p(token_ids[i]) after temperature; spans are [version, start, end)."""

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    weight_versions: list[tuple[int, int, int]]
    top_logprobs: list[dict[int, float]] | None = None


@dataclass(frozen=True)
class EngineStats:
    """Gauges for `/metrics`; `generated_tokens` counts from the engine's start."""

    running: int = 0
    waiting: int = 0
    extra: Mapping[str, float] = field(default_factory=dict)
    generated_tokens: int = 0


class EngineError(Exception):
    """The engine could not do what it was asked; its weights are as they were before the call."""


class CopiesDifferError(EngineError):
    """Copies of one weight, in several ranks or engines, are not equal."""


class EngineDeadError(EngineError):
    """The engine is gone; nothing but a restart helps."""


class Engine(Protocol):
    """An engine whose weights can be replaced in place. All calls come from one event loop.

    Update protocol: `prepare`, or not; then, while paused, `apply` or `load_checkpoint` once, and `adopt` before, after
    or beside it; then `revert`, or `keep`, for which nothing need be paused, before the next write. Both writes report
    what the written elements added to each part's digest, *as read back from what the engine computes with*.
    """

    @property
    def info(self) -> EngineInfo:
        """Fixed facts."""

    @property
    def is_alive(self) -> bool:
        """False once the engine has died."""

    def encode(self, prompt: str | list[dict[str, str]]) -> list[int]:
        """Token ids of a text or a chat (with the generation prompt); ValueError if the tokenizer cannot."""

    async def generate(
        self, request_id: str, prompt_token_ids: list[int], n: int, sampling: Sampling, top_logprobs: int
    ) -> list[EngineCompletion]:
        """n samples of one prompt; cancelling the task frees their sequences."""

    async def pause(self, mode: PauseMode, deadline_s: float) -> None:
        """Stop at a step boundary: `keep` freezes running sequences, `drain` finishes them (TimeoutError: go on)."""

    async def resume(self) -> None:
        """Go on after `pause`."""

    async def layout(self) -> WeightLayout:
        """Every stored tensor."""

    async def digests(self) -> dict[str, PartDigest]:
        """Digest of every part, computed now from what the engine computes with; CopiesDifferError."""

    async def prepare(self, update: StagedUpdate) -> None:
        """Do what can be done of a staged update before it is written, while sampling goes on.

        Only the speed of an `apply` that follows with nothing written in between depends on it.
        """

    async def apply(self, update: StagedUpdate) -> dict[str, PartDigest]:
        """Write a staged update in place, keep the old values aside; EngineError: nothing changed."""

    async def load_checkpoint(self, path: Path) -> dict[str, PartDigest]:
        """Quantize a Hugging Face folder and write it in place, keep the old values aside."""

    async def adopt(self, version: int) -> None:
        """Tokens from now on belong to `version`; forget every cached key and value. EngineError: done or not."""

    async def revert(self) -> None:
        """Put the old values of the last write back, and the version before; harmless where there is nothing to."""

    async def keep(self) -> None:
        """Drop the old values. EngineDeadError where that fails: nobody could tell what a later `revert` would do."""

    async def standard_app(self, empty_app: Callable[[], Any]) -> ASGIApp | None:
        """vLLM's own HTTP routes for this engine, in a FastAPI app that `empty_app` makes; None where it has none."""

    async def stats(self) -> EngineStats:
        """Gauges."""

    async def close(self) -> None:
        """Stop the engine and its processes."""
