"""One engine, or several that share a service's limits, started one after the other.

Knows shares and their order; knows nothing of vLLM or of what an engine does when it starts.
"""

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable
from dataclasses import replace

from flashrl_rollout.engine import Engine
from flashrl_rollout.engine_group import EngineGroup
from flashrl_rollout.engine_settings import EngineSettings

StartEngine = Callable[[EngineSettings, int], Awaitable[Engine]]
"""Starts the engine of an index with its own share of the settings."""

logger = logging.getLogger(__name__)


def share(settings: EngineSettings) -> EngineSettings:
    """What each of `settings.engines` gets: as many sequences and as much memory as make up the whole together."""
    engines = settings.engines
    return replace(
        settings,
        max_num_seqs=math.ceil(settings.max_num_seqs / engines),
        gpu_memory_utilization=settings.gpu_memory_utilization / engines,
        kv_cache_gib=settings.kv_cache_gib / engines,
    )


async def start_engines(settings: EngineSettings, start: StartEngine) -> Engine:
    """The only engine, or a group; whatever stops one from starting stops those that have started.

    One after the other: vLLM finds out how much memory is left for its cache by watching the whole card, and takes
    what another engine allocates meanwhile for its own. The first one compiles, the others find its results.
    """
    if settings.engines == 1:
        return await start(settings, 0)
    engines: list[Engine] = []
    try:
        for index in range(settings.engines):
            engines.append(await start(share(settings), index))
            logger.info("engine %d of %d has started", index + 1, settings.engines)
        return await EngineGroup.of(engines)
    except BaseException:
        await asyncio.gather(*(engine.close() for engine in engines), return_exceptions=True)
        raise
