"""Text and answer -> reward. Knows nothing of prompts, tokens or models.

A reward is any function `(text: str, answer: str) -> float`; more is better, and only differences within a group count.
"""

import importlib
import math
import re
from collections import deque
from collections.abc import Callable
from decimal import Decimal
from numbers import Real

from flashrl_trainer.latex import last_boxed, without_latex

Reward = Callable[[str, str], float]

# Quantifiers are possessive (`++`, `*+`, `?+`) where a match can still fail: a hostile text costs linear time.
_STRICT_ANSWER = re.compile(r"#### (-?[0-9.,]++)")
_ANSWER_LINE = re.compile(r"answer[ \t]*+:\s*+([^\n]*+)", re.IGNORECASE)
_CURRENCY = r"\s*+[$€£¥₹]?+\s*+"
_MINUS = "\u2212\u2013-"  # minus sign, en dash, hyphen: last, or a character class takes it for a range
_NUMBER = re.compile(
    rf"""
    {_CURRENCY} (?P<sign> [+{_MINUS}]?+ ) {_CURRENCY} (?= \.?[0-9] )
    (?P<whole> [0-9]{{1,3}}+ (?: [ \u00a0\u202f][0-9]{{3}}(?![0-9]) )++ | [0-9,]*+ )  # 1 000 or 1,000
    (?P<fraction> (?: \.[0-9]++ )?+ ) \.*+
    (?! [\w/^] | [ ]*+ [:,=+*/\u00d7{_MINUS}] {_CURRENCY} [0-9] )  # it does not end here
    """,
    re.VERBOSE,
)
_MARKED_NUMBER = re.compile(f"[#]{{4}}{_NUMBER.pattern}", re.VERBOSE)


def strict(text: str, answer: str) -> float:
    """GSM8K as SkyRL scores it: 1 if the first `#### number` is the answer, as text and without commas, else 0."""
    match = _STRICT_ANSWER.search(text)
    return float(match is not None and match[1].replace(",", "") == answer.replace(",", ""))


def numeric(text: str, answer: str) -> float:
    """GSM8K: 1 if the number behind the last `####` that has one equals the answer, else 0.

    Currency signs, commas, spaces, a trailing period, trailing zeros and words that follow (`#### 72 dollars`) make no
    difference. What goes on (`1/2`, `1e3`, `72kg`, `70 + 2 = 72`) is no number, rather than its first digits. Raises
    ValueError if `answer` itself is no number: such a prompt could never be rewarded.
    """
    expected = _as_number(answer)
    if expected is None:
        raise ValueError(f"reward: 'numeric' needs answers that are numbers, got {answer!r}")
    return float(_last_marked_number(text) == expected)


def dapo_math(text: str, answer: str) -> float:
    r"""Math with short answers: 1 if the last `Answer: X`, or without one the last `\boxed{X}`, is the answer, else 0.

    Compared as numbers where both are, otherwise as text without LaTeX's spacing and wrappers (`latex.without_latex`).
    """
    given = _last_answer_line(text) or last_boxed(text)
    return float(given is not None and _same(without_latex(given), without_latex(answer)))


REWARDS: dict[str, Reward] = {"strict": strict, "numeric": numeric, "dapo_math": dapo_math}


def answer_check(name: str) -> Callable[[str], object] | None:
    """A function that raises ValueError for an answer which the built-in reward `name` could never reward.

    None for a user's reward: it may be slow, and need not bear an empty text.
    """
    reward = REWARDS.get(name)
    return None if reward is None else lambda answer: reward("", answer)


def resolve_reward(name: str) -> Reward:
    """The reward called `name`, or the importable function `package.module:function`, its results checked.

    Raises ValueError if there is no such function; what is returned raises it if a result is not a finite number.
    """
    reward = REWARDS.get(name) or _imported(name)

    def checked(text: str, answer: str) -> float:
        value = reward(text, answer)
        # a NaN differs from everything, itself too: its group would be kept, and turn the weights into NaN
        if not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(f"reward: {name!r} must return a finite number, got {value!r} for answer {answer!r}")
        return float(value)

    return checked


def _imported(name: str) -> Reward:
    if not re.fullmatch(r"\w+(\.\w+)*:\w+", name):
        raise ValueError(f"reward: {name!r} is neither one of {', '.join(REWARDS)} nor package.module:function")
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name, None)
    except ImportError as error:
        raise ValueError(f"reward: cannot import {module_name!r}: {error}") from error
    if not callable(function):
        raise ValueError(f"reward: module {module_name!r} has no function {function_name!r}")
    reward: Reward = function
    return reward


def _last_marked_number(text: str) -> Decimal | None:
    matches = deque(_MARKED_NUMBER.finditer(text), maxlen=1)
    return _decimal(matches[0]) if matches else None


def _as_number(text: str) -> Decimal | None:
    match = _NUMBER.fullmatch(text.strip())
    return _decimal(match) if match else None


def _decimal(match: re.Match[str]) -> Decimal:
    whole = re.sub(r"[^0-9]", "", match["whole"])
    sign = "-" if match["sign"] and match["sign"] in _MINUS else ""
    return Decimal(f"{sign}{whole or 0}{match['fraction']}")


def _last_answer_line(text: str) -> str | None:
    answers = _ANSWER_LINE.findall(text)
    return answers[-1].strip() if answers else None


def _same(given: str, expected: str) -> bool:
    numbers = _as_number(given), _as_number(expected)
    return numbers[0] == numbers[1] if None not in numbers else given == expected
