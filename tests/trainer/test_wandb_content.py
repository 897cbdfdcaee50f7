"""What Weights & Biases gets, read back from its offline files: every number of every row, and tables of samples."""

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from wandb.proto.wandb_internal_pb2 import Record

from flashrl_trainer.config import load_config
from flashrl_trainer.jsonl import read_rows
from flashrl_trainer.metrics import METRIC_KEYS, MetricsWriter, start_wandb
from flashrl_trainer.samples import Completion, Group, Prompt, Sample

Row = dict[str, float | None]
LIMIT_S = 60.0
BLOCK_BYTES = 32768  # of the log format, that of LevelDB behind a header of seven bytes


@dataclass(frozen=True)
class Sampled:
    """A step's groups."""

    groups: list[Group]


class Quiet:
    """A display that nobody looks at."""

    def phase(self, name: str) -> Any: ...
    def row(self, row: Row) -> None: ...
    def note(self, text: str) -> None:
        raise AssertionError(text)

    def close(self) -> None: ...


def payloads(content: bytes) -> Iterator[bytes]:
    """The log's whole records, of a file that may still be growing; one may be cut into pieces over several blocks."""
    position, pieces = 7, b""
    while position + 7 <= len(content):
        _, length, kind = struct.unpack_from("<IHB", content, position)
        if kind == 0:  # the rest of a block
            position += BLOCK_BYTES - position % BLOCK_BYTES
            continue
        if position + 7 + length > len(content):  # W&B is still writing this piece
            return
        pieces += content[position + 7 : position + 7 + length]
        position += 7 + length
        if BLOCK_BYTES - position % BLOCK_BYTES < 7:
            position += BLOCK_BYTES - position % BLOCK_BYTES
        if kind in (1, 4):  # whole, or the last piece
            yield pieces
            pieces = b""


def records(run_dir: Path) -> list[Record]:
    """All of a run, to its end: on a slow machine W&B's own process writes on after `close` has waited long enough."""
    (file,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    found: list[Record] = []
    gives_up = time.monotonic() + LIMIT_S
    while not any(record.HasField("exit") for record in found):
        assert time.monotonic() < gives_up
        found = [Record.FromString(payload) for payload in payloads(file.read_bytes())]
    return found


def history(run_dir: Path) -> list[dict[str, Any]]:
    """What `run.log` was given, as W&B wrote it."""
    logged = [record.history.item for record in records(run_dir) if record.HasField("history")]
    rows = [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items} for items in logged]
    return [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]


def row(step: int) -> Row:
    values: Row = {key: step + index / 100 for index, key in enumerate(METRIC_KEYS)}
    return values | {"step": step, "eval/accuracy": None}


def group(name: str, prompt: str | list[dict[str, str]]) -> Group:
    completion = Completion([5, 6], [-0.5, -0.25], f"text of {name}", "stop", [(3, 0, 2)])
    return Group(Prompt(name, prompt, "72"), [1, 2], [Sample(completion, 1.0, 0.5)], 3)


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two steps, each with its samples."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    config = load_config(None, ["model.path=m", "data.train=t", "data.eval=e", "run.wandb=auto"], {})
    folder = tmp_path / "run"
    with MetricsWriter(folder, config, open_display=lambda config, step: Quiet(), open_mirror=start_wandb) as writer:
        writer.begin(0)
        for step in (1, 2):
            writer.write(row(step))
            chat = [{"role": "user", "content": "Why?"}]
            writer.samples(step, Sampled([group(f"a/{step}", "How many?"), group(f"b/{step}", chat)]))
    return folder


def test_a_file_read_while_it_is_written_gives_its_whole_records(run_dir: Path) -> None:
    records(run_dir)  # to the end
    (file,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    content = file.read_bytes()
    whole = list(payloads(content))
    counts = []
    for cut in range(len(content)):
        found = list(payloads(content[:cut]))
        assert found == whole[: len(found)]
        counts.append(len(found))
    assert counts == sorted(counts)
    assert set(counts) == set(range(len(whole)))


def test_every_number_is_that_of_metrics_jsonl(run_dir: Path) -> None:
    logged = [each for each in history(run_dir) if "loss" in each]
    expected = read_rows(run_dir / "metrics.jsonl")
    assert len(expected) == 2
    assert logged == [{key: value for key, value in line.items() if value is not None} for line in expected]


def test_samples_are_a_table_a_step(run_dir: Path) -> None:
    logged = [each for each in history(run_dir) if "loss" not in each]
    assert [each["step"] for each in logged] == [1, 2]
    tables = [
        json.loads(path.read_text())
        for path in sorted(run_dir.glob("wandb/offline-run-*/files/media/table/samples_*.table.json"))
    ]
    written = read_rows(run_dir / "samples.jsonl")
    assert {tuple(table["columns"]) for table in tables} == {tuple(written[0])}
    cells = [dict(zip(table["columns"], line, strict=True)) for table in tables for line in table["data"]]
    by_id = {cell["id"]: cell for cell in cells}
    assert sorted(by_id) == ["a/1", "a/2", "b/1", "b/2"]
    for line in written:
        shown = by_id[line["id"]]
        assert {key: str(value) for key, value in line.items()} == {key: str(value) for key, value in shown.items()}
