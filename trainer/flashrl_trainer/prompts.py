"""Streamed data sets as prompts: for training shuffled anew each epoch and resumable, for evaluation in file order.

It does not know rewards, tokenizers or the service; a prompt's length is measured by a function it is given.
"""

import glob
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, cast

import datasets
from datasets.exceptions import DatasetsError

from flashrl_trainer.prompt_reader import PromptReader, RowChecks, Source, eval_source, shuffled, train_source
from flashrl_trainer.samples import Prompt
from flashrl_trainer.settings import DataSettings

__all__ = ["PromptStream", "RowChecks", "load_eval", "prepare_data"]

NO_CHECKS = RowChecks()


class PromptStream:
    """Training prompts without end; `epoch` counts the passes that are over.

    The order depends on the rows, `data.shuffle_seed` and the epoch only, so a position is an epoch and a count.
    Resuming replays the epoch up to there: cheap for a file, a second download of what was read for a hub data set.
    """

    def __init__(self, data: DataSettings, checks: RowChecks = NO_CHECKS) -> None:
        """ValueError if `data.train` is a file that is not there."""
        self.epoch = 0
        self._source = train_source(data)
        self._reader = PromptReader(data, checks)
        self._seed = data.shuffle_seed
        self._position = 0  # prompts handed out in this epoch
        self._prompts: Iterator[Prompt] = iter(())
        self._upcoming: Prompt | None = None  # known in advance, so that `epoch` moves with an epoch's last prompt
        self._source.check_exists()

    def next(self, count: int) -> list[Prompt]:
        """The next `count` prompts; ValueError if no row can be used or the data cannot be read."""
        return [self._take() for _ in range(count)]

    def state_dict(self) -> dict[str, Any]:
        """Position, as JSON types, with what it is a position in."""
        return {"epoch": self.epoch, "position": self._position, "order": self._order()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on exactly where `state` was taken; ValueError if it was taken from other data or another seed."""
        if state["order"] != self._order():
            raise ValueError(f"data.train: the checkpoint is from {state['order']}, this is {self._order()}")
        self.epoch, self._position, self._upcoming = state["epoch"], state["position"], None

    def _order(self) -> str:
        return f"{self._source.label} as {self._source.data_format} with shuffle_seed {self._seed}"

    def _take(self) -> Prompt:
        prompt = self._upcoming or self._open_epoch()
        self._position += 1
        self._upcoming = next(self._prompts, None)
        if self._upcoming is None:
            self.epoch, self._position = self.epoch + 1, 0
        return prompt

    def _open_epoch(self) -> Prompt:
        in_order = self._reader.prompts(self._source, _rows(self._source))
        epoch = self._reader.short_enough(shuffled(in_order, random.Random(f"{self._seed}/{self.epoch}")))
        self._prompts = islice(epoch, self._position, None)
        first = next(self._prompts, None)
        if first is None:
            raise self._reader.nothing_usable(self._source)
        return first


def load_eval(data: DataSettings, problems: int, checks: RowChecks = NO_CHECKS) -> list[Prompt]:
    """The first `problems` usable rows of `data.eval` in file order, all for 0; ValueError if there is none."""
    reader = PromptReader(data, checks)
    return list(islice(_in_order(eval_source(data), reader), problems or None))


def prepare_data(out_dir: Path, data: DataSettings, checks: RowChecks = NO_CHECKS) -> dict[Path, int]:
    """Writes train.jsonl and eval.jsonl of id, prompt and answer, for `data.format = "prompts"`; rows in each file."""
    sources = {"train": train_source(data)} | ({"eval": eval_source(data)} if data.eval else {})
    reader = PromptReader(data, checks)
    return {
        out_dir / f"{name}.jsonl": _write_rows(out_dir / f"{name}.jsonl", _in_order(source, reader))
        for name, source in sources.items()
    }


def _in_order(source: Source, reader: PromptReader) -> Iterator[Prompt]:
    """ValueError if not one row is usable."""
    source.check_exists()
    prompts = reader.short_enough(reader.prompts(source, _rows(source)))
    first = next(prompts, None)
    if first is None:
        raise reader.nothing_usable(source)
    yield first
    yield from prompts


def _rows(source: Source) -> Iterator[tuple[int, Any]]:
    """(row number from 1, row); every way in which reading fails becomes a ValueError of one line."""
    try:
        yield from enumerate(_open(source), start=1)
    except (OSError, ValueError, DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{source.setting}: cannot read {source.name}: {reason}") from error


def _open(source: Source) -> Iterable[Any]:
    if not source.is_file:
        options = {"name": source.hub_config or None, "split": source.split}
        return cast(Iterable[Any], datasets.load_dataset(source.name, streaming=True, **options))
    # Not load_dataset(): for a local file too that asks the hub to count it, seconds a time where there is no network.
    path = glob.escape(source.name)  # datasets takes a pattern, and finds nothing where a folder's name looks like one
    if path.endswith(".parquet"):
        return cast(Iterable[Any], datasets.Dataset.from_parquet(path, streaming=True))
    # Lines as text, not as JSON: one malformed line, or a number among strings, would end the whole stream.
    lines = datasets.Dataset.from_text(path, streaming=True, encoding="utf-8-sig", encoding_errors="replace")
    return (line["text"] for line in lines)


def _write_rows(path: Path, prompts: Iterator[Prompt]) -> int:
    """Nothing is written, nor a folder made, before the first prompt is there."""
    lines = (json.dumps(asdict(prompt), ensure_ascii=False) + "\n" for prompt in prompts)
    first = next(lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.write(first)
        return 1 + sum(1 for line in lines if file.write(line))
