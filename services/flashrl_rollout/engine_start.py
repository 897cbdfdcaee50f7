"""One engine, or several that share a service's limits: the first, then the others at once.

Knows shares and their order; knows nothing of vLLM or of what an engine does when it starts.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import replace

from flashrl_rollout.engine import Engine
from flashrl_rollout.engine_group import EngineGroup
from flashrl_rollout.engine_settings import EngineSettings, environment

StartEngine = Callable[[EngineSettings, int], Awaitable[Engine]]
"""Starts the engine of an index with its own share of the settings."""

_GIB = 1 << 30


def share(settings: EngineSettings) -> EngineSettings:
    """What each of `settings.engines` gets: as many sequences and as much memory as make up the whole together."""
    engines = settings.engines
    return replace(
        settings,
        max_num_seqs=math.ceil(settings.max_num_seqs / engines),
        gpu_memory_utilization=settings.gpu_memory_utilization / engines,
        kv_cache_gib=settings.kv_cache_gib / engines,
    )


def with_cache_of(settings: EngineSettings, first: Engine) -> EngineSettings:
    """The same with a cache as large as an engine's that has started, so that none has to measure what is left."""
    return replace(settings, kv_cache_gib=first.info.kv_cache_bytes / _GIB or settings.kv_cache_gib)


async def start_engines(settings: EngineSettings, start: StartEngine) -> Engine:
    """The only engine, or a group; whatever stops one from starting stops those that have started.

    The first one starts alone: vLLM finds out how much memory its cache can have by watching the whole device, and
    would take what others allocate meanwhile for its own. It also compiles; the others find the results.
    """
    if settings.engines == 1:
        return await start(settings, 0)
    engines: list[Engine] = []
    try:
        with environment(settings.environment()):  # each start sets it and takes it back, while others still need it
            engines.append(await start(share(settings), 0))
            others = with_cache_of(share(settings), engines[0])
            starts = [start(others, index) for index in range(1, settings.engines)]
            outcomes = await asyncio.gather(*starts, return_exceptions=True)
        engines += [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return await EngineGroup.of(engines)
    except BaseException:
        await asyncio.gather(*(engine.close() for engine in engines), return_exceptions=True)
        raise
