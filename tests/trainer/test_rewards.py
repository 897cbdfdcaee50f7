"""Rewards against a table of awkward answers, and how they are found by name."""

import time
from pathlib import Path

import pytest

from flashrl_trainer.latex import last_boxed, without_latex
from flashrl_trainer.rewards import dapo_math, numeric, resolve_reward, strict

# text, answer, strict, numeric
GSM8K = [
    ("so it is #### 72", "72", 1, 1),
    ("#### 72.", "72", 0, 1),
    ("#### 72...", "72", 0, 1),
    ("#### $72", "72", 0, 1),
    ("#### 72$", "72", 1, 1),
    ("#### $ 72", "72", 0, 1),
    ("#### €72", "72", 0, 1),
    ("####72", "72", 0, 1),
    ("####  72", "72", 0, 1),
    ("####\n72", "72", 0, 1),
    ("##### 72", "72", 1, 1),
    ("#### 1,000", "1000", 1, 1),
    ("#### 1,000", "1,000", 1, 1),
    ("#### 1000", "1,000", 1, 1),
    ("#### 1 000", "1000", 0, 1),
    ("#### 1\u202f000 grams", "1000", 0, 1),
    ("#### 1000 000", "1000", 1, 1),  # no grouping of thousands, so the second number is a word that follows
    ("#### -3", "-3", 1, 1),
    ("#### -3", "3", 0, 0),
    ("#### \u22123", "-3", 0, 1),
    ("#### \u20133", "-3", 0, 1),
    ("#### -$3", "-3", 0, 1),
    ("#### $-3", "-3", 0, 1),
    ("#### - 3", "-3", 0, 1),
    ("#### +3", "3", 0, 1),
    ("#### 5\nno, wait: #### 72", "72", 0, 1),
    ("#### 72\nno, wait: #### 5", "72", 1, 0),
    ("#### 72 ####", "72", 1, 1),
    ("#### 72 #### dollars", "72", 1, 1),
    ("the answer is 72", "72", 0, 0),
    ("### 72", "72", 0, 0),
    ("", "72", 0, 0),
    ("####", "72", 0, 0),
    ("#### seventy-two", "72", 0, 0),
    ("#### The answer is 72", "72", 0, 0),
    ("#### **72**", "72", 0, 0),
    ("#### 72.00", "72", 0, 1),
    ("#### 72", "72.0", 0, 1),
    ("#### 072", "72", 0, 1),
    ("#### .5", "0.5", 0, 1),
    ("#### 0.50", ".5", 0, 1),
    ("#### -0", "0", 0, 1),
    ("#### 72 dollars", "72", 1, 1),
    ("#### 72 dollars.", "72", 1, 1),
    ("#### 72, of course", "72", 1, 1),
    ("#### 72%", "72", 1, 1),
    ("#### 72kg", "72", 1, 0),
    ("#### 1e3", "1000", 0, 0),
    ("#### 1e3", "1", 1, 0),
    ("#### 1/2", "1", 1, 0),
    ("#### 1/2", "0.5", 0, 0),
    ("#### 10:30", "10", 1, 0),
    ("#### 2^5", "2", 1, 0),
    ("#### 70 + 2 = 72", "70", 1, 0),
    ("#### 70 + 2 = 72", "72", 0, 0),
    ("#### $70 - $2", "70", 0, 0),
    ("#### 70 - two", "70", 1, 1),
    ("#### 1.5.2", "1.5", 0, 0),
    ("#### 1.000,00", "1", 0, 0),
    ("#### 72\u00b2", "72", 1, 0),
    ("#### \u0667\u0662", "72", 0, 0),
    ("#### 9999999999999999999", "9999999999999999998", 0, 0),  # equal as float64
    ("#### 0.1", "0.1000000000000000055511151231257827", 0, 0),  # the same
    ("#### .", "72", 0, 0),
    ("#### ,", "72", 0, 0),
    ("#### -", "72", 0, 0),
    ("#### nan", "72", 0, 0),
]


@pytest.mark.parametrize(("text", "answer", "strict_reward", "numeric_reward"), GSM8K)
def test_gsm8k(text: str, answer: str, strict_reward: float, numeric_reward: float) -> None:
    assert (strict(text, answer), numeric(text, answer)) == (strict_reward, numeric_reward)


@pytest.mark.parametrize("answer", ["", "seventy-two", "72 dollars", "nan"])
def test_numeric_refuses_an_answer_that_no_text_could_match(answer: str) -> None:
    with pytest.raises(ValueError, match="'numeric' needs answers that are numbers"):
        numeric("#### 72", answer)


