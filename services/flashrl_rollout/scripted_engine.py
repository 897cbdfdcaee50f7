"""An engine without vLLM: real stored weights, and tokens that are a hash of prompt, seed and weights.

For tests of everything around an engine. Knows the update protocol and how to break it; computes no model.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from starlette.types import ASGIApp

from flashrl_rollout import stored_state
from flashrl_rollout.engine import EngineCompletion, EngineDeadError, EngineError, EngineInfo, EngineStats
from flashrl_rollout.staged import StagedUpdate, read_staged
from flashrl_rollout.stored_state import Parts
from flashrl_wire import delta
from flashrl_wire.delta import Change
from flashrl_wire.digest import PartDigest, bits
from flashrl_wire.layout import WeightLayout
from flashrl_wire.messages import PauseMode, Sampling

_DRAW = 1 << 64


class Tokenizer(Protocol):
    """Text <-> token ids."""

    def encode(self, prompt: str | list[dict[str, str]]) -> list[int]:
        """Token ids of a text or a chat."""

    def decode(self, token_ids: list[int]) -> str:
        """The text of token ids."""


class ByteTokenizer:
    """A token is a byte of UTF-8; a chat is its contents, a line each."""

    def encode(self, prompt: str | list[dict[str, str]]) -> list[int]:
        """Bytes of the text; ValueError for a chat message without content."""
        if isinstance(prompt, str):
            return list(prompt.encode())
        if any("content" not in message for message in prompt):
            raise ValueError("a chat message has no content")
        return list("".join(message["content"] + "\n" for message in prompt).encode())

    def decode(self, token_ids: list[int]) -> str:
        """Printable ASCII, one character a token."""
        return "".join(chr(32 + token % 95) for token in token_ids)


@dataclass
class Faults:
    """What goes wrong, from the next call on; tests switch them while the engine runs."""

    fail_prepare: bool = False
    fail_apply: bool = False
    corrupt_write: bool = False  # a written element reads back otherwise
    corrupt_untouched: bool = False  # an element that no update wrote: only an audit sees it
    fail_adopt: bool = False
    fail_keep: bool = False
    fail_revert: bool = False
    die_after_requests: int | None = None
    apply_delay_s: float = 0.0


class ScriptedEngine:
    """`Engine` over plain tensors. Every token takes `token_s` seconds; `end_token` None: only lengths end a sample."""

    def __init__(
        self,
        layout: WeightLayout,
        parts: Parts,
        info: EngineInfo,
        *,
        tokenizer: Tokenizer | None = None,
        end_token: int | None = 0,
        token_s: float = 0.0,
        faults: Faults | None = None,
    ) -> None:
        self.parts = parts
        self.faults = faults or Faults()
        self.cancelled_requests = 0
        self._layout, self._info, self._token_s = layout, info, token_s
        self._tokenizer, self._end_token = tokenizer or ByteTokenizer(), end_token
        self._version = self._kept_version = 0
        self._digest = stored_state.combined(layout, stored_state.digests(parts))
        self._old: list[Change] = []
        self._is_alive = True
        self._requests = 0
        self.running_requests = 0
        self.generated_tokens = 0
        self._admits, self._steps = _set_event(), _set_event()
        self._idle = _set_event()

    @property
    def info(self) -> EngineInfo:
        """Fixed facts."""
        return self._info

    @property
    def is_alive(self) -> bool:
        """False after a fault killed it or `close`."""
        return self._is_alive

    def encode(self, prompt: str | list[dict[str, str]]) -> list[int]:
        """Token ids of a text or a chat."""
        return self._tokenizer.encode(prompt)

    async def generate(
        self, request_id: str, prompt_token_ids: list[int], n: int, sampling: Sampling, top_logprobs: int
    ) -> list[EngineCompletion]:
        """n samples, one after the other."""
        self._requests += 1
        if self.faults.die_after_requests is not None and self._requests > self.faults.die_after_requests:
            self._is_alive = False
        self._check_alive()
        await self._admits.wait()
        try:
            async with self._counted():
                return [await self._sample(prompt_token_ids, i, sampling, top_logprobs) for i in range(n)]
        except asyncio.CancelledError:
            self.cancelled_requests += 1
            raise

    @asynccontextmanager
    async def _counted(self) -> AsyncIterator[None]:
        self.running_requests += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.running_requests -= 1
            if not self.running_requests:
                self._idle.set()

    async def _sample(self, prompt: list[int], index: int, sampling: Sampling, top_logprobs: int) -> EngineCompletion:
        seed = "greedy" if sampling.temperature == 0 else str((sampling.seed or 0) + index)
        tokens: list[int] = []
        logprobs: list[float] = []
        spans: list[tuple[int, int, int]] = []
        text = ""
        while len(tokens) < sampling.max_tokens and not self._is_stopped(tokens, text, sampling.stop):
            await asyncio.sleep(self._token_s)
            await self._steps.wait()
            self._check_alive()
            token, logprob = self._draw(prompt, seed, tokens)
            tokens.append(token)
            logprobs.append(logprob)
            self.generated_tokens += 1
            spans = _extend(spans, self._version, len(tokens))
            text = self._tokenizer.decode(tokens)
        reason = "stop" if self._is_stopped(tokens, text, sampling.stop) else "length"
        top = [self._top(*pair, top_logprobs) for pair in zip(tokens, logprobs, strict=True)] if top_logprobs else None
        return EngineCompletion(text, tokens, logprobs, reason, spans, top)

    def _is_stopped(self, tokens: list[int], text: str, stop: list[str]) -> bool:
        return tokens[-1:] == [self._end_token] or any(word in text for word in stop)

    def _draw(self, prompt: list[int], seed: str, tokens: list[int]) -> tuple[int, float]:
        """The next token and its log-probability, in (-3, 0]."""
        content = f"{prompt} {seed} {tokens} {self._digest}".encode()
        word = hashlib.blake2b(content, digest_size=16).digest()
        chance = int.from_bytes(word[8:], "little") / _DRAW
        return int.from_bytes(word[:8], "little") % self._info.vocab_size, -3.0 * chance

    def _top(self, token: int, logprob: float, count: int) -> dict[int, float]:
        vocab_size = self._info.vocab_size
        return {(token + i) % vocab_size: logprob - i for i in range(min(count, vocab_size))}

    async def pause(self, mode: PauseMode, deadline_s: float) -> None:
        """Stop before the next token, or after the last one of what runs."""
        self._check_alive()
        self._admits.clear()
        if mode == "drain":
            try:
                await asyncio.wait_for(self._idle.wait(), deadline_s)
            except TimeoutError:
                self._admits.set()
                raise
        self._steps.clear()

    async def resume(self) -> None:
        """Go on."""
        self._check_alive()
        self._steps.set()
        self._admits.set()

    async def layout(self) -> WeightLayout:
        """Every stored tensor."""
        return self._layout

    async def digests(self) -> dict[str, PartDigest]:
        """Digest of every part as it is now."""
        self._check_alive()
        return stored_state.digests(self.parts)

    async def prepare(self, update: StagedUpdate) -> None:
        """Nothing: its writes are quick."""
        if self.faults.fail_prepare:
            raise EngineError("prepare was told to fail")

    async def apply(self, update: StagedUpdate) -> dict[str, PartDigest]:
        """Write in place, old values aside."""
        self._check_alive()
        await asyncio.sleep(self.faults.apply_delay_s)
        if self.faults.fail_apply:
            raise EngineError("apply was told to fail")
        return self._write(read_staged(update))

    async def load_checkpoint(self, path: Path) -> dict[str, PartDigest]:
        """Write every part of a Hugging Face folder, old values aside."""
        self._check_alive()
        try:
            parts = stored_state.read_parts(path, self._layout, {self._info.vocab_size})
        except ValueError as error:
            raise EngineError(str(error)) from error
        return self._write(delta.snapshot(name, values) for name, values in parts.items())

    def _write(self, changes: Iterable[Change]) -> dict[str, PartDigest]:
        shifts: dict[str, PartDigest] = {}
        for change in changes:
            flat = self.parts[change.part].view(-1)
            old = Change(change.part, delta.read(change, flat), change.indices, change.start)
            self._old.append(old)
            delta.write(change, flat)
            if self.faults.corrupt_write and len(self._old) == 1:
                bits(flat)[change.start if change.indices is None else change.indices[0]] ^= 1
            found = Change(change.part, delta.read(change, flat), change.indices, change.start)
            shifts[change.part] = shifts.get(change.part, PartDigest()) + (found.digest() - old.digest())
        if self.faults.corrupt_untouched:
            bits(next(iter(self.parts.values())))[-1] ^= 1
        self._digest = self._combined()
        return shifts

    def _combined(self) -> str:
        return stored_state.combined(self._layout, stored_state.digests(self.parts))

    async def adopt(self, version: int) -> None:
        """Tokens from now on belong to `version`."""
        self._check_alive()
        if self.faults.fail_adopt:
            raise EngineError("adopt was told to fail")
        self._version = version

    async def revert(self) -> None:
        """Put the old values back, the last written first."""
        self._check_alive()
        if self.faults.fail_revert:
            raise EngineError("revert was told to fail")
        for old in reversed(self._old):
            delta.write(old, self.parts[old.part].view(-1))
        self._old.clear()
        self._version, self._digest = self._kept_version, self._combined()

    async def keep(self) -> None:
        """Drop the old values."""
        self._check_alive()
        if self.faults.fail_keep:
            self._is_alive = False
            raise EngineDeadError("keep was told to fail")
        self._old.clear()
        self._kept_version = self._version

    async def standard_app(self, empty_app: Callable[[], Any]) -> ASGIApp | None:
        """It has no routes of its own."""
        return None

    async def stats(self) -> EngineStats:
        """Requests at work."""
        return EngineStats(running=self.running_requests, generated_tokens=self.generated_tokens)

    async def close(self) -> None:
        """Die."""
        self._is_alive = False

    def _check_alive(self) -> None:
        if not self._is_alive:
            raise EngineDeadError("the scripted engine has died")


def _set_event() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


def _extend(spans: list[tuple[int, int, int]], version: int, end: int) -> list[tuple[int, int, int]]:
    """Spans [version, start, end) with token `end - 1` added."""
    if spans and spans[-1][0] == version:
        return [*spans[:-1], (version, spans[-1][1], end)]
    return [*spans, (version, end - 1, end)]
