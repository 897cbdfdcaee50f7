"""One row of a data set -> prompt and answer, for each `data.format`.

It does not know where rows come from, nor how long a prompt may be.

    gsm8k       {"question": "How many ...?", "answer": "... #### 72"}
    dapo_math   {"prompt": [{"role": "user", "content": "Solve ..."}], "reward_model": {"ground_truth": "34"}}
    aime        {"problem": "Find ...", "answer": "204"}
    prompts     {"prompt": "text" | [{"role": ..., "content": ...}], "answer": "72"}, as `prepare-data` writes it
"""

from collections.abc import Callable, Mapping
from typing import Any

from flashrl_trainer.settings import DataFormat

PromptText = str | list[dict[str, str]]
Wrap = Callable[[str], PromptText]


class BadRowError(ValueError):
    """A row that cannot become a prompt; the message says why."""


def parse_row(row: Mapping[str, Any], data_format: DataFormat, wrap: Wrap) -> tuple[PromptText, str]:
    """Prompt and answer of `row`; `wrap` turns a bare question into a prompt. BadRowError if a part is missing."""
    return _PARSERS[data_format](row, wrap)


def wrapper(template: str, as_message: bool) -> Wrap:
    """Puts a question in place of `{question}`, and that into a user message if asked to."""

    def wrap(question: str) -> PromptText:
        text = template.replace("{question}", question)  # not format(): questions and templates may hold braces
        return [{"role": "user", "content": text}] if as_message else text

    return wrap


def _gsm8k(row: Mapping[str, Any], wrap: Wrap) -> tuple[PromptText, str]:
    question, solution = _text(row, "question"), _text(row, "answer")
    if "####" not in solution:
        raise BadRowError('no "####" in answer')
    answer = solution.rpartition("####")[2].strip()
    if not answer:
        raise BadRowError('nothing after "####" in answer')
    return wrap(question), answer


def _dapo_math(row: Mapping[str, Any], wrap: Wrap) -> tuple[PromptText, str]:
    messages = _messages(row.get("prompt"))
    if len(messages) != 1 or messages[0]["role"] != "user":
        raise BadRowError("prompt is not a single user message")
    truth = row.get("reward_model")
    return wrap(messages[0]["content"]), _text(truth if isinstance(truth, Mapping) else {}, "ground_truth")


def _aime(row: Mapping[str, Any], wrap: Wrap) -> tuple[PromptText, str]:
    answer = row.get("answer")
    is_integer = isinstance(answer, int) and not isinstance(answer, bool)
    return wrap(_text(row, "problem")), str(answer) if is_integer else _text(row, "answer")


def _prompts(row: Mapping[str, Any], wrap: Wrap) -> tuple[PromptText, str]:
    prompt = row.get("prompt")
    return (_messages(prompt) if isinstance(prompt, list) else _text(row, "prompt")), _text(row, "answer")


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if value is None:
        raise BadRowError(f"no {column}")
    if not isinstance(value, str):
        raise BadRowError(f"{column} is not text but {type(value).__name__}")
    if not value.strip():
        raise BadRowError(f"{column} is empty")
    return value


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise BadRowError("prompt is not a list of messages")
    if not all(isinstance(message, Mapping) for message in value):
        raise BadRowError("prompt holds something that is not a message")
    return [{"role": _text(message, "role"), "content": _text(message, "content")} for message in value]


_PARSERS: dict[DataFormat, Callable[[Mapping[str, Any], Wrap], tuple[PromptText, str]]] = {
    "gsm8k": _gsm8k,
    "dapo_math": _dapo_math,
    "aime": _aime,
    "prompts": _prompts,
}