@pytest.mark.parametrize(
    ("text", "answer", "reward"),
    [
        ("Thus\nAnswer: 34", "34", 1),
        ("Answer: $34$.", "34", 1),
        ("**Answer:** 34", "34", 1),
        ("answer : 034", "34", 1),
        ("Answer:\n34", "34", 1),
        ("Answer: \\boxed{34}", "34", 1),
        ("Answer: x = 34", "34", 1),
        ("Answer: 1,234", "1234", 1),
        ("Answer: 34^\\circ", "34", 1),
        ("Answer: 5\nAnswer: 34", "34", 1),
        ("Answer: 34\nAnswer: 5", "34", 0),
        ("Answer: 34 or 35", "34", 0),
        ("Answer: ", "34", 0),
        ("Answer:\nis \\boxed{34}", "34", 1),
        ("so \\boxed{34}.", "34", 1),
        ("\\boxed{5}, no, \\boxed{34}", "34", 1),
        ("\\boxed{34} and \\boxed{5", "34", 1),
        ("\\boxed{5}\nAnswer: 34", "34", 1),
        ("\\boxed{34}\nAnswer: 5", "34", 0),
        ("Answer: \\dfrac{1}{2}", "\\frac{1}{2}", 1),
        ("\\boxed{\\left( 1, \\text{ east} \\right)}", "(1,east)", 1),
        ("\\boxed{\\leftarrow}", "arrow", 0),
        ("34", "34", 0),
        ("", "34", 0),
    ],
)
def test_dapo_math(text: str, answer: str, reward: float) -> None:
    assert dapo_math(text, answer) == reward


def test_boxed_content_keeps_its_braces() -> None:
    assert last_boxed("\\boxed{\\frac{1}{\\sqrt{2}}} is it") == "\\frac{1}{\\sqrt{2}}"
    assert last_boxed("\\boxed{1") is None
    assert without_latex("y = $\\boxed{\\tfrac{1}{2}}$.") == "\\frac{1}{2}"


@pytest.mark.parametrize(
    "text",
    [
        "####" * 250_000,
        "#### " * 200_000,
        "####" + " " * 1_000_000,
        "#### " + "9" * 1_000_000,
        "#### " + "1," * 500_000 + "x",
        "#### 1" + " 000" * 250_000 + "x",
        "#### 5" + " " * 1_000_000 + "+x",
        "#### 5 " * 150_000,
        "answer:" * 150_000,
        "answer" + " " * 1_000_000,
        "Answer: " + "\\text{" * 150_000,
        "\\boxed{" * 150_000,
        "\\boxed{" + "{" * 1_000_000,
    ],
    ids=lambda text: text[:12],
)
def test_a_hostile_text_costs_linear_time(text: str) -> None:
    began = time.perf_counter()
    for reward in (strict, numeric, dapo_math):
        reward(text, "72")
    assert time.perf_counter() - began < 10  # a second at most; quadratic would be hours


USER_MODULE = """
def length(text, answer):
    return len(text) - len(answer)

def parsed(text, answer):
    return float(text)

def forgot_to_return(text, answer):
    pass
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "our_rewards.py").write_text(USER_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return "our_rewards"


def test_rewards_are_found_by_name() -> None:
    assert resolve_reward("numeric")("#### $72", "72") == 1.0
    assert resolve_reward("strict")("#### $72", "72") == 0.0
    assert resolve_reward("dapo_math")("Answer: 5", "5") == 1.0


def test_rewards_are_found_by_dotted_path(user_module: str) -> None:
    assert resolve_reward(f"{user_module}:length")("abc", "x") == 2.0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nummeric", "'nummeric' is neither one of strict, numeric, dapo_math nor package.module:function"),
        ("", "'' is neither"),
        ("operator.eq", "'operator.eq' is neither"),
        (".rewards:strict", "'.rewards:strict' is neither"),
        ("no_such_package.rewards:f", "cannot import 'no_such_package.rewards'"),
        ("operator:no_such_function", "module 'operator' has no function 'no_such_function'"),
        ("math:pi", "module 'math' has no function 'pi'"),
    ],
)
def test_a_reward_that_is_not_there_is_named(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"^reward: ") as caught:
        resolve_reward(name)
    assert message in str(caught.value)


@pytest.mark.parametrize(("name", "text"), [("parsed", "nan"), ("parsed", "-inf"), ("forgot_to_return", "1")])
def test_a_reward_that_is_no_finite_number_is_refused(user_module: str, name: str, text: str) -> None:
    reward = resolve_reward(f"{user_module}:{name}")
    with pytest.raises(ValueError, match=f"'our_rewards:{name}' must return a finite number, got (nan|-inf|None)"):
        reward(text, "72")
