"""Prompts for a measurement: from a JSONL file, or single tokens at random after which a model says what it likes.

Knows rows and token ids; knows nothing of models.
"""

import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

FIELDS = ("prompt", "question", "text")
_LONGEST_PROMPT = 512


def read_texts(file: Path) -> list[str]:
    """The first of `FIELDS` of each row, with a line's end; ValueError names file and line."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"texts: {file}: {getattr(error, 'strerror', None) or error}") from error
    texts = [_text(line, f"{file}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not texts:
        raise ValueError(f"texts: {file} has no rows")
    return texts


def _text(line: str, place: str) -> str:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise ValueError(f"texts: {place}: no JSON: {error}") from error
    found = next((row[name] for name in FIELDS if name in row), None) if isinstance(row, dict) else None
    if not isinstance(found, str) or not found:
        raise ValueError(f"texts: {place}: needs a text as {' or '.join(FIELDS)}")
    return found.rstrip("\n") + "\n"


def prompts(texts: Sequence[str] | None, encode: Callable[[str], list[int]], vocab_size: int) -> Iterator[list[int]]:
    """Prompts as token ids without end: the texts, again from the first after the last, or one random token each."""
    if texts is not None:
        yield from itertools.cycle([encode(text)[:_LONGEST_PROMPT] for text in texts])
    drawn = random.Random(0)
    while True:
        yield [drawn.randrange(vocab_size)]
