"""Several engines behind one `Engine`: requests go to the one with the least to do, weights change on all or on none.

Knows the engine protocol only; knows nothing of vLLM, of how engines are started or of who asks.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from starlette.types import ASGIApp, Receive, Scope, Send

from flashrl_rollout.engine import (
    NUM_SEQUENCES,
    CopiesDifferError,
    Engine,
    EngineCompletion,
    EngineDeadError,
    EngineError,
    EngineInfo,
    EngineStats,
)
from flashrl_rollout.staged import StagedUpdate
from flashrl_wire.digest import PartDigest
from flashrl_wire.layout import WeightLayout
from flashrl_wire.messages import PauseMode, Sampling

T = TypeVar("T")
Digests = dict[str, PartDigest]


class EngineGroup:
    """`Engine` over engines of one model; `await EngineGroup.of(engines)` makes one."""

    def __init__(self, engines: Sequence[Engine], layout: WeightLayout) -> None:
        self._engines, self._layout = tuple(engines), layout
        self._sequences = [0] * len(engines)
        self._is_lost = False
        self._is_uneven = False  # the engines may hold different weights, until all have kept the same ones

    @classmethod
    async def of(cls, engines: Sequence[Engine]) -> "EngineGroup":
        """A group of started engines; EngineError unless they hold the same model with the same weights."""
        first = engines[0]
        if any(engine.info != first.info for engine in engines):
            raise EngineError("the engines of the group hold different models")
        layout = await first.layout()
        group = cls(engines, layout)
        if any(other != layout for other in await group._all(lambda engine: engine.layout())):
            raise EngineError("the engines of the group store their weights differently")
        await group.digests()
        return group

    @property
    def info(self) -> EngineInfo:
        """Fixed facts, the same for all; the caches are one as far as anybody sees."""
        return replace(
            self._engines[0].info, kv_cache_tokens=sum(engine.info.kv_cache_tokens for engine in self._engines)
        )

    @property
    def is_alive(self) -> bool:
        """False once one has died, or one's weights are lost: requests are spread over all."""
        return not self._is_lost and all(engine.is_alive for engine in self._engines)

    @property
    def sequences(self) -> tuple[int, ...]:
        """Sequences under way on each engine."""
        return tuple(self._sequences)

    def encode(self, prompt: str | list[dict[str, str]]) -> list[int]:
        """Token ids of a text or a chat; ValueError if the tokenizer cannot."""
        return self._engines[0].encode(prompt)

    async def generate(
        self, request_id: str, prompt_token_ids: list[int], n: int, sampling: Sampling, top_logprobs: int
    ) -> list[EngineCompletion]:
        """n samples of one prompt, all on one engine, so that they share the prompt's keys and values."""
        with self._least_busy(n) as index:
            return await self._engines[index].generate(request_id, prompt_token_ids, n, sampling, top_logprobs)

    @contextmanager
    def _least_busy(self, num_sequences: int) -> Iterator[int]:
        """The engine with the fewest sequences, and these counted as its own."""
        index = self._sequences.index(min(self._sequences))  # the first of equals
        self._sequences[index] += num_sequences
        try:
            yield index
        finally:
            self._sequences[index] -= num_sequences

    async def standard_app(self, empty_app: Callable[[], Any]) -> ASGIApp | None:
        """The engines' own HTTP routes, each request on the engine with the least to do; None where they have none."""
        apps = [app for engine in self._engines if (app := await engine.standard_app(empty_app)) is not None]

        async def spread(scope: Scope, receive: Receive, send: Send) -> None:
            with self._least_busy(scope.get(NUM_SEQUENCES, 1)) as index:
                await apps[index](scope, receive, send)

        return spread if len(apps) == len(self._engines) else None

    async def pause(self, mode: PauseMode, deadline_s: float) -> None:
        """All at rest at a step boundary, or none: after TimeoutError and EngineError all go on."""
        outcomes = await self._outcomes(lambda engine: engine.pause(mode, deadline_s))
        try:
            _raise_worst(outcomes)
        except EngineDeadError:
            raise
        except (EngineError, TimeoutError):
            await self.resume()
            raise

    async def resume(self) -> None:
        """All go on."""
        await self._all(lambda engine: engine.resume())

    async def layout(self) -> WeightLayout:
        """Every stored tensor of one engine: a group is updated as one."""
        return self._layout

    async def digests(self) -> Digests:
        """The digest of every part; CopiesDifferError where two engines hold different weights."""
        return _equal(await self._all(lambda engine: engine.digests()))

    async def prepare(self, update: StagedUpdate) -> None:
        """Make a staged update ready on all."""
        await self._all(lambda engine: engine.prepare(update))

    async def apply(self, update: StagedUpdate) -> Digests:
        """Write a staged update on all; EngineError: it is on none."""
        return await self._write(lambda engine: engine.apply(update))

    async def load_checkpoint(self, path: Path) -> Digests:
        """Write a Hugging Face folder on all; EngineError: it is on none."""
        return await self._write(lambda engine: engine.load_checkpoint(path))

    async def _write(self, call: Callable[[Engine], Awaitable[Digests]]) -> Digests:
        outcomes = await self._outcomes(call)
        try:
            _raise_worst(outcomes)
            shifts = [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
            return shifts[0] if self._is_uneven else _equal(shifts)  # from different weights the shifts differ
        except EngineDeadError:
            self._is_lost = True
            raise
        except EngineError as error:
            await self._undo(outcomes, error)
            raise

    async def _undo(self, outcomes: Sequence[Digests | BaseException], cause: EngineError) -> None:
        """Take a write back where it succeeded; where it failed, the engine has done so itself."""
        written = [
            engine
            for engine, outcome in zip(self._engines, outcomes, strict=True)
            if not isinstance(outcome, BaseException)
        ]
        try:
            _raise_worst(await asyncio.gather(*(engine.revert() for engine in written), return_exceptions=True))
        except EngineError as error:
            self._is_lost = True
            raise EngineDeadError(f"{cause}; and the old weights could not be put back: {error}") from cause

    async def adopt(self, version: int) -> None:
        """Tokens of all from now on belong to `version`; EngineError: those of some may."""
        await self._all(lambda engine: engine.adopt(version))

    async def revert(self) -> None:
        """Put the old values and the version before back on all; EngineError: on some it may be otherwise."""
        outcomes = await self._outcomes(lambda engine: engine.revert())
        self._is_uneven |= any(isinstance(outcome, BaseException) for outcome in outcomes)
        _raise_worst(outcomes)

    async def keep(self) -> None:
        """Drop the old values on all."""
        await self._all(lambda engine: engine.keep())
        self._is_uneven = False

    async def stats(self) -> EngineStats:
        """Sums of running and waiting sequences, means of the rest."""
        found = await self._all(lambda engine: engine.stats())
        return EngineStats(
            running=sum(stats.running for stats in found),
            waiting=sum(stats.waiting for stats in found),
            generated_tokens=sum(stats.generated_tokens for stats in found),
            extra=_means([stats.extra for stats in found]),
        )

    async def close(self) -> None:
        """Stop all of them, whatever happens to one."""
        await self._all(lambda engine: engine.close())

    async def _all(self, call: Callable[[Engine], Awaitable[T]]) -> list[T]:
        """The result of every engine, once all have answered; the worst error where one failed."""
        outcomes = await self._outcomes(call)
        _raise_worst(outcomes)
        return [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]

    async def _outcomes(self, call: Callable[[Engine], Awaitable[T]]) -> list[T | BaseException]:
        return await asyncio.gather(*(call(engine) for engine in self._engines), return_exceptions=True)


def _raise_worst(outcomes: Sequence[object]) -> None:
    """Raise the error that says most about what is left: a death, then any other failure, then a missed deadline."""
    errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    for error in sorted(errors, key=_rank):
        raise error


def _rank(error: BaseException) -> int:
    return 0 if isinstance(error, EngineDeadError) else 2 if isinstance(error, TimeoutError) else 1


def _equal(found: Sequence[Digests]) -> Digests:
    first = found[0]
    for index, other in enumerate(found[1:], start=1):
        differing = sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name))
        if differing:
            raise CopiesDifferError(f"engine {index} holds another copy of {differing[0]} than engine 0")
    return first


def _means(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(values.get(name, 0.0) for values in found) / len(found) for name in found[0]}
