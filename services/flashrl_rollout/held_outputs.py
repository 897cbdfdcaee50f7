"""Tokens of sequences that nobody reads before their end, held in the engine and passed on many at a time.

Passing a token with its log-probability from the engine's process to the service costs both about as much as drawing it
costs a small model. Knows vLLM's outputs by their fields; imports no vLLM, and knows nothing of schedulers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class _Held:
    limit: int
    outputs: list[Any] = field(default_factory=list)

    def take(self) -> Any:
        """All of it as one output; nothing is left."""
        outputs, self.outputs = self.outputs, []
        return _joined(outputs)


class HeldOutputs:
    """`thin(outputs, may_hold)` for every step; `most` is how many tokens of a sequence are held at a time."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._begun = 0
        self._held: dict[str, _Held] = {}

    def __bool__(self) -> bool:
        return any(held.outputs for held in self._held.values())

    def __len__(self) -> int:
        """Sequences that are known."""
        return len(self._held)

    def thin(self, outputs: Sequence[Any], may_hold: Callable[[str], bool]) -> list[Any]:
        """What of a step's outputs is to be passed on now, with what was held of the same sequences in front of it."""
        passed = []
        for output in outputs:
            held = self._held.get(output.request_id)
            if held is None:
                if output.finish_reason is not None or not may_hold(output.request_id):
                    passed.append(output)
                    continue
                held = self._held[output.request_id] = _Held(self._first_limit())
            held.outputs.append(output)
            if output.finish_reason is not None:
                passed.append(held.take())
                del self._held[output.request_id]
            elif not _is_plain(output):
                passed.append(held.take())
            elif len(held.outputs) >= held.limit:
                passed.append(held.take())
                held.limit = self._most
        return passed

    def _first_limit(self) -> int:
        """Different from sequence to sequence: those that begin together must not all be passed on in one step."""
        self._begun += 1
        return self._most - (self._begun - 1) % self._most

    def release(self, outputs: Sequence[Any]) -> list[Any]:
        """All of a step's outputs, with everything that is held."""
        passed = []
        for output in outputs:
            held = self._held.get(output.request_id) or _Held(0)
            held.outputs.append(output)
            passed.append(held.take())
            if output.finish_reason is not None:
                self.drop(output.request_id)
        return passed + [held.take() for held in self._held.values() if held.outputs]

    def drop(self, request_id: str) -> None:
        """Forget a sequence that nobody wants any more."""
        self._held.pop(request_id, None)


def _is_plain(output: Any) -> bool:
    """Whether it carries tokens and nothing else that somebody might wait for."""
    return (
        output.finish_reason is None
        and output.prefill_stats is None
        and not output.events
        and output.pooling_output is None
        and output.new_prompt_logprobs_tensors is None
        and output.new_sampling_mask is None
        and output.routed_experts is None
    )


def _joined(outputs: Sequence[Any]) -> Any:
    """The last output with the tokens and log-probabilities of those before it in front of its own."""
    last = outputs[-1]
    if len(outputs) > 1:
        last.new_token_ids = [token for output in outputs for token in output.new_token_ids]
        last.new_logprobs = _joined_logprobs([output.new_logprobs for output in outputs])
    return last


def _joined_logprobs(found: Sequence[Any]) -> Any:
    """Rows of one sequence, one token each; a step has as many columns as its most demanding sequence wants."""
    rows = [logprobs for logprobs in found if logprobs is not None]
    if not rows:
        return None
    width = min(logprobs.logprobs.shape[1] for logprobs in rows)
    return rows[0]._replace(
        logprob_token_ids=np.concatenate([logprobs.logprob_token_ids[:, :width] for logprobs in rows]),
        logprobs=np.concatenate([logprobs.logprobs[:, :width] for logprobs in rows]),
        sampled_token_ranks=np.concatenate([logprobs.sampled_token_ranks for logprobs in rows]),
    )
