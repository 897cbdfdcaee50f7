"""Held tokens: what goes out, when, and that nothing is lost, doubled or out of order on the way."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashrl_rollout.held_outputs import HeldOutputs


class Logprobs(NamedTuple):
    """vLLM's LogprobsLists."""

    logprob_token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    sampled_token_ranks: NDArray[np.int32]
    cu_num_generated_tokens: list[int] | None = None


@dataclass
class Output:
    """The fields of vLLM's EngineCoreOutput that are looked at."""

    request_id: str
    new_token_ids: list[int]
    new_logprobs: Logprobs | None = None
    finish_reason: int | None = None
    prefill_stats: object = None
    events: list[object] | None = None
    stop_reason: str | None = field(default=None)


def output(request_id: str, token: int, width: int = 1, **facts: Any) -> Output:
    """A token whose log-probability is minus a hundredth of it, with `width - 1` likelier ones."""
    ids = np.array([[token, *range(900, 899 + width)]], dtype=np.int32)
    logprobs = np.array([[-token / 100, *[-0.5] * (width - 1)]], dtype=np.float32)
    return Output(request_id, [token], Logprobs(ids, logprobs, np.array([token + 1], dtype=np.int32)), **facts)


def anything(request_id: str) -> bool:
    return True


def nothing(request_id: str) -> bool:
    return False


def tokens(outputs: Iterable[Output], request_id: str) -> list[int]:
    return [token for found in outputs if found.request_id == request_id for token in found.new_token_ids]


def test_first_token_goes_out_at_once_and_the_rest_with_the_last() -> None:
    held = HeldOutputs(100)
    assert len(held.thin([output("a", 1, prefill_stats=object())], anything)) == 1
    assert [held.thin([output("a", token)], anything) for token in (2, 3, 4)] == [[], [], []]
    (last,) = held.thin([output("a", 5, finish_reason=1, stop_reason="x")], anything)
    assert (last.new_token_ids, last.finish_reason, last.stop_reason) == ([2, 3, 4, 5], 1, "x")
    assert last.new_logprobs.logprob_token_ids.tolist() == [[2], [3], [4], [5]]
    assert last.new_logprobs.sampled_token_ranks.tolist() == [3, 4, 5, 6]
    np.testing.assert_allclose(last.new_logprobs.logprobs[:, 0], [-0.02, -0.03, -0.04, -0.05], rtol=1e-6)
    assert len(held) == 0


def test_no_more_than_the_limit_is_held_and_sequences_that_begin_together_go_out_apart() -> None:
    held = HeldOutputs(4)
    names = ["a", "b", "c", "d"]
    steps = [held.thin([output(name, step) for name in names], anything) for step in range(32)]
    # by hand: the first time 4, 3, 2 and 1 tokens make the four go out, and 4 from then on
    assert [[found.request_id for found in step] for step in steps[:8]] == [[name] for name in "dcbadcba"]
    assert [len(step[0].new_token_ids) for step in steps[:8]] == [1, 2, 3, 4, 4, 4, 4, 4]
    rest = held.release([])
    for name in names:
        assert tokens([*(found for step in steps for found in step), *rest], name) == list(range(32))


def test_what_may_not_be_held_goes_out_as_it_came() -> None:
    held = HeldOutputs(8)
    found = output("a", 1)
    assert held.thin([found], nothing) == [found]
    assert not held


def test_an_event_takes_what_is_held_along() -> None:
    held = HeldOutputs(8)
    held.thin([output("a", 1)], anything)
    (preempted,) = held.thin([output("a", 2, events=["preempted"])], anything)
    assert (preempted.new_token_ids, preempted.events) == ([1, 2], ["preempted"])


def test_release_puts_what_is_held_before_the_tokens_of_the_step() -> None:
    held = HeldOutputs(8)
    held.thin([output("a", 1), output("b", 5)], anything)
    held.thin([output("a", 2), output("b", 6)], anything)
    found = held.release([output("b", 7)])
    assert (tokens(found, "a"), tokens(found, "b")) == ([1, 2], [5, 6, 7])
    assert held.release([]) == []


def test_a_sequence_that_ends_without_a_token_still_gets_what_was_held() -> None:
    held = HeldOutputs(8)
    held.thin([output("a", 1)], anything)
    (ended,) = held.thin([Output("a", [], finish_reason=2)], anything)
    assert ended.new_token_ids == [1]
    assert ended.new_logprobs is not None
    assert ended.new_logprobs.logprob_token_ids.tolist() == [[1]]


def test_columns_that_another_sequence_asked_for_are_left_out() -> None:
    held = HeldOutputs(8)
    for token, width in ((1, 3), (2, 6)):
        held.thin([output("a", token, width)], anything)
    (last,) = held.thin([output("a", 3, 3, finish_reason=1)], anything)
    assert last.new_logprobs.logprob_token_ids.tolist() == [[1, 900, 901], [2, 900, 901], [3, 900, 901]]


def test_tokens_without_log_probabilities_are_held_too() -> None:
    held = HeldOutputs(8)
    held.thin([Output("a", [1])], anything)
    (last,) = held.thin([Output("a", [2], finish_reason=1)], anything)
    assert (last.new_token_ids, last.new_logprobs) == ([1, 2], None)


def test_a_dropped_sequence_leaves_nothing_behind() -> None:
    held = HeldOutputs(8)
    held.thin([output("a", 1)], anything)
    held.drop("a")
    held.drop("unknown")
    assert (bool(held), len(held)) == (False, 0)
