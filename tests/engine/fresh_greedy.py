"""A program: greedy output of engines freshly started from a checkpoint, one after the other in this process.

`python fresh_greedy.py FOLDER PROMPTS MAX_TOKENS CONFIG METHOD...` prints {method: [[token ids, log-probs], ...]} as
JSON; CONFIG has the additional configuration of vLLM by method.
Shares with the engine under test vLLM and the quantization method, but no way of updating.
"""

import gc
import json
import os
import sys
from typing import Any

METHODS = {"int8": "flashrl_int8", "fp8": "flashrl_fp8", "none": "flashrl_bf16"}


def main(
    folder: str, prompts: list[list[int]], max_tokens: int, config: dict[str, dict[str, Any]], methods: list[str]
) -> None:
    """Start, sample, print."""
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR", OMP_NUM_THREADS="1")
    from vllm import LLM, SamplingParams

    params = SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=0, detokenize=False)
    found: dict[str, list[Any]] = {}
    for method in methods:
        llm = LLM(
            folder,
            quantization=METHODS[method],
            dtype="bfloat16",
            max_model_len=320,
            enforce_eager=True,
            kv_cache_memory_bytes=64 << 20,
            logprobs_mode="processed_logprobs",
            additional_config=config.get(method, {}),
        )
        outputs = [llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)[0] for prompt in prompts]
        found[method] = [_plain(output.outputs[0]) for output in outputs]
        llm.llm_engine.engine_core.shutdown()
        del llm  # its clean-up must not come after the next one's start
        gc.collect()
    print(json.dumps(found))


def _plain(output: Any) -> tuple[list[int], list[float]]:
    token_ids = list(output.token_ids)
    return token_ids, [at[token].logprob for at, token in zip(output.logprobs, token_ids, strict=True)]


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4]), sys.argv[5:])
