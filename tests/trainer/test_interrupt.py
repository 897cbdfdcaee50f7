"""Ctrl-C: at once where nothing can be lost, else remembered; a second one at once, but not the echo of the first."""

import signal
from collections.abc import Iterator

import pytest

from flashrl_trainer.interrupt import ECHO_S, Interrupt


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def interrupt(clock: Clock) -> Iterator[Interrupt]:
    """One that has taken over the signals of this process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    interrupt = Interrupt(clock)
    interrupt.install()
    yield interrupt
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_at_once_where_nothing_can_be_lost(interrupt: Interrupt, number: signal.Signals) -> None:
    reached = []

    def work() -> None:
        with interrupt.anywhere():
            reached.append("inside")
            signal.raise_signal(number)
            reached.append("behind")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert (reached, interrupt.requested, interrupt.insisted) == (["inside"], True, False)


def test_remembered_elsewhere_until_it_may_stop(interrupt: Interrupt, capfd: pytest.CaptureFixture[str]) -> None:
    signal.raise_signal(signal.SIGINT)
    assert capfd.readouterr().err == "stopping after this step; Ctrl-C again stops at once, without it\n"
    reached = []
    with pytest.raises(KeyboardInterrupt), interrupt.anywhere():
        reached.append("inside")
    assert reached == []


def test_only_inside(interrupt: Interrupt) -> None:
    with interrupt.anywhere():
        pass
    signal.raise_signal(signal.SIGINT)
    assert interrupt.requested


def test_a_second_one_stops_anywhere(interrupt: Interrupt, clock: Clock) -> None:
    signal.raise_signal(signal.SIGINT)
    clock.now += ECHO_S + 0.1
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert interrupt.insisted


def test_echo_of_the_first_one_is_none(interrupt: Interrupt, clock: Clock) -> None:
    """torchrun passes on the SIGINT that the terminal has sent to every process already."""
    signal.raise_signal(signal.SIGINT)
    clock.now += ECHO_S - 0.1
    signal.raise_signal(signal.SIGTERM)
    assert not interrupt.insisted


def test_echo_does_not_disturb_what_cleans_up(interrupt: Interrupt) -> None:
    cleaned = []

    def work() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)
            cleaned.append("all of it")

    with pytest.raises(KeyboardInterrupt), interrupt.anywhere():
        work()
    assert cleaned == ["all of it"]
