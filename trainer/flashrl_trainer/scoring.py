"""Completions -> rewards, so that no reward can stop or hang a run: what fails is said, counted and left out.

Knows rewards and their processes; knows nothing of groups, or of what is done about a missing reward.

Built-in rewards run in this process: they cost microseconds, and cannot hang. A user's have processes of their own.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Protocol

from flashrl_trainer.reward_process import RewardError, RewardProcess
from flashrl_trainer.rewards import REWARDS, Reward
from flashrl_trainer.settings import DataSettings

MOST_PROCESSES = 4
FAILURES_TOLD = 20  # more are only counted


class RewardFailedError(RuntimeError):
    """`data.reward_max_failures` rewards in a row have failed: it is not one odd text, the reward is broken."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What is to be rewarded: `Answer("gsm8k/train/17", "... #### 72", "72")`."""

    prompt_id: str
    text: str
    answer: str


class Scorer(Protocol):
    """`failed` counts the rewards that were left out."""

    @property
    def failed(self) -> int: ...
    def start(self) -> None: ...
    def score(self, answers: Sequence[Answer]) -> list[float | None]: ...
    def close(self) -> None: ...


def make_scorer(data: DataSettings, report: Callable[[str], None]) -> Scorer:
    """For `data.reward`; `report` hears a line of each of the first failures."""
    if data.reward in REWARDS:
        return InlineScorer(REWARDS[data.reward])
    count = min(MOST_PROCESSES, os.cpu_count() or 1)
    processes = [RewardProcess(data.reward, data.reward_timeout_s) for _ in range(count)]
    return PoolScorer(processes, Failures(data.reward, data.reward_max_failures, report))


class InlineScorer:
    """For rewards that cannot fail for the answers that `check_answer` let through."""

    failed = 0

    def __init__(self, reward: Reward) -> None:
        self._reward = reward

    def start(self) -> None:
        """Nothing to start."""

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        """One reward an answer."""
        return [self._reward(answer.text, answer.answer) for answer in answers]

    def close(self) -> None:
        """Nothing to end."""


@dataclass
class Failures:
    """Says what failed, counts it, and ends a run whose reward does nothing else."""

    name: str
    limit: int  # in a row; 0: none
    report: Callable[[str], None]
    total: int = 0
    _in_a_row: int = field(default=0, init=False)

    def add(self, prompt_id: str, error: RewardError) -> None:
        """RewardFailedError at the limit."""
        self.total += 1
        self._in_a_row += 1
        line = f"reward {self.name} failed for a text of prompt {prompt_id}: {error}"
        if self.total <= FAILURES_TOLD:
            self.report(line)
        if self.total == FAILURES_TOLD:
            self.report("further failures of it are only counted: reward/failed in metrics.jsonl")
        if self.limit and self._in_a_row >= self.limit:
            raise RewardFailedError(f"{self._in_a_row} times in a row (data.reward_max_failures): {line}")

    def pass_over(self) -> None:
        """One that did not fail."""
        self._in_a_row = 0


class PoolScorer:
    """Rewards in several processes at a time, in the order of the answers."""

    def __init__(self, processes: Sequence[RewardProcess], failures: Failures) -> None:
        self._processes, self._failures = processes, failures
        self._free: SimpleQueue[RewardProcess] = SimpleQueue()
        for process in processes:
            self._free.put(process)
        self._threads = ThreadPoolExecutor(len(processes), thread_name_prefix="reward")

    @property
    def failed(self) -> int:
        return self._failures.total

    def start(self) -> None:
        """One process, to see whether the function is there (ValueError if not); the others start when needed."""
        self._processes[0].start()

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        """One reward an answer, None where it failed. RewardFailedError after too many failures in a row."""
        results = [self._threads.submit(self._call, answer) for answer in answers]
        try:
            return [self._reward(answer, result.result()) for answer, result in zip(answers, results, strict=True)]
        except BaseException:
            for result in results:
                result.cancel()
            raise

    def close(self) -> None:
        """End the processes, also in the middle of a reward."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.stop()

    def _call(self, answer: Answer) -> float | RewardError:
        process = self._free.get()
        try:
            return process.call(answer.text, answer.answer)
        except RewardError as error:
            return error
        except ValueError as error:  # imported once, and not a second time
            return RewardError(str(error))
        finally:
            self._free.put(process)

    def _reward(self, answer: Answer, result: float | RewardError) -> float | None:
        if isinstance(result, RewardError):
            self._failures.add(answer.prompt_id, result)
            return None
        self._failures.pass_over()
        return result
