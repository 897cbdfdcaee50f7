"""What becomes of an engine whose worker hangs or is killed. Last by name, for it ends the session's engines."""

import asyncio
import os
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
from tests.helpers.real_engine import PROMPTS, LoopThread

from flashrl_rollout.engine import Engine, EngineCompletion, EngineDeadError
from flashrl_wire.messages import Sampling

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]


def _workers() -> list[psutil.Process]:
    """The workers of all engines of this session."""
    workers = [child for child in psutil.Process(os.getpid()).children(recursive=True) if "Worker" in child.name()]
    assert workers
    return workers


def test_a_worker_that_hangs_is_found_out(int8_engine: Any, loop: LoopThread) -> None:
    """Stopped, it neither dies nor answers; going on, it has lost nothing."""
    watch, workers = int8_engine._stall_watch, _workers()

    async def hang() -> list[EngineCompletion]:
        call = asyncio.create_task(int8_engine.generate("r", PROMPTS[0], 8, Sampling(max_tokens=250, seed=1), 0))
        while (await int8_engine.stats()).running != 8:
            assert not call.done()
            await asyncio.sleep(0.001)
        for worker in workers:
            worker.suspend()
        while int8_engine.is_alive:
            assert not call.done()
            await asyncio.sleep(0.01)
        with pytest.raises(EngineDeadError, match="the engine has died"):
            await int8_engine.digests()
        for worker in workers:
            worker.resume()
        return list(await call)

    limit_s, watch._limit_s = watch._limit_s, 0.5
    try:
        assert len(loop.run(hang())) == 8
    finally:
        watch._limit_s = limit_s
        for worker in workers:
            worker.resume()
    assert int8_engine.is_alive


def test_a_dead_worker_ends_the_engine_and_every_call(int8_engine: Engine, loop: LoopThread) -> None:
    workers = _workers()

    async def die() -> None:
        calls = [asyncio.create_task(int8_engine.generate("r", PROMPTS[0], 8, Sampling(max_tokens=250), 0))]
        await asyncio.sleep(0)
        for worker in workers:
            worker.kill()
        calls.append(asyncio.create_task(int8_engine.digests()))  # type: ignore[arg-type]
        for call in calls:
            with pytest.raises(EngineDeadError, match="the engine has died"):
                await call
        assert not int8_engine.is_alive
        with pytest.raises(EngineDeadError):
            await int8_engine.resume()

    loop.run(die())
