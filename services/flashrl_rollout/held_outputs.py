"""Tokens of sequences that nobody reads before their end, held in the engine and passed on many at a time.

Passing a token with its log-probability from the engine's process to the service costs both about as much as drawing it
costs a small model. Knows vLLM's outputs by their fields; imports no vLLM, and knows nothing of schedulers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray


@dataclass(slots=True)
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
        """What of a step's outputs is to be passed on now, with what was held of the same sequences in front of it.

        Between two steps of the engine, for each of its sequences: every comparison here is paid hundreds of times.
        """
        passed = []
        known = self._held
        for output in outputs:
            held = known.get(output.request_id)
            if held is None:
                if output.finish_reason is not None or not may_hold(output.request_id):
                    passed.append(output)
                    continue
                held = known[output.request_id] = _Held(self._first_limit())
            held.outputs.append(output)
            if output.finish_reason is not None:
                passed.append(held.take())
                del known[output.request_id]
            elif output.events is not None or output.prefill_stats is not None:
                passed.append(held.take())  # somebody may wait for them
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


def _joined(outputs: Sequence[Any]) -> Any:
    """The last output with the tokens and log-probabilities of those before it in front of its own."""
    last = outputs[-1]
    if len(outputs) > 1:
        last.new_token_ids = [token for output in outputs for token in output.new_token_ids]
        rows = [output.new_logprobs for output in outputs if output.new_logprobs is not None]
        last.new_logprobs = _joined_rows(rows) if rows else None
    return last


def _joined_rows(rows: Sequence[Any]) -> Any:
    """Rows of one sequence; a step has as many columns as its most demanding sequence asked for."""
    if len({row.logprobs.nbytes for row in rows}) > 1:
        rows = _narrowed(rows)
    return rows[0]._replace(
        logprob_token_ids=_stacked([row.logprob_token_ids for row in rows]),
        logprobs=_stacked([row.logprobs for row in rows]),
        sampled_token_ranks=_stacked([row.sampled_token_ranks for row in rows]),
    )


def _narrowed(rows: Sequence[Any]) -> list[Any]:
    width = min(row.logprobs.shape[1] for row in rows)
    return [
        row._replace(
            logprob_token_ids=np.ascontiguousarray(row.logprob_token_ids[:, :width]),
            logprobs=np.ascontiguousarray(row.logprobs[:, :width]),
        )
        for row in rows
    ]


def _stacked(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """What `numpy.concatenate` gives, which takes five times as long for arrays of a row each."""
    rows = b"".join(cast("Sequence[bytes]", arrays))
    return np.frombuffer(rows, arrays[0].dtype).reshape(-1, *arrays[0].shape[1:])
