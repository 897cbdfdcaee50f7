"""Sampling that runs ahead: how far, for which version, what a checkpoint sees of it, and what becomes of errors."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from flashrl_trainer.ahead import Ahead
from flashrl_trainer.collect import Progress
from flashrl_trainer.sampling import SampledStep, SamplingCounts
from flashrl_trainer.source import Drawn, InTurn

LIMIT_S = 20.0


def quiet(done: int, total: int) -> None:
    """Nobody watches."""


class Draws:
    """Draws steps 1, 2, …; the test lets each of them end, and says what goes wrong."""

    def __init__(self) -> None:
        self.drawn = 0
        self.begun: list[int] = []  # the version that each step will train on
        self.asked: list[int] = []  # the version that each step is drawn from at least
        self.may_end = threading.Semaphore(0)
        self.failures: list[Exception] = []
        self._began = threading.Condition()

    def begin(self, version: int) -> None:
        with self._began:
            self.begun.append(version)
            self._began.notify_all()

    def fill(self, version: int, progress: Progress) -> SampledStep:
        self.asked.append(version)
        assert self.may_end.acquire(timeout=LIMIT_S)
        if self.failures:
            raise self.failures.pop(0)
        self.drawn += 1
        return SampledStep([], 0, 0, self.begun[-1], SamplingCounts(attempts=self.drawn))

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn = state["drawn"]

    def until_begun(self, count: int) -> None:
        with self._began:
            assert self._began.wait_for(lambda: len(self.begun) >= count, LIMIT_S)


@pytest.fixture
def draws() -> Draws:
    return Draws()


@pytest.fixture
def ahead(draws: Draws) -> Iterator[Ahead]:
    made = Ahead(draws, 1, None, lambda: draws.may_end.release(100))
    yield made
    made.stop()


def number(drawn: Drawn) -> int:
    """Which step it is."""
    return drawn.sampled.counts.attempts


def test_next_step_is_sampled_while_this_one_is_trained_and_no_further_one(draws: Draws, ahead: Ahead) -> None:
    draws.may_end.release(100)
    assert number(ahead.take(7, quiet)) == 1
    draws.until_begun(2)
    assert number(ahead.take(7, quiet)) == 2, "it was ready before step 1 was trained"
    assert draws.begun == [7, 8], "step 2 trains on what comes of step 1"
    ahead.trained(8)
    draws.until_begun(3)
    assert number(ahead.take(8, quiet)) == 3
    assert (draws.begun, draws.asked) == ([7, 8, 9], [7, 7, 8])


def test_two_steps_ahead(draws: Draws) -> None:
    ahead = Ahead(draws, 2, None, lambda: None)
    draws.may_end.release(100)
    assert [number(ahead.take(0, quiet)) for _ in range(3)] == [1, 2, 3]
    assert draws.begun == [0, 1, 2]
    ahead.trained(1)
    assert number(ahead.take(1, quiet)) == 4
    ahead.stop()


def test_nothing_is_sampled_beyond_the_last_step(draws: Draws) -> None:
    ahead = Ahead(draws, 5, 3, lambda: None)
    draws.may_end.release(100)
    assert [number(ahead.take(0, quiet)) for _ in range(3)] == [1, 2, 3]
    ahead.trained(1)
    ahead.stop()
    assert len(draws.begun) == 3


def test_resumed_run_ends_at_the_same_step(draws: Draws) -> None:
    ahead = Ahead(draws, 5, 3, lambda: None)
    ahead.load_state_dict({"step": 2, "drawn": 2})
    draws.may_end.release(100)
    assert number(ahead.take(2, quiet)) == 3
    ahead.stop()
    assert draws.begun == [2]


def test_checkpoint_sees_nothing_of_the_steps_that_were_not_taken(draws: Draws, ahead: Ahead) -> None:
    draws.may_end.release(1)
    assert ahead.state_dict() == {"drawn": 0}
    ahead.take(0, quiet)
    draws.until_begun(2)
    assert ahead.state_dict() == {"drawn": 1}
    draws.may_end.release(1)
    ahead.trained(1)
    draws.until_begun(3)
    assert (draws.drawn, ahead.state_dict()) == (2, {"drawn": 1}), "step 2 was sampled and is not trained"
    ahead.take(1, quiet)
    assert ahead.state_dict() == {"drawn": 2}


def test_error_is_raised_once_and_the_step_is_tried_again(draws: Draws, ahead: Ahead) -> None:
    draws.failures = [ValueError("lost")]
    draws.may_end.release(100)
    with pytest.raises(ValueError, match="lost"):
        ahead.take(3, quiet)
    assert number(ahead.take(3, quiet)) == 1
    draws.until_begun(2)
    assert draws.begun[:2] == [3, 4], "not begun anew"


def test_stop_ends_a_sampler_at_work(draws: Draws, ahead: Ahead) -> None:
    draws.may_end.release(1)
    ahead.take(0, quiet)
    draws.until_begun(2)
    ahead.stop()
    assert not any(thread.name == "sampling ahead" for thread in threading.enumerate())


def test_in_turn_begins_a_step_once_however_often_it_fails(draws: Draws) -> None:
    source = InTurn(draws)
    draws.failures = [ValueError("lost")]
    draws.may_end.release(100)
    with pytest.raises(ValueError, match="lost"):
        source.take(3, quiet)
    assert number(source.take(4, quiet)) == 1
    assert (draws.begun, draws.asked, source.state_dict()) == ([3], [3, 4], {"drawn": 1})
