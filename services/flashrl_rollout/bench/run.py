"""A benchmark from the first start to the last round: all arms are loaded before one is asked, then they take turns.

Knows the order of things; knows nothing of what an arm is or how numbers are shown.
"""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from flashrl_rollout.bench.arms import Answer, Arm, ArmFailedError
from flashrl_rollout.bench.report import ArmFacts, Turn
from flashrl_rollout.bench.settings import ArmName
from flashrl_rollout.bench.workload import Workload

_POLL_S = 0.25


class Show(Protocol):
    """What a person sees meanwhile."""

    def loading(self, waiting: Sequence[ArmName], ready: int, elapsed_s: float) -> None:
        """Some arms are loading; called several times a second."""

    def warming(self, arm: ArmName) -> None:
        """One arm does a round that is not counted."""

    def turn(self, turn: Turn) -> None:
        """One arm has done a round."""


def run(
    arms: Sequence[Arm],
    workloads: Sequence[Workload],
    show: Show,
    *,
    timeout_s: float,
    at_once: bool,
) -> tuple[list[Turn], dict[ArmName, ArmFacts]]:
    """Load all arms, at once or one by one, then a round for each workload; the first is not counted.

    Only one arm works at a time, and each round begins with another. Every arm is stopped at the end, whatever ends it;
    ArmFailedError if one fails or is not ready after `timeout_s`.
    """
    try:
        start_s = load(arms, show, timeout_s=timeout_s, at_once=at_once)
        turns: list[Turn] = []
        for index, workload in enumerate(workloads):
            for arm in rotated(arms, index):
                if not index:
                    show.warming(arm.name)
                turn = _turn(arm, workload, index)
                if index:
                    turns.append(turn)
                    show.turn(turn)
        return turns, {arm.name: _facts(arm, start_s[arm.name]) for arm in arms}
    finally:
        stop_all(arms)


def _facts(arm: Arm, start_s: float) -> ArmFacts:
    return ArmFacts(arm.weight_bytes(), arm.cache_tokens(), start_s)


def rotated(arms: Sequence[Arm], index: int) -> list[Arm]:
    """The arms from the `index`-th on, round about."""
    first = index % len(arms)
    return [*arms[first:], *arms[:first]]


def stop_all(arms: Sequence[Arm]) -> None:
    """Stop them side by side: each takes seconds."""
    with ThreadPoolExecutor(len(arms)) as pool:
        list(pool.map(lambda arm: arm.stop(), arms))


def load(arms: Sequence[Arm], show: Show, *, timeout_s: float, at_once: bool) -> dict[ArmName, float]:
    """Start the arms and wait for all of them; the seconds that each took."""
    began = time.monotonic()
    start_s: dict[ArmName, float] = {}
    for group in [arms] if at_once else [[arm] for arm in arms]:
        began_group = time.monotonic()
        waiting = list(group)
        for arm in group:
            arm.start()
        while waiting:
            ready = [arm for arm in waiting if arm.is_ready()]
            start_s |= {arm.name: time.monotonic() - began_group for arm in ready}
            waiting = [arm for arm in waiting if arm not in ready]
            show.loading([arm.name for arm in waiting], len(start_s), time.monotonic() - began)
            if waiting and time.monotonic() - began > timeout_s:
                raise waiting[0].failed(f"was not ready after {timeout_s:g} s (timeout_s)")
            time.sleep(_POLL_S if waiting else 0.0)
    return start_s


def _turn(arm: Arm, workload: Workload, index: int) -> Turn:
    answer = arm.ask(workload)
    _check(arm.name, answer, workload)
    return Turn(index, arm.name, answer.seconds, workload.num_tokens, answer.front_cpu_s)


def _check(name: ArmName, answer: Answer, workload: Workload) -> None:
    """ArmFailedError unless every sequence has the length that was asked for: else arms did different work."""
    wanted = [[tokens] * workload.samples for tokens in workload.max_tokens]
    if answer.lengths != wanted:
        drawn, asked = sum(map(sum, answer.lengths)), workload.num_tokens
        raise ArmFailedError(f"{name} drew {drawn} tokens where {asked} were asked for")
