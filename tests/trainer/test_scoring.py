"""Rewards that raise, hang, die or return nonsense: said with the prompt, counted, left out; the next one is right."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flashrl_trainer import reward_process
from flashrl_trainer.reward_process import RewardProcess
from flashrl_trainer.scoring import Answer, RewardFailedError, Scorer, make_scorer
from flashrl_trainer.settings import DataSettings

TIMEOUT_S = 2.0
MODULE = "tests.trainer.user_rewards"

Make = Callable[..., tuple[Scorer, list[str]]]


@pytest.fixture
def make() -> Iterator[Make]:
    """`make("length")` is a scorer and the lines it has said."""
    scorers: list[Scorer] = []

    def made(function: str, max_failures: int = 32, timeout_s: float = TIMEOUT_S) -> tuple[Scorer, list[str]]:
        name = f"{MODULE}:{function}" if ":" not in function else function
        data = DataSettings(train="x", reward=name, reward_timeout_s=timeout_s, reward_max_failures=max_failures)
        lines: list[str] = []
        scorers.append(make_scorer(data, lines.append))
        return scorers[-1], lines

    yield made
    for scorer in scorers:
        scorer.close()


def answers(*texts: str) -> list[Answer]:
    return [Answer(f"data/{number}", text, "good") for number, text in enumerate(texts, start=1)]


def test_a_users_reward_is_called_in_processes_of_its_own_and_order_is_kept(make: Make) -> None:
    scorer, lines = make("length", timeout_s=60.0)
    scorer.start()
    assert scorer.score(answers(*("x" * number for number in range(100)))) == [number - 4 for number in range(100)]
    assert (scorer.failed, lines) == (0, [])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("raise", "KeyError: 'no\\nsuch thing'"),
        ("exit", "SystemExit: 3"),
        ("die", "its process was ended by SIGSEGV"),
        ("nan", f"ValueError: reward: '{MODULE}:odd' must return a finite number, got nan for answer 'good'"),
        ("none", f"ValueError: reward: '{MODULE}:odd' must return a finite number, got None for answer 'good'"),
        ("hang", "no result within 2 s"),
        ("hang with a child", "no result within 2 s"),
    ],
)
def test_a_failure_is_one_line_with_the_prompt_and_costs_its_own_reward_only(
    make: Make, text: str, reason: str
) -> None:
    scorer, lines = make("odd")
    scorer.start()
    assert scorer.score(answers("fine", text, "fine", "fine")) == [1.0, None, 1.0, 1.0]
    assert scorer.failed == 1
    assert lines == [f"reward {MODULE}:odd failed for a text of prompt data/2: {reason}"]
    assert scorer.score(answers("fine")) == [1.0]


def test_what_a_reward_prints_is_no_reply(make: Make) -> None:
    scorer, _ = make("odd", timeout_s=60.0)
    assert scorer.score(answers("print", "fine")) == [1.0, 1.0]


def test_a_reward_that_always_fails_ends_the_run(make: Make) -> None:
    scorer, lines = make("odd", max_failures=3, timeout_s=60.0)
    with pytest.raises(RewardFailedError, match=r"^3 times in a row \(data\.reward_max_failures\): reward .*data/6"):
        scorer.score(answers("raise", "raise", "fine", "raise", "raise", "raise", "fine"))
    assert (scorer.failed, len(lines)) == (5, 5)


def test_the_row_of_failures_goes_on_over_calls_and_ends_with_a_success(make: Make) -> None:
    scorer, _ = make("odd", max_failures=3, timeout_s=60.0)
    scorer.score(answers("raise", "raise"))
    scorer.score(answers("fine", "raise", "raise"))
    with pytest.raises(RewardFailedError):
        scorer.score(answers("raise"))


def test_without_a_limit_failures_are_said_a_few_times_and_counted(make: Make) -> None:
    scorer, lines = make("odd", max_failures=0, timeout_s=60.0)
    assert scorer.score(answers(*["raise"] * 50)) == [None] * 50
    assert (scorer.failed, len(lines)) == (50, 21)
    assert lines[-1] == "further failures of it are only counted: reward/failed in metrics.jsonl"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:f", "^reward: cannot import 'no_such_module': No module named"),
        (f"{MODULE}:none_such", "^reward: module .* has no function 'none_such'$"),
    ],
)
def test_a_reward_that_is_not_there_is_said_at_the_start(make: Make, name: str, message: str) -> None:
    scorer, _ = make(name)
    with pytest.raises(ValueError, match=message):
        scorer.start()


def test_a_module_that_cannot_be_imported_is_one_line(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_rewards.py").write_text("import os\nprint('hello')\n1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    scorer, _ = make("broken_rewards:f")
    with pytest.raises(ValueError, match=r"^reward: cannot import 'broken_rewards:f': ZeroDivisionError: division"):
        scorer.start()


def test_built_in_rewards_start_no_process() -> None:
    scorer = make_scorer(DataSettings(train="x", reward="numeric"), pytest.fail)
    scorer.start()
    assert scorer.score([Answer("a", "#### 72", "72"), Answer("b", "#### 7", "72")]) == [1.0, 0.0]
    scorer.close()


def test_closing_ends_a_reward_that_hangs_and_what_it_started(make: Make) -> None:
    process = RewardProcess(f"{MODULE}:odd", timeout_s=0.5)
    process.start()
    group = os.getpgid(process.pid)
    with pytest.raises(reward_process.RewardError):
        process.call("hang with a child", "")
    gone_by = time.monotonic() + 30
    while time.monotonic() < gone_by:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
    pytest.fail("its child is still there")
