"""The service as its routes see it: starting, ready, stopping or dead, and what it is made of once it is ready.

Knows the states and who answers in which; knows nothing of HTTP or of how the parts are built.
"""

import asyncio
import time
from dataclasses import dataclass
from typing import Literal

from flashrl_rollout.engine import Engine
from flashrl_rollout.generation import Generator
from flashrl_rollout.history import History
from flashrl_rollout.lease import RunLease
from flashrl_rollout.meter import INTERVAL_S, Meter
from flashrl_rollout.metrics import Metrics
from flashrl_rollout.receiver import Receiver
from flashrl_rollout.standard_routes import StandardRoutes
from flashrl_rollout.store import WeightStore
from flashrl_rollout.versions import VersionGate
from flashrl_rollout.weights import Weights
from flashrl_wire.errors import NotReadyError
from flashrl_wire.messages import Quantization, WeightsInfo

Phase = Literal["starting", "ready", "updating", "paused", "poisoned", "stopping", "dead"]


@dataclass(frozen=True)
class Parts:
    """What exists once the engine has started."""

    engine: Engine
    gate: VersionGate
    weights: Weights
    store: WeightStore
    generator: Generator
    lease: RunLease
    history: History
    receiver: Receiver
    standard: StandardRoutes | None


class Service:
    """Holds the parts; NotReadyError says why while there are none, or none to be used.

    `model` and `quantization` are what it was asked to serve, for people who look while it loads.
    """

    def __init__(self, model: str = "", quantization: Quantization | Literal[""] = "") -> None:
        self.model, self.quantization = model, quantization
        self.metrics = Metrics()
        self.meter = Meter()
        self.parts: Parts | None = None
        self.began = time.monotonic()
        self._refusal: NotReadyError | None = None

    def stop(self, reason: str) -> None:
        """Refuse requests from now on; running ones go on."""
        self._refusal = NotReadyError(reason)

    def fence(self, reason: str) -> None:
        """Refuse requests from now on and end the running ones."""
        self.stop(reason)
        if self.parts is not None:
            self.parts.gate.fence(NotReadyError(reason))

    def require(self) -> Parts:
        """The parts; NotReadyError while starting, when stopping and once the engine is dead."""
        if self._refusal is not None:
            raise NotReadyError(self._refusal.message)
        if self.parts is None:
            raise NotReadyError(f"starting: loading the model for {time.monotonic() - self.began:.0f} s")
        if not self.parts.engine.is_alive:
            raise NotReadyError("the engine has died")
        return self.parts

    def require_sampling(self) -> Parts:
        """The parts, unless the weights are poisoned."""
        parts = self.require()
        parts.gate.check()
        return parts

    def weights_info(self) -> WeightsInfo:
        """The state of the weights, also while they are poisoned."""
        parts = self.require()
        info, weights = parts.engine.info, parts.weights
        return WeightsInfo(
            version=weights.version,
            digest=weights.digest,
            quantization=info.quantization,
            storage_bytes=weights.layout.num_bytes,
            quantized_fraction=weights.layout.quantized_fraction,
            last_update=parts.history.last_update,
            model=info.model,
            layout_hash=weights.layout.hash,
            tokenizer_hash=info.tokenizer_hash,
            vocab_size=info.vocab_size,
            max_model_len=info.max_model_len,
            weights_port=parts.receiver.port,
            run_id=parts.lease.run_id,
            poisoned=weights.poisoned,
        )

    @property
    def phase(self) -> Phase:
        """What it is doing, in a word."""
        parts = self.parts
        if parts is not None and not parts.engine.is_alive:
            return "dead"
        if self._refusal is not None:
            return "stopping"
        if parts is None:
            return "starting"
        if parts.weights.poisoned and not parts.gate.is_closed_by("commit"):
            return "poisoned"
        if parts.gate.is_closed_by("pause"):
            return "paused"
        return "updating" if parts.gate.is_closed_by("commit") else "ready"

    async def keep_time(self) -> None:
        """Read the engine's count of tokens at a steady pace, until cancelled."""
        while True:
            if self.parts is not None:
                stats = await self.parts.engine.stats()
                self.meter.sample(time.monotonic(), stats.generated_tokens)
            await asyncio.sleep(INTERVAL_S)
