"""Replies of two ranks into one answer, with the numbers worked by hand."""

from typing import Any

import pytest

from flashrl_rollout import rank_replies
from flashrl_rollout.engine import EngineDeadError, EngineError
from flashrl_wire.digest import PartDigest

SPEC = {"name": "w", "shape": [4, 2], "storage": "bf16"}


def _described(regions: dict[str, int], **changes: Any) -> dict[str, Any]:
    return {"tensors": [SPEC | changes], "regions": {"w": regions}}


def _digest(low: int) -> str:
    return PartDigest(low=low, high=1).hex()


def test_regions_of_two_ranks_make_up_the_layout() -> None:
    merged = rank_replies.layout([_described({"0+4x1": 4}), _described({"4+4x1": 4})])
    assert [(spec.name, spec.shape) for spec in merged.tensors] == [("w", (4, 2))]


def test_a_replicated_part_counts_once() -> None:
    rank_replies.layout([_described({"0+8x1": 8}), _described({"0+8x1": 8})])


def test_missing_elements_and_different_models_are_refused() -> None:
    with pytest.raises(EngineError, match="4 of the 8 elements of w"):
        rank_replies.layout([_described({"0+4x1": 4}), _described({"0+4x1": 4})])
    with pytest.raises(EngineError, match="different models"):
        rank_replies.layout([_described({"0+8x1": 8}), _described({"0+8x1": 8}, shape=[2, 4])])


def test_shards_add_up_and_copies_count_once() -> None:
    one = {"digests": {"w": {"0+4x1": _digest(2)}, "norm": {"0+3x1": _digest(5)}}}
    two = {"digests": {"w": {"4+4x1": _digest(40)}, "norm": {"0+3x1": _digest(5)}}}
    assert rank_replies.digests([one, two]) == {"w": PartDigest(42, 2), "norm": PartDigest(5, 1)}


def test_copies_that_differ_are_an_error() -> None:
    replies = [{"digests": {"norm": {"0+3x1": _digest(low)}}} for low in (5, 6)]
    with pytest.raises(EngineError, match="different copies of norm"):
        rank_replies.digests(replies)


def test_the_gravest_error_wins() -> None:
    rank_replies.check([{}, {"digests": {}}])
    with pytest.raises(EngineError, match="no such file"):
        rank_replies.check([{}, {"error": "no such file"}])
    with pytest.raises(EngineDeadError, match="lost"):
        rank_replies.check([{"error": "no such file"}, {"error": "lost", "fatal": True}])
