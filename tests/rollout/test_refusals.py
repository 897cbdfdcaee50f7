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
    refusals = Refusals(quiet_s=0.02)
    with caplog.at_level(logging.WARNING):
        refusals.note("a")
        refusals.note("a")
        while len(caplog.messages) < 2:
            refusals.note("a")
    first, second = caplog.messages
    assert first == "refused a"
    assert second.startswith("refused a (")
    assert int(second.split("(")[1].split()[0]) >= 1
