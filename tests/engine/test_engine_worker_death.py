"""What is left when a worker is killed. Last by name, for it ends the session's engines."""

import asyncio
import os

import psutil  # type: ignore[import-untyped]
import pytest
from tests.helpers.real_engine import PROMPTS, LoopThread

from flashrl_rollout.engine import Engine, EngineDeadError
from flashrl_wire.messages import Sampling

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]


def test_a_dead_worker_ends_the_engine_and_every_call(int8_engine: Engine, loop: LoopThread) -> None:
    workers = [child for child in psutil.Process(os.getpid()).children(recursive=True) if "Worker" in child.name()]
    assert workers

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
