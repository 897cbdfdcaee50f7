"""Lines about strangers: the first at once, the next with a count, none for each try."""

import logging

import pytest

from flashrl_rollout.refusals import Refusals


def test_a_kind_is_said_once_and_others_beside_it(caplog: pytest.LogCaptureFixture) -> None:
    refusals = Refusals()
    with caplog.at_level(logging.WARNING):
        for kind in ("a", "a", "b", "a"):
            refusals.note(kind)
    assert caplog.messages == ["refused a", "refused b"]


def test_after_a_quiet_time_it_is_said_again_with_how_many_there_were(caplog: pytest.LogCaptureFixture) -> None:
    times = iter([0.0, 1.0, 59.9, 60.0, 60.1, 119.9, 120.0, 500.0])
    refusals = Refusals(lambda: next(times))
    with caplog.at_level(logging.WARNING):
        for _ in range(8):
            refusals.note("a")
    said = [
        "refused a",
        "refused a (2 more since the last line)",
        "refused a (2 more since the last line)",
        "refused a",
    ]
    assert caplog.messages == said
