"""Prompts from local files: order, resuming, bad rows, formats. Knows nothing of the hub but how its absence reads."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoTokenizer

from flashrl_trainer import prompt_reader
from flashrl_trainer.prompt_tokens import token_ids
from flashrl_trainer.prompts import PromptStream, RowChecks, load_eval, prepare_data
from flashrl_trainer.rewards import resolve_reward
from flashrl_trainer.samples import Prompt
from flashrl_trainer.settings import DataSettings

MODEL = Path(__file__).resolve().parents[2] / "examples/tiny_arith/model"


def problem(number: int) -> dict[str, str]:
    return {"question": f"What is {number}?", "answer": f"It is itself.\n#### {number}"}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def settings(path: Path, **changes: Any) -> DataSettings:
    plain = {"prompt_template": "{question}\n", "chat_template": False}
    return DataSettings.model_validate({"train": str(path), "eval": str(path), **plain, **changes})


@pytest.fixture
def ten(tmp_path: Path) -> Path:
    return write(tmp_path / "ten.jsonl", [problem(number) for number in range(1, 11)])


def answers(prompts: list[Prompt]) -> list[int]:
    return [int(prompt.answer) for prompt in prompts]


def test_every_epoch_has_each_prompt_once_in_an_order_of_its_own(ten: Path) -> None:
    stream = PromptStream(settings(ten))
    epochs = [answers(stream.next(10)) for _ in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(1, 11))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_epoch_is_over_with_its_last_prompt(ten: Path) -> None:
    stream = PromptStream(settings(ten))
    stream.next(9)
    assert stream.epoch == 0
    stream.next(1)
    assert stream.epoch == 1
    stream.next(25)
    assert stream.epoch == 3


def test_the_seed_decides_the_order(ten: Path) -> None:
    orders = [answers(PromptStream(settings(ten, shuffle_seed=seed)).next(10)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("taken", [0, 1, 9, 10, 11, 25])
def test_a_resumed_stream_goes_on_exactly_there(ten: Path, taken: int) -> None:
    first = PromptStream(settings(ten))
    first.next(taken)
    state = json.loads(json.dumps(first.state_dict()))
    second = PromptStream(settings(ten))
    second.next(3)  # whatever it did before is forgotten
    second.load_state_dict(state)
    assert second.next(22) == first.next(22)
    assert second.epoch == first.epoch
    assert second.state_dict() == first.state_dict()


def test_a_position_in_other_data_is_refused(ten: Path) -> None:
    state = PromptStream(settings(ten)).state_dict()
    with pytest.raises(ValueError, match=r"^data\.train: the checkpoint is from ten as gsm8k with shuffle_seed 0, "):
        PromptStream(settings(ten, shuffle_seed=5)).load_state_dict(state)


def test_a_set_larger_than_the_buffer_still_has_each_prompt_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_reader, "SHUFFLE_BUFFER_ROWS", 4)
    path = write(tmp_path / "many.jsonl", [problem(number) for number in range(50)])
    epoch = answers(PromptStream(settings(path)).next(50))
    assert sorted(epoch) == list(range(50))
    assert epoch != sorted(epoch)


def test_prompts_are_numbered_by_their_line(ten: Path) -> None:
    assert load_eval(settings(ten), 2) == [
        Prompt("ten/1", "What is 1?\n", "1"),
        Prompt("ten/2", "What is 2?\n", "2"),
    ]


def test_a_chat_prompt_is_one_user_message(ten: Path) -> None:
    data = DataSettings(train=str(ten), eval=str(ten))
    assert load_eval(data, 1)[0].prompt == [
        {
            "role": "user",
            "content": 'What is 1? Let\'s think step by step and output the final answer after "####".',
        }
    ]


def test_braces_in_questions_and_templates_stay(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": "{x} and {question}", "answer": "#### 1"}])
    data = settings(path, prompt_template=r"\boxed{} {question}")
    assert load_eval(data, 0)[0].prompt == r"\boxed{} {x} and {question}"


def test_evaluation_is_all_rows_in_file_order_when_asked_for_none_or_too_many(ten: Path) -> None:
    assert answers(load_eval(settings(ten), 0)) == list(range(1, 11))
    assert answers(load_eval(settings(ten), 99)) == list(range(1, 11))


BAD_ROWS = [
    ('{"question": "cut off', "not JSON: Unterminated string"),
    ("", "empty line"),
    ("[1, 2]", "not a JSON object"),
    ({"answer": "#### 1"}, "no question"),
    ({"question": None, "answer": "#### 1"}, "no question"),
    ({"question": "  ", "answer": "#### 1"}, "question is empty"),
    ({"question": 5, "answer": "#### 1"}, "question is not text but int"),
    ({"question": ["a"], "answer": "#### 1"}, "question is not text but list"),
    ({"question": "a"}, "no answer"),
    ({"question": "a", "answer": 5}, "answer is not text but int"),
    ({"question": "a", "answer": "72"}, 'no "####" in answer'),
    ({"question": "a", "answer": "so #### "}, 'nothing after "####" in answer'),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS)
def test_a_bad_row_is_reported_by_its_number_once_and_skipped(tmp_path: Path, row: Any, reason: str) -> None:
    path = write(tmp_path / "some.jsonl", [problem(1), row, problem(3)])
    reports: list[str] = []
    stream = PromptStream(settings(path), RowChecks(on_bad_row=reports.append))
    assert sorted(answers(stream.next(2))) == [1, 3]
    assert sorted(answers(stream.next(2))) == [1, 3]
    assert len(reports) == 1
    assert reports[0].startswith(f"skipped some row 2: {reason}")


def test_bytes_that_are_not_text_spoil_their_row_only(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    bad = b'{"question": "\xff\xfe", "answer": "#### 2"}\n'
    path.write_bytes(json.dumps(problem(1)).encode() + b"\n" + bad + json.dumps(problem(3)).encode())
    reports: list[str] = []
    assert answers(load_eval(settings(path), 0, RowChecks(on_bad_row=reports.append))) == [1, 3]
    assert reports == ["skipped some row 2: not UTF-8"]


def test_a_byte_order_mark_and_odd_line_separators_are_no_mistake(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    row = {"question": "one\u2028two\x0bthree", "answer": "#### 1"}
    path.write_text("\ufeff" + json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert load_eval(settings(path), 0)[0].prompt == "one\u2028two\x0bthree\n"


def test_a_prompt_that_is_too_long_is_reported_and_skipped(tmp_path: Path) -> None:
    path = write(tmp_path / "some.jsonl", [problem(1), problem(123456789), problem(3)])
    reports: list[str] = []
    checks = RowChecks(count_tokens=len, on_bad_row=reports.append)
    data = settings(path, max_prompt_tokens=len("What is 1?\n"))
    assert answers(load_eval(data, 0, checks)) == [1, 3]
    assert sorted(answers(PromptStream(data, checks).next(2))) == [1, 3]
    assert reports[0] == "skipped some row 2: 19 tokens, data.max_prompt_tokens = 11"


def test_a_prompt_that_the_chat_template_refuses_is_a_bad_row(tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": role, "content": "Why?"}], "answer": "1"} for role in ("user", "narrator", "user")]
    rows[2]["prompt"] = [{"role": "user", "content": "Who?"}]
    path = write(tmp_path / "some.jsonl", rows)
    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('no such role') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    reports: list[str] = []
    checks = RowChecks(lambda prompt: len(token_ids(tokenizer, prompt)), on_bad_row=reports.append)
    assert len(load_eval(settings(path, format="prompts"), 0, checks)) == 2
    assert reports == ["skipped some row 2: the chat template refuses it: no such role"]


def test_an_answer_that_could_never_be_rewarded_is_a_bad_row(tmp_path: Path) -> None:
    path = write(tmp_path / "some.jsonl", [problem(1), {"question": "a", "answer": "#### none"}])
    reward = resolve_reward("numeric")
    reports: list[str] = []
    checks = RowChecks(check_answer=lambda answer: reward("", answer), on_bad_row=reports.append)
    assert answers(load_eval(settings(path), 0, checks)) == [1]
    assert reports[0].startswith("skipped some row 2: reward: 'numeric' needs answers that are numbers")


def test_a_prompt_that_repeats_is_read_once(tmp_path: Path) -> None:
    path = write(tmp_path / "some.jsonl", [problem(1), problem(2), problem(1), problem(2), problem(3)])
    assert answers(load_eval(settings(path), 0)) == [1, 2, 3]
    assert sorted(answers(PromptStream(settings(path)).next(3))) == [1, 2, 3]


def test_no_usable_row_at_all_is_an_error_with_the_first_reason(tmp_path: Path) -> None:
    path = write(tmp_path / "some.jsonl", [{"question": "a"}, {"question": "b"}])
    silent = RowChecks(on_bad_row=lambda line: None)
    with pytest.raises(ValueError, match=r"^data\.train: no usable row in .*; the first: some row 1: no answer$"):
        PromptStream(settings(path), silent).next(1)
    with pytest.raises(ValueError, match=r"^data\.eval: no usable row in .*; the first: some row 1: no answer$"):
        load_eval(settings(path), 0, silent)


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "some.jsonl", [])
    with pytest.raises(ValueError, match=r"^data\.train: no usable row in .*: it is empty$"):
        PromptStream(settings(path)).next(1)


def test_a_missing_file_is_named_before_anything_is_read(tmp_path: Path) -> None:
    absent = tmp_path / "absent.jsonl"
    with pytest.raises(ValueError, match=rf"^data\.train: no file {absent}$"):
        PromptStream(settings(absent))
    with pytest.raises(ValueError, match=rf"^data\.eval: no file {absent}$"):
        load_eval(settings(absent), 0)


def test_a_hub_set_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"^data\.train: cannot read nobody/no-such-set: [^\n]+$"):
        PromptStream(DataSettings(train="nobody/no-such-set")).next(1)


def test_a_path_may_look_like_a_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "run [1] *"
    folder.mkdir()
    assert answers(load_eval(settings(write(folder / "some.jsonl", [problem(1)])), 0)) == [1]


def test_parquet_is_read_by_row(tmp_path: Path) -> None:
    path = tmp_path / "some.parquet"
    datasets.Dataset.from_list([problem(1), {"question": None, "answer": "#### 2"}, problem(3)]).to_parquet(path)
    reports: list[str] = []
    assert answers(load_eval(settings(path), 0, RowChecks(on_bad_row=reports.append))) == [1, 3]
    assert reports == ["skipped some row 2: no question"]


def test_dapo_rows_are_used_as_published(tmp_path: Path) -> None:
    message = {"role": "user", "content": "Solve ... x.\n\nRemember to put your answer on its own line."}
    truth = {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"}
    rows = [
        {"prompt": [message], "reward_model": truth, "data_source": "math_dapo"},
        {"prompt": [message, message], "reward_model": truth},
        {"prompt": [{"role": "user", "content": "y"}], "reward_model": None},
    ]
    reports: list[str] = []
    path = write(tmp_path / "d.jsonl", rows)
    data = settings(path, format="dapo_math", prompt_template="{question}", chat_template=True)
    assert load_eval(data, 0, RowChecks(on_bad_row=reports.append)) == [Prompt("d/1", [message], "34")]
    assert reports == ["skipped d row 2: prompt is not a single user message", "skipped d row 3: no ground_truth"]


def test_evaluation_may_have_a_format_of_its_own(tmp_path: Path) -> None:
    rows = [
        {"problem": "Find p.", "answer": "204"},
        {"problem": "Find q.", "answer": 25},
        {"problem": "r", "answer": True},
    ]
    path = write(tmp_path / "aime.jsonl", rows)
    data = settings(path, format="dapo_math", eval_format="aime")
    prompts = load_eval(data, 0, RowChecks(on_bad_row=lambda line: None))
    assert [(prompt.prompt, prompt.answer) for prompt in prompts] == [("Find p.\n", "204"), ("Find q.\n", "25")]


@pytest.mark.parametrize("chat", [False, True])
def test_prepared_data_reads_back_as_the_same_prompts(ten: Path, tmp_path: Path, chat: bool) -> None:
    data = settings(ten, chat_template=chat)
    counts = prepare_data(tmp_path / "out", data)
    assert counts == {tmp_path / "out/train.jsonl": 10, tmp_path / "out/eval.jsonl": 10}
    prepared = settings(tmp_path / "out/eval.jsonl", format="prompts")
    expected = [(prompt.prompt, prompt.answer) for prompt in load_eval(data, 0)]
    assert [(prompt.prompt, prompt.answer) for prompt in load_eval(prepared, 0)] == expected


def test_nothing_is_written_from_data_that_cannot_be_used(tmp_path: Path) -> None:
    data = settings(write(tmp_path / "some.jsonl", ["{}"]))
    with pytest.raises(ValueError, match="no usable row"):
        prepare_data(tmp_path / "out", data, RowChecks(on_bad_row=lambda line: None))
    assert not (tmp_path / "out").exists()


@pytest.mark.shared_data
def test_gsm8k_is_read_whole_and_without_complaint(gsm8k_dir: Path) -> None:
    reports: list[str] = []
    reward = resolve_reward("numeric")
    checks = RowChecks(check_answer=lambda answer: reward("", answer), on_bad_row=reports.append)
    data = DataSettings(train=str(gsm8k_dir / "train.jsonl"), eval=str(gsm8k_dir / "test.jsonl"))
    stream = PromptStream(data, checks)
    assert len({prompt.id for prompt in stream.next(7473)}) == 7473
    assert stream.epoch == 1
    assert len(load_eval(data, 0, checks)) == 1319
    assert reports == []
