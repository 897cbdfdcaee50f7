"""The state of the service in numbers: what the status page shows and `/metrics` takes its gauges from.

Knows the parts of a running service; knows nothing of HTTP, pages or Prometheus.
"""

import math
import time
from collections import Counter
from typing import Literal

from pydantic import BaseModel

from flashrl_rollout import meter
from flashrl_rollout.process_memory import process_memory
from flashrl_rollout.service import Parts, Phase, Service
from flashrl_rollout.update_log import UpdateRow
from flashrl_wire.errors import NotReadyError
from flashrl_wire.layout import Storage, WeightLayout
from flashrl_wire.messages import Quantization

_BF16_BYTES = 2


class WeightsStatus(BaseModel):
    """What is sampled from; `bf16_bytes` is what it would take unquantized."""

    version: int
    digest: str
    poisoned: bool
    run_id: str | None
    parameters: int
    quantized_share: float
    storage_bytes: dict[Storage, int]
    bf16_bytes: int


class LoadStatus(BaseModel):
    """Requests and sequences now; `active` ones are admitted, whether they run or wait for a commit's end."""

    running_sequences: int
    waiting_sequences: int
    active_requests: int
    active_sequences: int
    max_sequences: int
    kv_cache_usage: float | None
    kv_cache_tokens: int
    kv_cache_dtype: str


class Throughput(BaseModel):
    """Generated tokens a second: now, and one value every `interval_s`, the oldest first."""

    tokens_per_s: float
    interval_s: float
    history: list[float]


class MemoryStatus(BaseModel):
    """Resident bytes of this process and of the engine's; used bytes of the engine's devices, whoever uses them."""

    service_bytes: int
    engine_bytes: int
    device_used_bytes: int | None
    device_total_bytes: int | None


class Status(BaseModel):
    """`GET /status`; `reason` says why nothing is sampled, `weights` and `load` are there once the model is loaded."""

    phase: Phase
    reason: str | None
    uptime_s: float
    model: str
    quantization: Quantization | Literal[""]
    weights: WeightsStatus | None
    load: LoadStatus | None
    throughput: Throughput
    memory: MemoryStatus
    updates: list[UpdateRow]


async def status(service: Service) -> Status:
    """As of now."""
    parts = service.parts
    stats = await parts.engine.stats() if parts else None
    extra = dict(stats.extra) if stats else {}
    memory = process_memory()
    return Status(
        phase=service.phase,
        reason=_reason(service),
        uptime_s=time.monotonic() - service.began,
        model=parts.engine.info.model if parts else service.model,
        quantization=parts.engine.info.quantization if parts else service.quantization,
        weights=_weights(parts) if parts else None,
        load=_load(parts, stats.running, stats.waiting, extra.get("kv_cache_usage")) if parts and stats else None,
        throughput=_throughput(service.meter),
        memory=MemoryStatus(
            service_bytes=memory.service_bytes,
            engine_bytes=memory.engine_bytes,
            device_used_bytes=_whole(extra.get("device_memory_used_bytes")),
            device_total_bytes=_whole(extra.get("device_memory_total_bytes")),
        ),
        updates=parts.history.log.rows() if parts else [],
    )


def _reason(service: Service) -> str | None:
    if service.phase == "paused":
        return "paused: sampling stands still until POST /resume"
    try:
        service.require_sampling()
    except NotReadyError as error:
        return error.message
    return None


def _weights(parts: Parts) -> WeightsStatus:
    weights, layout = parts.weights, parts.weights.layout
    elements = sum(math.prod(spec.shape) for spec in layout.tensors)
    return WeightsStatus(
        version=weights.version,
        digest=weights.digest,
        poisoned=weights.poisoned,
        run_id=parts.lease.run_id,
        parameters=elements,
        quantized_share=layout.quantized_fraction,
        storage_bytes=_storage_bytes(layout),
        bf16_bytes=_BF16_BYTES * elements,
    )


def _storage_bytes(layout: WeightLayout) -> dict[Storage, int]:
    """Bytes of the tensors stored in each way, scales included."""
    found: Counter[Storage] = Counter()
    for spec in layout.tensors:
        found[spec.storage] += sum(part.num_bytes for part in spec.parts())
    return dict(found)


def _load(parts: Parts, running: int, waiting: int, kv_cache_usage: float | None) -> LoadStatus:
    return LoadStatus(
        running_sequences=running,
        waiting_sequences=waiting,
        active_requests=parts.gate.active_requests,
        active_sequences=parts.gate.active_sequences,
        max_sequences=parts.gate.max_sequences,
        kv_cache_usage=kv_cache_usage,
        kv_cache_tokens=parts.engine.info.kv_cache_tokens,
        kv_cache_dtype=parts.engine.info.kv_cache_dtype,
    )


def _throughput(readings: meter.Meter) -> Throughput:
    return Throughput(
        tokens_per_s=round(readings.tokens_per_s, 1),
        interval_s=meter.INTERVAL_S,
        history=[round(value, 1) for value in readings.history()],
    )


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
