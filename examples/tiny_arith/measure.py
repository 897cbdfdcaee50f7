"""Measures a model folder on the held-out problems with transformers: `python measure.py [MODEL_DIR]`.

Knows nothing of how the model was trained, nor of any rollout service.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from prompt import MAX_ANSWER_TOKENS, PROMPT_TEMPLATE
from styles import OPENINGS, Style
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

HERE = Path(__file__).resolve().parent
FINAL_NUMBER = re.compile(r"#### (-?\d+)")


@dataclass(frozen=True)
class Question:
    """A held-out problem as the model meets it, and the number it should end with."""

    text: str
    answer: str


@dataclass(frozen=True)
class Attempt:
    """One completion: the style it opened with, if any, and whether its number was right."""

    style: Style | None
    correct: bool


def load_questions(path: Path, limit: int) -> list[Question]:
    """The first `limit` problems of a GSM8K-form file."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:limit]]
    return [Question(row["question"], row["answer"].rpartition("#### ")[2]) for row in rows]


def judge(completion: str, answer: str) -> Attempt:
    """Right when the last `#### N` is the answer; a completion without one is wrong."""
    style = next((style for style, opening in OPENINGS.items() if completion.startswith(opening)), None)
    numbers = FINAL_NUMBER.findall(completion)
    return Attempt(style, bool(numbers) and numbers[-1] == answer)


def attempts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: list[Question], samples: int
) -> Iterator[Attempt]:
    """`samples` attempts a question at temperature 1, or the greedy one if `samples` is 0, 64 questions at a time."""
    sampling = {"do_sample": True, "num_return_sequences": samples, "top_k": 0} if samples else {"do_sample": False}
    for start in range(0, len(questions), 64):
        batch = questions[start : start + 64]
        prompts = [PROMPT_TEMPLATE.format(question=question.text) for question in batch]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        output = model.generate(**inputs, max_new_tokens=MAX_ANSWER_TOKENS, **sampling)  # [batch * n, length]
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, text in enumerate(texts):
            yield judge(text, batch[row // max(samples, 1)].answer)


def accuracy(results: list[Attempt]) -> float:
    """The share of right attempts."""
    return sum(result.correct for result in results) / len(results)


def describe(title: str, results: list[Attempt]) -> Iterator[str]:
    """The accuracy, and below it how often each style was used and how often it was right."""
    yield f"{title}: {accuracy(results):.1%} of {len(results)} right"
    for style, count in Counter(result.style for result in results).most_common():
        own = [result for result in results if result.style == style]
        share = count / len(results)
        yield f"  {style or 'no known style':<14} {share:6.1%} of the attempts, {accuracy(own):6.1%} of them right"


def main() -> None:
    parser = argparse.ArgumentParser(description="Held-out accuracy, sampled at temperature 1 and greedy.")
    parser.add_argument("model_dir", type=Path, nargs="?", default=HERE / "model")
    parser.add_argument("--problems", type=int, default=256)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)

    tokenizer = AutoTokenizer.from_pretrained(arguments.model_dir)
    model = AutoModelForCausalLM.from_pretrained(arguments.model_dir, dtype=torch.float32).eval()
    questions = load_questions(HERE / "data" / "heldout.jsonl", arguments.problems)
    sampled = list(attempts(model, tokenizer, questions, arguments.samples))
    greedy = list(attempts(model, tokenizer, questions, 0))
    print("\n".join([*describe("sampled", sampled), *describe("greedy", greedy)]))


if __name__ == "__main__":
    main()
