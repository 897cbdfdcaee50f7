"""The text of `/metrics`: counters as they stand, and gauges of the state of the service as of now.

Knows which number goes under which name; knows nothing of how it came about.
"""

from flashrl_rollout.service import Service
from flashrl_rollout.status import Status, status

_SAMPLING = ("ready", "paused", "updating")


async def metrics_text(service: Service) -> bytes:
    """In Prometheus' text format."""
    _set(service, await status(service))
    if service.parts is not None:
        extra = (await service.parts.engine.stats()).extra
        room = service.parts.engine.info.kv_cache_tokens
        frames = service.parts.receiver.malformed_frames
        service.metrics.set_gauges({"malformed_frames": frames, "kv_cache_tokens": room, **extra})
    return service.metrics.text()


def _set(service: Service, found: Status) -> None:
    metrics, memory = service.metrics, found.memory
    about = {"model": found.model, "quantization": found.quantization}
    metrics.set_gauges({"info": 1.0}, about)
    metrics.set_gauges(
        {
            "ready": float(found.phase in _SAMPLING),
            "paused": float(found.phase == "paused"),
            "uptime_seconds": found.uptime_s,
            "tokens_per_second": found.throughput.tokens_per_s,
        }
    )
    for process, num_bytes in (("service", memory.service_bytes), ("engine", memory.engine_bytes)):
        metrics.set_gauges({"resident_memory_bytes": num_bytes}, {"process": process})
    if found.load is not None:
        metrics.set_gauges(found.load.model_dump(exclude={"kv_cache_usage", "kv_cache_dtype"}))
    if found.weights is not None:
        weights = found.weights
        metrics.set_gauges({"weight_version": weights.version, "poisoned": float(weights.poisoned)})
        metrics.set_gauges({"quantized_share": weights.quantized_share})
        for storage, num_bytes in weights.storage_bytes.items():
            metrics.set_gauges({"storage_bytes": num_bytes}, {"storage": storage})
