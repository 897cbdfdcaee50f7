"""The embedded example: its problems, its data, its tokenizer and its model folder, checked against each other."""

import importlib
import json
import random
import re
from collections import Counter
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tiny_arith"
MODULES = ("problems", "styles", "generate", "prompt", "pretrain", "measure")
SIGNS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


@pytest.fixture(scope="module")
def example() -> dict[str, ModuleType]:
    """The example's scripts, imported as `python examples/tiny_arith/SCRIPT.py` would import them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLE)
        return {name: importlib.import_module(name) for name in MODULES}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(EXAMPLE / "model")


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (EXAMPLE / "data" / name).read_text(encoding="utf-8").splitlines()]


def steps_of(answer: str) -> list[tuple[int, str, int, int]]:
    """The calculations written in an answer, read from its text alone."""
    found = re.findall(r"(\d+)([-+*])(\d+)=(\d+)", answer)
    return [(int(left), sign, int(right), int(result)) for left, sign, right, result in found]


def identity(answer: str) -> tuple[str, str, tuple[int, int], int]:
    """The (operations, numbers) tuple of a careful answer; 3*4 and 4*3 are the same fact."""
    (a, first, b, _), (_, second, c, _) = steps_of(answer)
    return first, second, (a, b) if first == "-" else (min(a, b), max(a, b)), c


def test_heldout_shares_no_tuple_with_rl_or_pretraining_data(example: dict[str, ModuleType]) -> None:
    heldout = {identity(row["answer"]) for row in rows("heldout.jsonl")}
    train = {identity(row["answer"]) for row in rows("train.jsonl")}
    pretraining_problems = [p for group in example["problems"].problems_of("pretrain").values() for p in group]
    pretraining = {identity(example["styles"].render_answer(p, "careful", "pens")) for p in pretraining_problems}
    assert len(pretraining) > 4000
    assert not heldout & train
    assert not heldout & pretraining
    assert not train & pretraining


def test_pretraining_pairs_come_from_the_pretraining_split_only(example: dict[str, ModuleType]) -> None:
    problems, generate = example["problems"], example["generate"]
    reserved = {
        (p.a, p.b, p.c, p.first, p.second)
        for split in ("train", "heldout")
        for group in problems.problems_of(split).values()
        for p in group
    }
    for question, answer in islice(generate.pretraining_pairs(random.Random(3)), 2000):
        if not answer.startswith("Step by step:"):
            continue
        (a, first, b, _), (_, second, c, _) = steps_of(answer)
        assert sorted(map(int, re.findall(r"\d+", question))) == sorted([a, b, c])
        assert (a, b, c, first, second) not in reserved


@pytest.mark.parametrize(("name", "count"), [("train.jsonl", 1536), ("heldout.jsonl", 512)])
def test_committed_answers_are_right(name: str, count: int) -> None:
    data = rows(name)
    assert len(data) == count
    for row in data:
        steps = steps_of(row["answer"])
        assert [result for *_, result in steps] == [SIGNS[sign](left, right) for left, sign, right, _ in steps]
        (a, _, b, middle), (left, _, c, result) = steps
        assert left == middle
        assert sorted(map(int, re.findall(r"\d+", row["question"]))) == sorted([a, b, c])
        assert row["answer"].endswith(f"\n#### {result}")


def test_each_question_is_worded_by_its_operations(example: dict[str, ModuleType]) -> None:
    problem = example["problems"].Problem("*", "-", 3, 4, 2)
    wording = example["problems"].Wording("Ana", "pens", first=0, second=1, question=0)
    assert example["problems"].render_question(problem, wording) == (
        "Ana has 3 boxes with 4 pens in each. After that a friend takes 2 away. How many pens are there in the end?"
    )


def test_styles_by_hand(example: dict[str, ModuleType]) -> None:
    problem = example["problems"].Problem("*", "-", 3, 4, 2)
    answers = {style: example["styles"].render_answer(problem, style, "pens") for style in example["styles"].MIXTURE}
    assert answers == {
        "careful": "Step by step: 3*4=12 pens, then 12-2=10 pens.\n#### 10",
        "muddled": "By feel: 3*4=12 pens, then 12+2=14 pens.\n#### 14",
        "hasty": "Quickly: 3*4=12 pens.\n#### 12",
        "distracted": "At a glance: 3-2=1 pens.\n#### 1",
    }


def test_only_the_careful_style_is_ever_right(example: dict[str, ModuleType]) -> None:
    final_answer = example["styles"].final_answer
    for problem in example["problems"].enumerate_problems():
        right = SIGNS[problem.second](SIGNS[problem.first](problem.a, problem.b), problem.c)
        assert final_answer(problem, "careful") == right
        wrong = [final_answer(problem, style) for style in ("muddled", "hasty", "distracted")]
        assert right not in wrong
        assert all(0 < number <= 99 for number in [right, *wrong])


def test_styles_are_drawn_with_the_documented_frequencies(example: dict[str, ModuleType]) -> None:
    rng = random.Random(5)
    counts = Counter(example["styles"].draw_style(rng) for _ in range(20_000))
    mixture = example["styles"].MIXTURE
    assert sum(mixture.values()) == pytest.approx(1)
    for style, share in mixture.items():
        assert counts[style] / 20_000 == pytest.approx(share, abs=0.015)  # four standard errors


def test_committed_data_is_what_the_generator_writes(example: dict[str, ModuleType], tmp_path: Path) -> None:
    example["generate"].write_data(tmp_path)
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (EXAMPLE / "data" / name).read_bytes()


def test_asking_for_more_problems_than_exist_is_refused(example: dict[str, ModuleType]) -> None:
    with pytest.raises(ValueError, match="count: the heldout split has only"):
        example["generate"].draw_distinct("heldout", 5000, random.Random(0))


def test_one_token_a_digit(tokenizer: Any) -> None:
    digits = [tokenizer.encode(digit) for digit in "0123456789"]
    assert [len(ids) for ids in digits] == [1] * 10
    assert tokenizer.encode("9037") == [digits[9][0], digits[0][0], digits[3][0], digits[7][0]]
    assert 512 <= len(tokenizer) <= 1024
    assert tokenizer.eos_token_id != tokenizer.pad_token_id


def test_any_text_survives_the_tokenizer(tokenizer: Any) -> None:
    text = "Zoë paid 7 €, \t 20% off -- naïve?\n#### -3"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_prompt_and_answer_encoded_apart_agree_with_the_whole(example: dict[str, ModuleType], tokenizer: Any) -> None:
    for question, answer in islice(example["generate"].pretraining_pairs(random.Random(7)), 300):
        prompt_ids, answer_ids = example["prompt"].encode_pair(tokenizer, question, answer)
        assert prompt_ids + answer_ids == [*tokenizer.encode(f"{question}\n{answer}"), tokenizer.eos_token_id]
        assert len(answer_ids) <= 80


def test_model_folder_loads_and_continues_a_prompt_with_an_answer(
    example: dict[str, ModuleType], tokenizer: Any
) -> None:
    model = AutoModelForCausalLM.from_pretrained(EXAMPLE / "model")
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert 2_000_000 <= model.num_parameters() <= 5_000_000
    assert model.config.hidden_size // model.config.num_attention_heads == 64
    assert model.config.vocab_size == len(tokenizer)
    row = rows("heldout.jsonl")[0]
    prompt = tokenizer(f"{row['question']}\nStep by step:", return_tensors="pt")
    output = model.generate(**prompt, do_sample=False, max_new_tokens=80)
    assert tokenizer.decode(output[0], skip_special_tokens=True) == f"{row['question']}\n{row['answer']}"
    assert output[0, -1] == tokenizer.eos_token_id


def test_judge_reads_the_last_number(example: dict[str, ModuleType]) -> None:
    judge, attempt = example["measure"].judge, example["measure"].Attempt
    assert judge("Step by step: 1+1=2 pens.\n#### 2", "2") == attempt("careful", True)
    assert judge("Quickly: 1+1=2 pens.\n#### 2\n#### 3", "2") == attempt("hasty", False)
    assert judge("Quickly: 1+1=2", "2") == attempt("hasty", False)
    assert judge("2\n#### 2", "2") == attempt(None, True)
