"""How a vLLM engine is brought to rest and goes on again.

Knows vLLM's scheduler and what it answers, without importing it; knows nothing of weights or of who asks.
"""

import asyncio
from collections.abc import Awaitable
from typing import Any, Protocol

from flashrl_wire.messages import PauseMode

_RESUME_TIMEOUT_S = 300.0  # longer than any step: an engine that has not answered by then never will
_MODES = {"keep": "keep", "drain": "wait"}


class Answer(Protocol):
    """What the engine's process answers to a call; EngineError and EngineDeadError where it does not."""

    async def __call__(self, call: Awaitable[Any], timeout_s: float = ...) -> Any: ...


class Pausing:
    """`pause`, then `resume`. An idle engine's answer to the first is read later, by `answered`."""

    def __init__(self, llm: Any, answer: Answer) -> None:
        """`llm` is a vllm.v1.engine.async_llm.AsyncLLM; `answer` waits for its process."""
        self.is_paused = False
        self._llm, self._answer = llm, answer
        self._unread: asyncio.Future[None] | None = None

    async def pause(self, mode: PauseMode, deadline_s: float) -> None:
        """Stop at a step boundary: `keep` freezes running sequences, `drain` finishes them (TimeoutError: go on).

        Without work an engine is at rest as soon as it reads this, and it reads this before whatever it is asked next.
        Calls the engine core directly: vLLM's public `pause_generation` ends in a 20 ms sleep.
        """
        pausing = self._llm.engine_core.pause_scheduler_async(mode=_MODES[mode], clear_cache=False)
        self._unread = asyncio.ensure_future(pausing)
        await asyncio.sleep(0)  # now it is on its way, ahead of every later call
        if self._llm.output_processor.has_unfinished_requests():
            await self._at_rest(deadline_s)
        self.is_paused = True

    async def _at_rest(self, deadline_s: float) -> None:
        try:
            await asyncio.wait_for(self.answered(), deadline_s)
        except TimeoutError as error:
            await self.resume()
            raise TimeoutError(f"sequences were still running after {deadline_s:g} s") from error

    async def answered(self) -> None:
        """The engine has said that it is at rest, where it was told to be."""
        unread, self._unread = self._unread, None
        if unread is not None:
            await self._answer(unread)

    async def resume(self) -> None:
        """Go on after `pause`."""
        await self.answered()
        await self._answer(self._llm.engine_core.resume_scheduler_async(), _RESUME_TIMEOUT_S)
        self.is_paused = False

    def close(self) -> None:
        """Nobody reads an answer any more."""
        if self._unread is not None:
            self._unread.cancel()
