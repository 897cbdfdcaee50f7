"""Rows -> Prompts: what cannot be used is reported once by its row number and left out.

It does not know how rows are fetched, nor epochs and positions.
Rows that repeat an earlier prompt are read once: DAPO-Math-17k repeats each problem about a hundred times on the hub.
"""

import json
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from flashrl_trainer.row_formats import BadRowError, PromptText, parse_row, wrapper
from flashrl_trainer.samples import Prompt
from flashrl_trainer.settings import DataFormat, DataSettings

SHUFFLE_BUFFER_ROWS = 20_000  # a data set with fewer distinct prompts is shuffled exactly
LOCAL_SUFFIXES = (".jsonl", ".json", ".parquet")

TokenCounter = Callable[[PromptText], int]
Report = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """Where rows are: `Source("data.train", "openai/gsm8k", "train", "main", "gsm8k")`, or a local file as `name`."""

    setting: str
    name: str
    split: str
    hub_config: str
    data_format: DataFormat

    @property
    def is_file(self) -> bool:
        return self.name.endswith(LOCAL_SUFFIXES) or Path(self.name).is_file()

    @property
    def label(self) -> str:
        """Short and stable: `gsm8k/train`, or `train` for a file `some/folder/train.jsonl`."""
        return Path(self.name).stem if self.is_file else f"{Path(self.name).name}/{self.split}"

    def check_exists(self) -> None:
        """ValueError that names the setting if this is a file that is not there."""
        if self.is_file and not Path(self.name).is_file():
            raise ValueError(f"{self.setting}: no file {self.name}")


def train_source(data: DataSettings) -> Source:
    return Source("data.train", data.train, data.train_split, data.hub_config, data.format)


def eval_source(data: DataSettings) -> Source:
    return Source("data.eval", data.eval, data.eval_split, data.hub_config, data.eval_format or data.format)


def log_bad_row(line: str) -> None:
    logging.getLogger(__name__).warning(line)


@dataclass(frozen=True)
class RowChecks:
    """What the caller knows of usable rows: the length of a prompt in tokens, and which answers can be rewarded."""

    count_tokens: TokenCounter | None = None
    check_answer: Callable[[str], object] | None = None  # raises ValueError for an answer that never could be
    on_bad_row: Report = log_bad_row  # hears once of each row that is skipped


class PromptReader:
    """Turns rows, decoded or as lines of JSON, into prompts; remembers what it reported."""

    def __init__(self, data: DataSettings, checks: RowChecks) -> None:
        self._wrap = wrapper(data.prompt_template, data.chat_template)
        self._max_prompt_tokens = data.max_prompt_tokens
        self._checks = checks
        self._reported: dict[str, None] = {}  # in order

    def prompts(self, source: Source, rows: Iterable[tuple[int, Any]]) -> Iterator[Prompt]:
        """Prompts in the order of `rows`, which carry their number; row 17 becomes `gsm8k/train/17`."""
        seen: set[int] = set()
        for number, row in rows:
            try:
                text, answer = parse_row(_decoded(row), source.data_format, self._wrap)
                if self._checks.check_answer:
                    self._checks.check_answer(answer)
            except ValueError as error:
                self._report(f"{source.label} row {number}: {error}")
                continue
            if (fingerprint := hash(repr(text))) not in seen:
                seen.add(fingerprint)
                yield Prompt(f"{source.label}/{number}", text, answer)

    def short_enough(self, prompts: Iterable[Prompt]) -> Iterator[Prompt]:
        """Leaves out prompts of more than `data.max_prompt_tokens`, or that `count_tokens` raises BadRowError for."""
        count_tokens = self._checks.count_tokens
        for prompt in prompts:
            try:
                tokens = count_tokens(prompt.prompt) if count_tokens else 0
            except BadRowError as error:
                problem = str(error)
            else:
                if tokens <= self._max_prompt_tokens:
                    yield prompt
                    continue
                problem = f"{tokens} tokens, data.max_prompt_tokens = {self._max_prompt_tokens}"
            label, _, number = prompt.id.rpartition("/")
            self._report(f"{label} row {number}: {problem}")

    def nothing_usable(self, source: Source) -> ValueError:
        first = next((f"; the first: {line}" for line in self._reported), ": it is empty")
        return ValueError(f"{source.setting}: no usable row in {source.name}{first}")

    def _report(self, line: str) -> None:
        if line not in self._reported:
            self._reported[line] = None
            self._checks.on_bad_row(f"skipped {line}")


def shuffled(prompts: Iterator[Prompt], generator: random.Random) -> Iterator[Prompt]:
    """Random draws from a buffer that is refilled: uniform over all orders if everything fits into the buffer."""
    buffer = list(islice(prompts, SHUFFLE_BUFFER_ROWS))
    for incoming in prompts:
        index = generator.randrange(len(buffer))
        yield buffer[index]
        buffer[index] = incoming
    generator.shuffle(buffer)
    yield from buffer


def _decoded(row: Any) -> Mapping[str, Any]:
    if not isinstance(row, str):
        return dict(row)
    if "\ufffd" in row:  # what is put in place of undecodable bytes
        raise BadRowError("not UTF-8")
    try:
        value = json.loads(row)
    except ValueError as error:
        raise BadRowError(f"not JSON: {error}" if row.strip() else "empty line") from None
    if not isinstance(value, dict):
        raise BadRowError("not a JSON object")
    return value
