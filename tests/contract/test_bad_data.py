"""Data and models that do not fit, each in one line before anything is loaded; `prepare-data`, and what it skips."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.workshop import MODEL, ROOT, Workshop

NO_SERVICE = "http://127.0.0.1:9"
TRAIN = ROOT / "examples/tiny_arith/data/train.jsonl"


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def refusal(workshop: Workshop, **settings: Any) -> str:
    """The last line of a trainer that did not start."""
    ended = workshop.trainer(NO_SERVICE, **settings).wait()
    assert (ended.code, "Traceback" in ended.errors) == (2, False), ended.errors
    assert not workshop.runs.exists()
    return ended.errors.splitlines()[-1]


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ([], "no usable row in {file}: it is empty"),
        ([{"text": "x"}, {"text": "y"}], "no usable row in {file}; the first: data row 1: no question"),
        (
            [{"question": "x", "answer": 7}],
            "no usable row in {file}; the first: data row 1: answer is not text but int",
        ),
    ],
)
def test_data_without_a_usable_row(workshop: Workshop, rows: list[Any], line: str) -> None:
    file = write(workshop.folder / "data.jsonl", rows)
    said = refusal(workshop, data__eval=file)
    assert said == f"error: data.eval: {line.format(file=file)}"


def test_columns_of_another_format(workshop: Workshop) -> None:
    said = refusal(workshop, data__eval_format="dapo_math")
    assert said.startswith("error: data.eval: no usable row in ")
    assert said.endswith("; the first: heldout row 1: prompt is not a list of messages")


def test_model_without_a_chat_template(workshop: Workshop) -> None:
    model = workshop.folder / "model"
    shutil.copytree(MODEL, model, ignore=shutil.ignore_patterns("*.jinja"))
    config = json.loads((model / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    said = refusal(workshop, data__chat_template="true", model__path=model)
    assert said == (
        f"error: data.chat_template: the tokenizer of {model} has no chat template; "
        "with data.chat_template = false prompts are sent as text"
    )


def test_prepared_data_has_what_can_be_used_and_the_rest_is_named(workshop: Workshop) -> None:
    good = json.loads(TRAIN.read_text().splitlines()[0])
    rows = [good, {"question": "x", "answer": "#### seven"}, {"question": "y"}]
    train, out = write(workshop.folder / "some.jsonl", rows), workshop.folder / "out"
    ended = workshop.trainer(
        NO_SERVICE, str(out), command="prepare-data", data__train=train, data__eval=train, data__reward="numeric"
    ).wait()
    assert ended.code == 0, ended.errors
    assert ended.output == f"{out}/train.jsonl: 1 prompts\n{out}/eval.jsonl: 1 prompts\n"
    assert [line.partition(":")[0] for line in ended.errors.splitlines()] == [
        "skipped some row 2",
        "skipped some row 3",
    ]
    written = json.loads((out / "train.jsonl").read_text())
    assert written == {
        "id": "some/1",
        "prompt": f"{good['question']}\n",
        "answer": good["answer"].rpartition("####")[2].strip(),
    }
