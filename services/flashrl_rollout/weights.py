"""The weights an engine samples with, and the only way to replace them: at rest, verified, or put back.

Knows versions, digests and the pause; knows nothing of transfers, files or HTTP.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from flashrl_rollout.engine import CopiesDifferError, Engine, EngineDeadError, EngineError
from flashrl_rollout.laps import Laps
from flashrl_rollout.versions import VersionGate
from flashrl_wire.digest import Combiner, PartDigest
from flashrl_wire.errors import DigestMismatchError, DrainTimeoutError, EngineFailedError, NotReadyError, WireError
from flashrl_wire.layout import PartSpec, WeightLayout
from flashrl_wire.messages import PauseMode

T = TypeVar("T")
Write = Callable[[], Awaitable[dict[str, PartDigest]]]
Prepare = Callable[[], Awaitable[None]]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WriteSettings:
    """How a commit stops sampling, and how long its steps may take."""

    mode: PauseMode = "keep"
    drain_deadline_s: float = 60.0
    write_deadline_s: float = 300.0


class Weights:
    """The stored state of one engine. Every change and every audit holds one lock, so that they never meet."""

    def __init__(
        self,
        engine: Engine,
        gate: VersionGate,
        layout: WeightLayout,
        digests: Mapping[str, PartDigest],
        settings: WriteSettings,
    ) -> None:
        self.layout = layout
        self.parts: dict[str, PartSpec] = {part.name: part for part in layout.parts()}
        self.poisoned = False
        self._engine, self._gate, self._settings = engine, gate, settings
        self._digests = dict(digests)
        self._combiner = Combiner(layout.parts())
        self._digest = self._combiner.combine(digests)
        self._lock = asyncio.Lock()
        self._is_paused = False
        self._holds_old = False  # old values that the next write would put back

    @classmethod
    async def of(cls, engine: Engine, gate: VersionGate, settings: WriteSettings) -> "Weights":
        """The weights that `engine` was started with: version 0."""
        return cls(engine, gate, await engine.layout(), await engine.digests(), settings)

    @property
    def version(self) -> int:
        """The version that new requests start under."""
        return self._gate.version

    @property
    def num_elements(self) -> int:
        """Stored elements, scales included."""
        return sum(part.numel for part in self.parts.values())

    @property
    def digest(self) -> str:
        """The combined digest of the current version."""
        return self._digest

    async def replace(
        self, write: Write, version: int, expected_digest: str | None, prepare: Prepare | None = None
    ) -> float:
        """Write while sampling stands still, and keep the result only with the expected digest; the pause in ms.

        The pause is the time for which no request is admitted; sampling ends with the step that is under way.
        `prepare` comes before it, and nothing but its length depends on that; old values are dropped after it.

        DrainTimeoutError, DigestMismatchError and EngineFailedError: the old weights are in place. NotReadyError:
        they could not be put back, and the service is poisoned until a snapshot has been committed.
        """
        async with self._lock:
            try:
                await self._drop_old()
                if prepare is not None:
                    await self._prepare(prepare)
                pause_ms = await self._replace_at_rest(write, version, expected_digest)
                await self._drop_old()
            except (EngineError, TimeoutError) as error:
                raise poisoned_error() if self.poisoned else wire_error(error) from error
            return pause_ms

    async def _drop_old(self) -> None:
        if self._holds_old:
            await self._limited(self._engine.keep())
            self._holds_old = False

    async def _replace_at_rest(self, write: Write, version: int, expected_digest: str | None) -> float:
        laps = Laps()
        self._gate.close("commit")
        was_poisoned = self.poisoned
        try:
            async with self._at_rest(self._settings.mode):
                laps.end("stop")
                await self._replace(write, version, expected_digest, laps)
            laps.end("go_on")
            logger.debug("pause in ms: %s", laps)
            return laps.total_ms()
        finally:
            self._fence(was_poisoned)
            self._gate.open("commit")

    async def _prepare(self, prepare: Prepare) -> None:
        try:
            await self._limited(prepare())
        except (EngineError, TimeoutError) as error:
            logger.warning("the update could not be made ready ahead of its commit: %s", error)

    @asynccontextmanager
    async def _at_rest(self, mode: PauseMode) -> AsyncIterator[None]:
        """Sampling stands still inside, and afterwards too if it did before or the weights are poisoned."""
        if not self._is_paused:
            await self._pause_engine(mode)
        try:
            yield
        finally:
            if not self.poisoned and not self._gate.is_closed_by("pause"):
                await self._engine.resume()
                self._is_paused = False

    async def _pause_engine(self, mode: PauseMode) -> None:
        deadline_s = self._settings.drain_deadline_s
        try:
            await self._engine.pause(mode, deadline_s)
        except TimeoutError as error:
            await self._engine.resume()
            raise DrainTimeoutError(f"running sequences were not finished after {deadline_s:g} s") from error
        self._is_paused = True

    async def _replace(self, write: Write, version: int, expected_digest: str | None, laps: Laps) -> None:
        was_poisoned, is_doubtful = self.poisoned, True  # until the write is known to be whole or undone
        try:
            try:
                shifts = await self._written(write, version)
                laps.end("write")
                digests = await self._engine.digests() if was_poisoned else self._shifted(shifts)
                found = self._combiner.combine(digests)
                if expected_digest is not None and found != expected_digest:
                    raise DigestMismatchError(f"written weights have digest {found}, declared was {expected_digest}")
            except EngineDeadError:
                raise  # what is left of it must not sample: nobody knows from which weights
            except (EngineError, DigestMismatchError):
                await self._limited(self._engine.revert())
                is_doubtful = was_poisoned
                raise
            self._digests, self._digest, self._gate.version = digests, found, version
            self._holds_old, is_doubtful = True, False
        finally:  # not before: who asks meanwhile is told of the last version, not of a doubt
            self.poisoned = is_doubtful

    async def _written(self, write: Write, version: int) -> dict[str, PartDigest]:
        """Write, and have the engine adopt the version at the same time, since sampling waits for both."""
        calls = self._limited(write()), self._limited(self._engine.adopt(version))
        written, adopted = await asyncio.gather(*calls, return_exceptions=True)
        errors = [outcome for outcome in (written, adopted) if isinstance(outcome, BaseException)]
        if errors:
            raise min(errors, key=_can_be_undone)
        assert not isinstance(written, BaseException)
        return written

    def _shifted(self, shifts: Mapping[str, PartDigest]) -> dict[str, PartDigest]:
        return self._digests | {name: self._digests[name] + shift for name, shift in shifts.items()}

    async def _limited(self, call: Awaitable[T]) -> T:
        async with asyncio.timeout(self._settings.write_deadline_s):
            return await call

    def _fence(self, was_poisoned: bool) -> None:
        if self.poisoned:
            logger.error("the weights are poisoned: only a snapshot helps")
            self._gate.fence(poisoned_error())
        elif was_poisoned:
            self._gate.unfence()

    async def pause(self, mode: PauseMode) -> None:
        """Stop sampling until `resume`; DrainTimeoutError: it goes on."""
        async with self._lock:
            self._gate.close("pause")
            try:
                if not self._is_paused:
                    await self._pause_engine(mode)
            except (EngineError, DrainTimeoutError):
                self._gate.open("pause")
                raise

    async def resume(self) -> None:
        """Go on sampling, unless the weights are poisoned."""
        async with self._lock:
            if self._is_paused and not self.poisoned:
                await self._engine.resume()
                self._is_paused = False
            self._gate.open("pause")

    async def audit(self) -> bool:
        """Whether the digest of everything the engine computes with is what it should be; if not, it is poisoned."""
        async with self._lock:
            fault = await self._found_fault()
            if fault and not self.poisoned:
                logger.error("audit: %s", fault)
                self.poisoned = True
                self._fence(was_poisoned=False)
            return not fault

    async def _found_fault(self) -> str:
        try:
            found = await self._engine.digests()
        except CopiesDifferError as error:
            return str(error)
        differing = sorted(name for name in self.parts if found.get(name) != self._digests[name])
        return f"{len(differing)} parts differ from what was committed, first {differing[0]}" if differing else ""


def _can_be_undone(error: BaseException) -> bool:
    return isinstance(error, EngineError) and not isinstance(error, EngineDeadError)


def poisoned_error() -> NotReadyError:
    """What everybody is told while nobody knows what the engine computes with."""
    return NotReadyError("poisoned: the weights are not those of any version; only a snapshot helps", poisoned=True)


def wire_error(error: EngineError | TimeoutError) -> WireError:
    """What a client is told about a failure of the engine."""
    if isinstance(error, EngineDeadError):
        return NotReadyError(f"the engine is gone: {error}")
    return EngineFailedError(str(error) or "the engine did not answer in time")
