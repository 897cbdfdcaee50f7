"""A program: starts an engine, prints READY, makes every kind of request that a client can, and prints their number.

`python warm_requests.py FOLDER QUANTIZATION`. What vLLM's monitor of compilation reports after READY was compiled while
a request waited.
"""

import asyncio
import sys
from itertools import product
from typing import Any

import httpx
from fastapi import FastAPI

from flashrl_rollout.engine_settings import EngineSettings
from flashrl_rollout.vllm_engine import VllmEngine
from flashrl_wire.messages import Quantization, Sampling

READY = "READY: nothing may be compiled from here on"


async def main(folder: str, quantization: Quantization) -> int:
    """Start, sample, stop."""
    settings = EngineSettings(folder, quantization, max_model_len=256, gpu_memory_utilization=0.3)
    engine = await VllmEngine.start(settings)
    app = await engine.standard_app(FastAPI)
    print(READY, flush=True)
    count = await _generate(engine) + await _complete(app, folder)
    await engine.close()
    return count


async def _generate(engine: VllmEngine) -> int:
    count = 0
    kinds = product((0.0, 0.6, 1.0), (1.0, 0.8), (-1, 5), (None, 3), range(21))
    for temperature, top_p, top_k, seed, top_logprobs in kinds:
        sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, max_tokens=3)
        n = 1 if temperature == 0 else 1 + count % 3
        await engine.generate(f"single-{count}", [count % 50] * (1 + count % 70), n, sampling, top_logprobs)
        count += 1
    for size in (2, 3, 8, 16, 31, 64, 100):
        sampling = Sampling(temperature=0.9, seed=size, max_tokens=20, stop=["\n"])
        await asyncio.gather(*(engine.generate(f"{size}-{i}", [i] * 9, 1, sampling, i % 2) for i in range(size)))
        count += size
    return count


async def _complete(app: Any, folder: str) -> int:
    bodies = [
        {"prompt": [1, 2, 3], "temperature": temperature, "top_p": top_p, "max_tokens": 4, **more}
        for temperature in (0, 0.6, 1)
        for top_p in (0.8, 1)
        for more in ({}, {"logprobs": 2}, {"presence_penalty": 1}, {"logit_bias": {"5": 1}}, {"min_p": 0.1})
    ]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://engine", timeout=60) as http:
        for body in bodies:
            (await http.post("/v1/completions", json={"model": folder, **body})).raise_for_status()
    return len(bodies)


if __name__ == "__main__":
    print(asyncio.run(main(sys.argv[1], sys.argv[2])))  # type: ignore[arg-type]
