"""The bare engine's process: `python -m flashrl_rollout.bench.engine JSON`, then a workload a line.

Knows vLLM's AsyncLLM with its own defaults, and nothing of the service: no HTTP, no worker extension, no settings.
"""

import asyncio
import json
import os
import sys
import time
from importlib.util import find_spec
from typing import Any, TextIO

from vllm import AsyncEngineArgs, SamplingParams
from vllm.inputs.engine import tokens_input
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.usage.usage_lib import UsageContext
from vllm.utils.gc_utils import freeze_gc_heap
from vllm.v1.engine.async_llm import AsyncLLM

_METHODS = {"none": None, "int8": "flashrl_int8", "fp8": "flashrl_fp8"}


def engine_arguments(asked: dict[str, Any]) -> AsyncEngineArgs:
    """vLLM's defaults but for what both sides of the comparison share."""
    is_cpu = current_platform.is_cpu()
    if asked["device"] not in ("auto", "cpu" if is_cpu else "cuda"):
        raise ValueError(f"device: {asked['device']} asked for, but vLLM runs on {current_platform.device_type}")
    kv_cache_gib = asked["kv_cache_gib"]
    return AsyncEngineArgs(
        model=asked["folder"],
        quantization=_METHODS[asked["quantization"]],
        dtype="bfloat16",
        max_model_len=asked["max_model_len"],
        max_num_seqs=asked["max_num_seqs"],
        gpu_memory_utilization=asked["gpu_memory_utilization"],
        kv_cache_memory_bytes=None if kv_cache_gib is None else int(kv_cache_gib * (1 << 30)),
        enforce_eager=asked["enforce_eager"],
        # vLLM 0.32 on the CPU dies of a prefill cut in two when the request has a seed
        enable_chunked_prefill=False if is_cpu and asked["seeded"] else None,
    )


async def answer(llm: AsyncLLM, workload: dict[str, Any], turn: int) -> dict[str, Any]:
    """Draw a workload; seconds from the first call to the last token, and the lengths of what was drawn."""
    samples, seed = workload["samples"], workload["seed"]
    started = time.perf_counter()
    lengths = await asyncio.gather(
        *(
            _drawn(llm, f"{turn}-{index}", prompt, samples, tokens, None if seed is None else seed + index * samples)
            for index, (prompt, tokens) in enumerate(zip(workload["prompts"], workload["max_tokens"], strict=True))
        )
    )
    return {"seconds": time.perf_counter() - started, "lengths": lengths}


async def _drawn(
    llm: AsyncLLM, request_id: str, prompt: list[int], samples: int, tokens: int, seed: int | None
) -> list[int]:
    """The cheapest way to get what the service gives: ids and their log-probs, at the end, without text."""
    params = SamplingParams(
        n=samples,
        temperature=1.0,
        max_tokens=tokens,
        seed=seed,
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    async for output in llm.generate(tokens_input(prompt), params, request_id):
        if output.finished:
            assert all(len(sample.logprobs) == len(sample.token_ids) for sample in output.outputs)
            return [len(sample.token_ids) for sample in output.outputs]
    raise RuntimeError("vLLM ended a request without an answer")


async def serve(asked: dict[str, Any], replies: TextIO) -> None:
    """Start the engine, say so, and answer until standard input ends."""
    # the defaults of vLLM's own server: on a large GPU it works on longer batches of prompts than a bare AsyncLLM
    llm = AsyncLLM.from_engine_args(engine_arguments(asked), usage_context=UsageContext.OPENAI_API_SERVER)
    freeze_gc_heap()  # as vLLM's own server does
    print(json.dumps({"ready": True}), file=replies, flush=True)
    turn = 0
    while line := await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(await answer(llm, json.loads(line), turn)), file=replies, flush=True)
        turn += 1
    llm.shutdown()


def main() -> None:
    """Replies go where standard output was; what libraries print there goes to the log."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # as vLLM's own command line does
    if find_spec("flashinfer") is None:
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    asyncio.run(serve(json.loads(sys.argv[1]), replies))


if __name__ == "__main__":
    main()
