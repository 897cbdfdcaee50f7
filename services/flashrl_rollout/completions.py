"""vLLM's sampling parameters and outputs <-> the engine protocol's plain values.

Knows both vocabularies; knows nothing of engines or weights.
"""

import math

from vllm import RequestOutput, SamplingParams
from vllm.logprobs import FlatLogprobs
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind

from flashrl_rollout.engine import EngineCompletion, EngineError
from flashrl_rollout.tokenization import Tokenization
from flashrl_wire.messages import Sampling

_FINISHED = ("stop", "length")


def sampling_params(sampling: Sampling, n: int, top_logprobs: int) -> SamplingParams:
    """vLLM's parameters; the text is put together at the end unless stop strings must be looked for on the way."""
    return SamplingParams(
        n=n,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=sampling.max_tokens,
        seed=sampling.seed,
        stop=sampling.stop,
        logprobs=top_logprobs,
        flat_logprobs=True,
        detokenize=bool(sampling.stop),
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def completions(output: RequestOutput, params: SamplingParams, tokenization: Tokenization) -> list[EngineCompletion]:
    """The samples of a finished request in order; EngineError where vLLM gave one up.

    The end token, and the tokens of a stop string, belong to `token_ids`; the text ends before them.
    """
    ordered = sorted(output.outputs, key=lambda completion: completion.index)
    return [_completion(completion, params, tokenization) for completion in ordered]


def _completion(output: CompletionOutput, params: SamplingParams, tokenization: Tokenization) -> EngineCompletion:
    if output.finish_reason not in _FINISHED:
        raise EngineError(f"vLLM ended a sequence with {output.finish_reason!r}")
    token_ids = list(output.token_ids)
    flat = output.logprobs
    if not isinstance(flat, FlatLogprobs) or output.weight_versions is None or len(flat) != len(token_ids):
        raise EngineError("vLLM gave no log-probability or weight version for a token")
    return EngineCompletion(
        text=output.text if params.detokenize else tokenization.decode(token_ids),
        token_ids=token_ids,
        logprobs=[flat.logprobs[start] for start in flat.start_indices],
        finish_reason=output.finish_reason,
        weight_versions=[(int(span.version), span.start, span.end) for span in output.weight_versions],
        top_logprobs=_top(flat) if params.logprobs else None,
    )


def _top(flat: FlatLogprobs) -> list[dict[int, float]]:
    """The likeliest tokens of each position; the first entry of a position is the token that was drawn."""
    return [
        {
            flat.token_ids[at]: flat.logprobs[at]
            for at in range(start + 1, end)
            if math.isfinite(flat.logprobs[at])  # top_p and top_k give the others no probability at all
        }
        for start, end in zip(flat.start_indices, flat.end_indices, strict=True)
    ]
