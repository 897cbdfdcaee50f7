"""Requests that make an engine compile and tune what later ones would have to wait for.

Knows which kinds of request use kernels of their own; knows nothing of vLLM or of kernels.
"""

import asyncio
from collections.abc import Iterator

from flashrl_rollout.engine import Engine
from flashrl_wire.messages import Sampling

_PROMPT_TOKENS = 64
_BATCH_COPIES = 5  # 35 sequences: neither one nor a multiple of 16, for both of which kernels are specialised
_TEMPERATURES = (1.0, 0.7)  # at 1 logits stay in the model's dtype, else they are copied to fp32
# the kernel that gathers 1 + top_logprobs is compiled for each power of two above it, and for multiples of 16
_TOP_LOGPROBS = (0, 1, 3, 7, 8, 15, 20)
_KINDS = (
    Sampling(temperature=0, max_tokens=2),
    Sampling(temperature=0, max_tokens=2, stop=["\n\n"]),
    Sampling(seed=1, max_tokens=2),
    Sampling(temperature=0.7, seed=1, top_p=0.9, max_tokens=2),
    Sampling(top_p=0.9, max_tokens=2),
    Sampling(top_k=4, max_tokens=2),
    Sampling(top_p=0.9, top_k=4, seed=1, max_tokens=2),
)


async def warm_up(engine: Engine) -> None:
    """Sample with every kind of request, one after the other and then all at a time."""
    prompt = [0] * max(1, min(_PROMPT_TOKENS, engine.info.max_model_len - 1))
    for number, (sampling, top_logprobs) in enumerate(_single_requests()):
        await engine.generate(f"warm-up-{number}", prompt, 1, sampling, top_logprobs)
    batch = [
        engine.generate(f"warm-up-batch-{number}", prompt[:1], 1, sampling, 1)
        for number, sampling in enumerate(_KINDS * _BATCH_COPIES)
    ]
    await asyncio.gather(*batch)


def _single_requests() -> Iterator[tuple[Sampling, int]]:
    for temperature in _TEMPERATURES:
        for top_logprobs in _TOP_LOGPROBS:
            yield Sampling(temperature=temperature, max_tokens=1), top_logprobs
    for sampling in _KINDS:
        yield sampling, 0
