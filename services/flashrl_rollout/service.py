"""The service as its routes see it: starting, ready, stopping or dead, and what it is made of once it is ready.

Knows the states and who answers in which; knows nothing of HTTP or of how the parts are built.
"""

import time
from dataclasses import dataclass

from flashrl_rollout.engine import Engine
from flashrl_rollout.generation import Generator
from flashrl_rollout.history import History
from flashrl_rollout.lease import RunLease
from flashrl_rollout.metrics import Metrics
from flashrl_rollout.receiver import Receiver
from flashrl_rollout.store import WeightStore
from flashrl_rollout.versions import VersionGate
from flashrl_rollout.weights import Weights
from flashrl_wire.errors import NotReadyError
from flashrl_wire.messages import WeightsInfo


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


class Service:
    """Holds the parts; NotReadyError says why while there are none, or none to be used."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.parts: Parts | None = None
        self._began = time.monotonic()
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
            raise NotReadyError(f"starting: loading the model for {time.monotonic() - self._began:.0f} s")
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

    async def metrics_text(self) -> bytes:
        """The text of /metrics, with gauges as of now."""
        parts = self.parts
        self.metrics.set_gauges({"ready": float(parts is not None and self._refusal is None)})
        if parts is not None and parts.engine.is_alive:
            stats = await parts.engine.stats()
            values = {
                "running_sequences": stats.running,
                "waiting_sequences": stats.waiting,
                "active_requests": parts.gate.active_requests,
                "active_sequences": parts.gate.active_sequences,
                "weight_version": parts.weights.version,
                "poisoned": parts.weights.poisoned,
                "malformed_frames": parts.receiver.malformed_frames,
            }
            self.metrics.set_gauges({name: float(value) for name, value in (values | dict(stats.extra)).items()})
        return self.metrics.text()
